"""The synthetic benchmark: the shape of the real one, invented content, and questions with one right answer."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.data import real_data
from trainers.data.folds import make_folds, split_attack
from trainers.data.records import load_attack_documents, load_forget_retain, load_splits
from trainers.data.synthetic import MAX_DOCUMENTS, SyntheticSummary, write_synthetic_benchmark
from trainers.data.synthetic_questions import SUBJECTS
from trainers.data.synthetic_words import SLOTS
from trainers.data.types import AttackDocuments, ForgetRetain, Kind, Record
from trainers.errors import InputError
from trainers.files import sha256_file

N = 12


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> SyntheticSummary:
    return write_synthetic_benchmark(tmp_path_factory.mktemp("synthetic") / "out", documents_per_task=N, seed=1)


@pytest.fixture(scope="module")
def largest(tmp_path_factory: pytest.TempPathFactory) -> SyntheticSummary:
    """The largest benchmark that names suffice for: the hardest case for everything that must not repeat."""
    out = tmp_path_factory.mktemp("synthetic") / "out"
    return write_synthetic_benchmark(
        out, documents_per_task=MAX_DOCUMENTS, attack_documents=200, subjects=8, questions_per_subject=40, seed=2
    )


@pytest.fixture(params=["summary", "largest"])
def either(request: pytest.FixtureRequest) -> SyntheticSummary:
    return request.getfixturevalue(request.param)


def load(summary: SyntheticSummary) -> tuple[ForgetRetain, AttackDocuments]:
    return load_forget_retain(summary.path / "lume"), load_attack_documents(summary.path / "mia")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def questions(summary: SyntheticSummary, fold: str) -> Iterator[tuple[str, list[list[str]]]]:
    for path in sorted((summary.path / "mmlu" / fold).iterdir()):
        with open(path, encoding="utf-8", newline="") as file:
            yield path.name.removesuffix(f"_{fold}.csv"), list(csv.reader(file))


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path, summary: SyntheticSummary) -> None:
    write_synthetic_benchmark(tmp_path / "same", documents_per_task=N, seed=1)
    write_synthetic_benchmark(tmp_path / "other", documents_per_task=N, seed=2)
    expected, same, other = (files(folder) for folder in (summary.path, tmp_path / "same", tmp_path / "other"))
    assert same == expected
    assert other["lume/forget.jsonl"] != expected["lume/forget.jsonl"]


def test_the_manifest_states_seed_parameters_and_every_file(summary: SyntheticSummary) -> None:
    manifest = json.loads((summary.path / "manifest.json").read_text())
    assert (manifest["seed"], manifest["parameters"]["documents_per_task"], manifest["parameters"]["attack_documents"]) == (1, N, N)
    assert set(manifest["sha256"]) | {"manifest.json"} == set(files(summary.path))
    assert all(sha256_file(summary.path / name) == digest for name, digest in manifest["sha256"].items())


def test_the_shape_is_that_of_the_benchmark(either: SyntheticSummary) -> None:
    """Rows per set: Task1 2n, Task2 6n, Task3 2n; each document one sc1 and qa0 (Task2: qa0 to qa4)."""
    data, _ = load(either)
    number = len(data.forget) // 10
    suffixes = {"Task1": ["sc1", "qa0"], "Task2": ["sc1", *(f"qa{index}" for index in range(5))], "Task3": ["sc1", "qa0"]}
    for records in (data.forget, data.retain):
        assert Counter(record.task for record in records) == {"Task1": 2 * number, "Task2": 6 * number, "Task3": 2 * number}
        rows = defaultdict(list)
        for record in records:
            rows[record.document].append(record)
        assert len(rows) == 3 * number
        for document, its in rows.items():
            assert [record.id.removeprefix(document) for record in its] == suffixes[its[0].task]
            assert document.startswith('"') == document.endswith('"') == (its[0].task == "Task1")
    assert (either.num_forget_rows, either.num_retain_rows) == (len(data.forget), len(data.retain))


def test_ids_look_like_the_real_ones() -> None:
    """Each pattern below holds for every document id of the real task it stands for."""
    patterns = {"Task1": r'"[0-9a-f-]{36}"', "Task2": r"[0-9a-f-]{36}", "Task3": r"\d+"}
    for record in load_forget_retain(real_data("lume")).forget:
        assert re.fullmatch(patterns[record.task], record.document)


def test_synthetic_ids_have_the_same_patterns(summary: SyntheticSummary) -> None:
    patterns = {"Task1": r'"[0-9a-f-]{36}"', "Task2": r"[0-9a-f-]{36}", "Task3": r"\d{8}"}
    for record in load(summary)[0].forget:
        assert re.fullmatch(patterns[record.task], record.document)


def test_no_question_has_two_answers(either: SyntheticSummary) -> None:
    """Over both sets every question text occurs once, so it cannot have two answers."""
    data, _ = load(either)
    asked = Counter(record.input for record in data.forget + data.retain if record.kind is Kind.QUESTION)
    assert set(asked.values()) == {1}


def test_a_question_names_somebody_or_some_place_of_its_document_alone(either: SyntheticSummary) -> None:
    """Some capitalised name of the question, or pair of names, stands in one document of all."""
    data, attack = load(either)
    texts = {record.document: record.text for record in data.forget + data.retain if record.kind is Kind.COMPLETION}
    texts |= {document.id: document.text for document in attack.nonmembers}
    holders: dict[str, set[str]] = defaultdict(set)
    name = re.compile(r"[A-Z][a-z]+(?: [A-Z][a-z]+)?")
    for document, text in texts.items():
        for match in name.findall(text):
            holders[match].add(document)
    for record in data.forget + data.retain:
        if record.kind is Kind.QUESTION:
            named = [match.removeprefix("Which ").removeprefix("Who ") for match in name.findall(record.input)]
            assert any(holders.get(match) == {record.document} for match in named), record


def test_answers_can_be_learned_from_the_document(either: SyntheticSummary) -> None:
    """The answer stands in the text, written alike; dates are rewritten and numbers lose their dashes, as in the benchmark."""
    data, _ = load(either)
    texts = {record.document: record.text for record in data.forget + data.retain if record.kind is Kind.COMPLETION}
    months = "January February March April May June July August September October November December".split()  # noqa: SIM905
    for record in data.forget + data.retain:
        if record.kind is Kind.COMPLETION:
            continue
        expected = record.output
        if re.fullmatch(r"\d{4}-\d\d-\d\d", expected):
            year, month, day = map(int, expected.split("-"))
            expected = f"{months[month - 1]} {day}, {year}"
        text = texts[record.document]
        assert expected in text or expected in text.replace("-", ""), record


def test_personal_data_is_well_formed_unique_and_unusable(either: SyntheticSummary) -> None:
    data, _ = load(either)
    patterns = (
        r"19\d\d-[01]\d-[0-2]\d",
        r"9\d\d[1-4]\d\d{4}",  # never issued: area 9xx with a group below 50
        r"[2-9]\d\d55501\d\d",  # kept for fiction
        r"[a-z0-9._]+@example\.(com|net|org)",
        r"\d+ [A-Z][a-z]+ [A-Z][a-z]+, [A-Z][a-z]+",
    )
    for index, pattern in enumerate(patterns):
        answers = [record.output for record in data.forget + data.retain if record.task == "Task2" and record.id.endswith(f"qa{index}")]
        assert answers
        assert all(re.fullmatch(pattern, answer) for answer in answers)
        if index:  # two people may share a birthday
            assert len(set(answers)) == len(answers)


def test_nobody_shares_a_name_and_small_benchmarks_share_no_part_of_one(summary: SyntheticSummary, largest: SyntheticSummary) -> None:
    for either, parts_differ in ((summary, True), (largest, False)):
        data, attack = load(either)
        heads = [document.text.split("\n")[0] for document in attack.members + attack.nonmembers]
        heads += [record.text.split("\n")[0] for record in data.retain if record.task == "Task3" and record.kind is Kind.COMPLETION]
        heads += [
            match[1] for record in data.forget + data.retain if (match := re.fullmatch(r"What is the birth date of (.+)\?", record.input))
        ]
        assert len(set(heads)) == len(heads)
        parts = [part for head in heads for part in head.split()]
        assert (len(set(parts)) == len(parts)) == parts_differ


def test_members_are_the_biographies_of_the_forget_set(either: SyntheticSummary) -> None:
    data, attack = load(either)
    biographies = [record for record in data.forget if record.task == "Task3" and record.kind is Kind.COMPLETION]
    assert [(member.id, member.text) for member in attack.members] == [(row.document, f"{row.input} {row.output}") for row in biographies]
    assert (either.num_members, either.num_nonmembers) == (len(attack.members), len(attack.nonmembers))


def test_nonmembers_are_of_the_same_kind_but_in_neither_set(summary: SyntheticSummary) -> None:
    """Apart from names, numbers and the words of the slots, a non-member reads like some member."""
    data, attack = load(summary)
    assert not {record.document for record in data.forget + data.retain} & {other.id for other in attack.nonmembers}
    slots = {word for words in SLOTS.values() for word in words}

    def frame(text: str) -> str:
        return " ".join(word for word in re.findall(r"[a-z]+", re.sub(r"\b[A-Z]\w*", "", text)) if word not in slots)

    assert {frame(other.text) for other in attack.nonmembers} == {frame(member.text) for member in attack.members}


def test_texts_are_short_enough_for_a_tiny_model(either: SyntheticSummary) -> None:
    """Words: documents 35 to 55, continuations 12 to 21, questions at most 16, answers at most 4."""
    data, _ = load(either)

    def num_words(text: str) -> int:
        return len(text.split())

    for record in data.forget + data.retain:
        if record.kind is Kind.COMPLETION:
            assert 35 <= num_words(record.text) <= 55, record
            assert 12 <= num_words(record.output) <= 21, record
        else:
            assert num_words(record.input) <= 16, record
            assert num_words(record.output) <= 4, record


def test_no_slot_is_left_open_and_articles_fit(either: SyntheticSummary) -> None:
    data, attack = load(either)
    texts = [record.text for record in data.forget + data.retain] + [document.text for document in attack.nonmembers]
    for text in texts:
        assert not re.search(r"[{}]|  |\ba [aeiou]", text), text


def test_every_fold_has_every_task_and_its_own_members(summary: SyntheticSummary) -> None:
    """12 members: 3 are scored in validation, 3 in test, and the 6 of train go three and three."""
    data, attack = load(summary)
    assert load_splits(summary.path / "lume") is None
    folds = make_folds(data, splits=None, fractions={"train": 0.5, "validation": 0.25, "test": 0.25}, seed=0)
    for part in folds.values():
        assert {record.task for record in part.forget} == {record.task for record in part.retain} == {"Task1", "Task2", "Task3"}
    halves = split_attack(attack, folds=folds, seed=0)
    assert [(len(half.members), len(half.nonmembers)) for half in halves.values()] == [(6, 6), (6, 6)]


def test_questions_have_four_choices_and_balanced_letters(either: SyntheticSummary) -> None:
    counts: Counter[str] = Counter()
    lands: Counter[str] = Counter()
    for subject, rows in (*questions(either, "dev"), *questions(either, "test")):
        assert subject in SUBJECTS
        for cells in rows:
            assert len(cells) == 6
            assert len(set(cells[1:5])) == 4
            assert all(1 <= len(choice.split()) <= 2 for choice in cells[1:5])
            assert 16 <= sum(len(cell.split()) for cell in cells[:5]) <= 30
        lands.update(cells[0] for cells in rows)
    for _, rows in questions(either, "test"):
        counts.update(cells[5] for cells in rows)
    assert set(lands.values()) == {1}
    assert set(counts) == set("ABCD")
    assert len(set(counts.values())) == 1
    assert sum(counts.values()) == either.num_test_questions


def test_five_solved_questions_per_subject(summary: SyntheticSummary) -> None:
    assert [len(rows) for _, rows in questions(summary, "dev")] == [5] * 4
    assert [len(rows) for _, rows in questions(summary, "test")] == [12] * 4
    assert [subject for subject, _ in questions(summary, "dev")] == [subject for subject, _ in questions(summary, "test")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"documents_per_task": 2}, r"documents_per_task is 2\n.*three folds need three documents\n.*from 3 to 60"),
        ({"documents_per_task": 61}, r"documents_per_task is 61\n.*from 3 to 60"),
        ({"attack_documents": 1}, "attack_documents is 1"),
        ({"attack_documents": 10_000}, r"attack_documents is 10000\n.*from 2 to 264"),
        ({"subjects": 9}, r"subjects is 9\n.*from 1 to 8"),
        ({"questions_per_subject": 0}, "questions_per_subject is 0"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_written(tmp_path: Path, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        write_synthetic_benchmark(tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


def test_three_documents_still_give_eight_nonmembers(tmp_path: Path) -> None:
    result = write_synthetic_benchmark(tmp_path / "out", documents_per_task=3)
    assert (result.num_members, result.num_nonmembers) == (3, 8)


def test_an_earlier_benchmark_is_replaced_but_nothing_else(tmp_path: Path) -> None:
    write_synthetic_benchmark(tmp_path / "out", documents_per_task=3, subjects=4, seed=1)
    write_synthetic_benchmark(tmp_path / "out", documents_per_task=3, subjects=1, seed=2)
    assert len(list((tmp_path / "out" / "mmlu" / "dev").iterdir())) == 1
    precious = tmp_path / "mine" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("years of work")
    with pytest.raises(InputError, match=r"taken by something else\n.*mine"):
        write_synthetic_benchmark(tmp_path / "mine", documents_per_task=3)
    assert precious.read_text() == "years of work"


def test_documents_are_mixed_over_the_tasks(summary: SyntheticSummary) -> None:
    records: tuple[Record, ...] = load(summary)[0].forget
    order = [record.task for record in records if record.kind is Kind.COMPLETION]
    assert order != sorted(order)

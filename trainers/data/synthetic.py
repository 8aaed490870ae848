"""A small benchmark of invented texts in the layout of LUME, its membership attack and MMLU.

Everything comes from our own words and templates, so that it may be shown, shipped and leaked. Texts are short enough for a
model of about a million parameters to learn by heart on a CPU.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from trainers.data.synthetic_documents import biography, personal_data, phone_numbers, security_numbers, story
from trainers.data.synthetic_questions import MAX_QUESTIONS, SUBJECTS, subject_files
from trainers.data.synthetic_words import NUM_TOWNS, people, towns
from trainers.data.types import Kind, Record
from trainers.errors import InputError
from trainers.files import atomic_folder, read_json, sha256_file, write_json, write_text

MIN_DOCUMENTS, MAX_DOCUMENTS = 3, 60
"""Documents per task and set: three folds need three; the rest is what names suffice for."""
MIN_ATTACK_DOCUMENTS = 8
MAX_ATTACK_DOCUMENTS = NUM_TOWNS - 6 * MAX_DOCUMENTS
_KIND = "synthetic unlearning benchmark"


@dataclass(frozen=True)
class SyntheticSummary:
    """What was written."""

    path: Path
    seed: int
    num_forget_rows: int
    num_retain_rows: int
    num_members: int
    num_nonmembers: int
    num_dev_questions: int
    num_test_questions: int


def write_synthetic_benchmark(
    out: Path,
    *,
    documents_per_task: int = 12,
    attack_documents: int | None = None,
    subjects: int = 4,
    questions_per_subject: int = 12,
    seed: int = 0,
) -> SyntheticSummary:
    """Write ``lume/``, ``mia/``, ``mmlu/`` and, last, ``manifest.json``; the same arguments give the same bytes.

    Args:
        out: folder to write; an earlier synthetic benchmark there is replaced as a whole, other content is refused.
        documents_per_task: documents of each of the three tasks in each of the two sets (Task1 and Task3 give two rows each,
            Task2 six).
        attack_documents: non-members, biographies in neither set; default: as many as members, at least 8. The members are the
            forget set's biographies.
        subjects: multiple-choice subjects, each with 5 solved and ``questions_per_subject`` test questions.

    Raises:
        InputError: for a number out of range, or if ``out`` holds something else.
    """
    out = Path(out)
    num_attack = max(documents_per_task, MIN_ATTACK_DOCUMENTS) if attack_documents is None else attack_documents
    _check_range("documents_per_task", documents_per_task, low=MIN_DOCUMENTS, high=MAX_DOCUMENTS, why="three folds need three documents")
    _check_range("attack_documents", num_attack, low=2, high=MAX_ATTACK_DOCUMENTS, why="each half of the attack needs a non-member")
    _check_range("subjects", subjects, low=1, high=len(SUBJECTS))
    _check_range("questions_per_subject", questions_per_subject, low=2, high=MAX_QUESTIONS, why="each fold needs a question")
    _check_free(out)

    documents, nonmembers = _make_documents(number=documents_per_task, num_attack=num_attack, seed=seed)
    questions = random.Random(f"{seed}:questions")
    texts = {f"lume/{name}.jsonl": _json_lines(_fields(row) for document in documents[name] for row in document) for name in documents}
    members = [rows[0] for rows in documents["forget"] if rows[0].task == "Task3"]
    for name, rows in (("member", members), ("nonmember", nonmembers)):
        texts[f"mia/{name}.jsonl"] = _json_lines({"id": row.document, "document": row.text} for row in rows)
    for subject in questions.sample(sorted(SUBJECTS), subjects):
        files = subject_files(questions, subject=subject, num_test=questions_per_subject)
        texts |= {f"mmlu/{name}": text for name, text in files.items()}

    parameters = {
        "documents_per_task": documents_per_task,
        "attack_documents": num_attack,
        "subjects": subjects,
        "questions_per_subject": questions_per_subject,
    }
    with atomic_folder(out) as folder:
        for name in sorted(texts):
            write_text(folder / name, texts[name])
        hashes = {name: sha256_file(folder / name) for name in sorted(texts)}
        write_json(folder / "manifest.json", {"schema_version": 1, "kind": _KIND, "seed": seed, "parameters": parameters, "sha256": hashes})
    return SyntheticSummary(
        path=out,
        seed=seed,
        num_forget_rows=sum(map(len, documents["forget"])),
        num_retain_rows=sum(map(len, documents["retain"])),
        num_members=len(members),
        num_nonmembers=len(nonmembers),
        num_dev_questions=sum(text.count("\n") for name, text in texts.items() if name.startswith("mmlu/dev/")),
        num_test_questions=sum(text.count("\n") for name, text in texts.items() if name.startswith("mmlu/test/")),
    )


def _make_documents(*, number: int, num_attack: int, seed: int) -> tuple[dict[str, list[list[Record]]], list[Record]]:
    """Documents (lists of rows) of both sets in mixed order, and the completions of the non-members."""
    rng = random.Random(f"{seed}:documents")
    total = 6 * number + num_attack
    # Every document has its own person and its own town: that is what makes each question unambiguous.
    cast = list(zip(people(rng, number=total), towns(rng, number=total), strict=True))
    numbers = rng.sample(range(10_000_000, 100_000_000), 2 * number + num_attack)
    ssns, phones = security_numbers(rng, number=2 * number), phone_numbers(rng, number=2 * number)
    documents: dict[str, list[list[Record]]] = {"forget": [], "retain": []}
    for which, name in enumerate(documents):
        for index in range(number):
            serial = which * number + index
            (person1, town1), (person2, town2), (person3, town3) = cast[3 * serial : 3 * serial + 3]
            documents[name] += [
                story(rng, index=index, person=person1, town=town1),
                personal_data(rng, index=index, person=person2, town=town2, ssn=ssns[serial], phone=phones[serial]),
                biography(rng, index=index, person=person3, town=town3, number=numbers[serial]),
            ]
        rng.shuffle(documents[name])
    nonmembers = [
        biography(rng, index=index, person=person, town=town, number=numbers[2 * number + index])
        for index, (person, town) in enumerate(cast[6 * number :])
    ]
    completions = [row for rows in nonmembers for row in rows if row.kind is Kind.COMPLETION]
    return documents, completions


def _fields(row: Record) -> dict[str, str]:
    """A row's fields that are there: only rows with another answer to prefer have an alternative."""
    return {name: value for name, value in asdict(row).items() if value is not None}


def _json_lines(values: Iterable[dict[str, str]]) -> str:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def _check_range(name: str, value: int, *, low: int, high: int, why: str | None = None) -> None:
    if not low <= value <= high:
        raise InputError(f"{name} is {value}", why=why if value < low else None, fix=f"give a number from {low} to {high}")


def _check_free(out: Path) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    manifest = out / "manifest.json"
    if out.is_dir() and manifest.is_file():
        content = read_json(manifest)
        if isinstance(content, dict) and content.get("kind") == _KIND:
            return
    raise InputError("the place for the synthetic benchmark is taken by something else", where=str(out), fix="give a new folder")

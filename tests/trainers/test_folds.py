"""Folds: whole documents, nothing twice, nothing lost, and the same split whatever the order of the rows."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.data import make_data, make_records, real_data
from trainers.data.folds import apply_splits, make_folds, split_attack, split_by_document
from trainers.data.records import load_attack_documents, load_forget_retain, load_splits, normalise_whitespace
from trainers.data.subset import subset_attack, subset_documents
from trainers.data.types import FOLDS, AttackDocuments, Document, ForgetRetain, Record
from trainers.errors import InputError

FRACTIONS = {"train": 0.5, "validation": 0.25, "test": 0.25}


def documents(records: Sequence[Record], task: str | None = None) -> set[str]:
    return {record.document for record in records if task in (None, record.task)}


@st.composite
def record_sets(draw: st.DrawFn) -> tuple[Record, ...]:
    """One to three tasks of three to nine documents with one to six rows each, rows in any order."""
    records = [
        Record(id=f"{task}{number}{suffix}", input="in", output="out", task=f"Task{task}")
        for task in range(draw(st.integers(1, 3)))
        for number in range(100, 100 + draw(st.integers(3, 9)))
        for suffix in ("sc1", "qa0", "qa1", "qa2", "qa3", "qa4")[: draw(st.integers(1, 6))]
    ]
    return tuple(draw(st.permutations(records)))


@st.composite
def fold_fractions(draw: st.DrawFn) -> dict[str, float]:
    weights = {fold: draw(st.integers(0, 8)) for fold in FOLDS}
    if not any(weights.values()):
        weights["train"] = 1
    total = sum(weights.values())
    return {fold: weight / total for fold, weight in weights.items()}


@settings(max_examples=60, deadline=None)
@given(records=record_sets(), fractions=fold_fractions(), seed=st.integers(0, 10**6))
def test_a_split_is_a_partition_by_whole_documents(records: tuple[Record, ...], fractions: dict[str, float], seed: int) -> None:
    """Every row is in exactly one fold, no document in two, every wanted fold has every task, and order is kept."""
    folds = split_by_document(records, fractions=fractions, seed=seed)
    assert tuple(folds) == FOLDS
    assert Counter(record.id for fold in folds.values() for record in fold) == Counter(record.id for record in records)
    homes = Counter(document for fold in folds.values() for document in documents(fold))
    assert set(homes.values()) == {1}
    for fold, members in folds.items():
        assert [record for record in records if record in set(members)] == list(members)
        for task in {record.task for record in records}:
            assert bool(documents(members, task)) == (fractions[fold] > 0)


@settings(max_examples=40, deadline=None)
@given(records=record_sets(), seed=st.integers(0, 10**6), shuffle_seed=st.integers(0, 10**6))
def test_the_split_does_not_depend_on_the_order_of_the_rows(records: tuple[Record, ...], seed: int, shuffle_seed: int) -> None:
    shuffled = list(records)
    random.Random(shuffle_seed).shuffle(shuffled)
    expected = split_by_document(records, fractions=FRACTIONS, seed=seed)
    actual = split_by_document(shuffled, fractions=FRACTIONS, seed=seed)
    assert {fold: documents(rows) for fold, rows in actual.items()} == {fold: documents(rows) for fold, rows in expected.items()}


def test_another_seed_gives_another_split_and_the_same_seed_the_same() -> None:
    """Negative control of the invariance above: the split does depend on something."""
    records = make_records(documents_per_task=12)
    splits = {seed: frozenset(documents(split_by_document(records, fractions=FRACTIONS, seed=seed)["test"])) for seed in range(10)}
    assert len(set(splits.values())) == 10
    assert documents(split_by_document(records, fractions=FRACTIONS, seed=3)["test"]) == splits[3]


def test_a_task_is_split_without_regard_to_the_others() -> None:
    """Adding a task moves no document of another."""
    alone = split_by_document(make_records(documents_per_task=9, tasks=["Task2"]), fractions=FRACTIONS, seed=5)
    among = split_by_document(make_records(documents_per_task=9), fractions=FRACTIONS, seed=5)
    for fold in FOLDS:
        assert documents(among[fold], "Task2") == documents(alone[fold])


def test_a_document_in_two_tasks_counts_for_the_first_by_name_in_any_order() -> None:
    """Each document has a Task1 and a Task2 row: all three are documents of Task1, and Task2 has none to be short of."""
    records = [
        Record(id=f"{n}{suffix}", input="in", output="out", task=task)
        for n in "abc"
        for suffix, task in (("sc1", "Task2"), ("qa0", "Task1"))
    ]
    expected = split_by_document(records, fractions=FRACTIONS, seed=0)
    actual = split_by_document(records[::-1], fractions=FRACTIONS, seed=0)
    assert [len(rows) for rows in expected.values()] == [2, 2, 2]
    assert [documents(rows) for rows in actual.values()] == [documents(rows) for rows in expected.values()]
    mixed = [Record(id="zsc1", input="in", output="out", task="Task3"), Record(id="zqa0", input="in", output="out", task="Task1")]
    for rows in (mixed, mixed[::-1]):
        with pytest.raises(InputError, match="Task1 has 1 document, too few"):
            split_by_document(rows, fractions=FRACTIONS, seed=0)


@pytest.mark.parametrize(
    ("number", "fractions", "sizes"),
    [
        (12, (0.5, 0.25, 0.25), (6, 3, 3)),  # exact
        (10, (0.5, 0.25, 0.25), (5, 3, 2)),  # 5, 2.5, 2.5: the remainder goes to the earlier fold
        (10, (0.7, 0.2, 0.1), (7, 2, 1)),  # in floats 0.7 * 10 + 0.2 * 10 + 0.1 * 10 must not lose a document
        (3, (0.9, 0.05, 0.05), (1, 1, 1)),  # 2.7, 0.15, 0.15: each gets one
        (40, (0.98, 0.01, 0.01), (38, 1, 1)),  # 39.2, 0.4, 0.4
        (5, (0.8, 0.0, 0.2), (4, 0, 1)),
        (1, (1.0, 0.0, 0.0), (1, 0, 0)),
    ],
)
def test_fold_sizes_are_rounded_by_largest_remainders(number: int, fractions: Sequence[float], sizes: Sequence[int]) -> None:
    records = make_records(documents_per_task=number, tasks=["Task1"])
    folds = split_by_document(records, fractions=dict(zip(FOLDS, fractions, strict=True)), seed=0)
    assert tuple(len(documents(folds[fold])) for fold in FOLDS) == tuple(sizes)


def test_too_few_documents_name_the_task_and_the_counts() -> None:
    records = make_records(documents_per_task=5, tasks=["Task1"]) + make_records(documents_per_task=2, tasks=["Task2"])
    with pytest.raises(InputError, match=r"Task2 has 2 documents, too few for 3 folds \(train, validation, test\)"):
        split_by_document(records, fractions=FRACTIONS, seed=0)
    with pytest.raises(InputError, match=r"Task2 has 2 documents(.|\n)*where: the retain set"):
        make_folds(ForgetRetain(forget=make_records(prefix="x"), retain=records), splits=None, fractions=FRACTIONS, seed=0)


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ({"train": 0.5, "validation": 0.25, "test": 0.2}, "sum to 0.95, not to 1"),
        ({"train": 1.5, "test": -0.5}, "the fraction of the fold 'train' is 1.5"),
        ({"train": float("nan")}, "the fraction of the fold 'train' is nan"),
        ({"train": 0.5, "dev": 0.5}, "unknown fold 'dev'"),
        ({}, "sum to 0, not to 1"),
    ],
)
def test_fractions_must_be_proportions(fractions: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        split_by_document(make_records(), fractions=fractions, seed=0)


# --- fixed splits ---


def fixed(records: Sequence[Record]) -> dict[str, list[str]]:
    """Documents 0 and 1 train, 2 validation, 3 test, listed backwards."""
    home = {"0": "train", "1": "train", "2": "validation", "3": "test"}
    return {fold: [record.id for record in reversed(records) if home[record.document[-1]] == fold] for fold in FOLDS}


def test_fixed_splits_are_taken_as_they_are() -> None:
    data = make_data()
    splits = {"forget": fixed(data.forget), "retain": fixed(data.retain)}
    folds = make_folds(data, splits=splits, fractions=FRACTIONS, seed=0)
    for fold in FOLDS:
        assert [record.id for record in folds[fold].forget] == splits["forget"][fold][::-1]
    assert make_folds(data, splits=splits, fractions={}, seed=1) == folds
    assert make_folds(data, splits=None, fractions=FRACTIONS, seed=0) != folds


def test_faulty_fixed_splits_name_the_row() -> None:
    records = make_records(tasks=["Task1"])
    good = fixed(records)

    def apply(**changes: list[str]) -> None:
        apply_splits(records, splits=good | changes, set_name="forget")

    apply()
    with pytest.raises(InputError, match=r"leaves the row 'fTask1-2sc1' in no fold \(2 such ids in all\)\n.*the forget set"):
        apply(validation=[])
    with pytest.raises(InputError, match=r"lists the id 'nobody', which is not in the data \(1 such id in all\)"):
        apply(validation=[*good["validation"], "nobody"])
    with pytest.raises(InputError, match=r"the document 'fTask1-3' lies in two folds: 'fTask1-3sc1' in 'test', 'fTask1-3qa0' in 'train'"):
        apply(train=[*good["train"], "fTask1-3qa0"], test=["fTask1-3sc1"])
    with pytest.raises(InputError, match="the id 'fTask1-3sc1' is listed in 'train' and in 'test'"):
        apply(train=[*good["train"], "fTask1-3sc1"])
    with pytest.raises(InputError, match="unknown fold 'other'"):
        apply(other=[])


def test_the_published_folds_of_the_benchmark() -> None:
    """Train 1,112 / 1,136 and validation 254 / 278 rows are the public folds; the rest is test."""
    folder = real_data("lume")
    data = load_forget_retain(folder)
    folds = make_folds(data, splits=load_splits(folder), fractions={}, seed=0)
    assert {fold: (len(part.forget), len(part.retain)) for fold, part in folds.items()} == {
        "train": (1112, 1136),
        "validation": (254, 278),
        "test": (1366, 1320),
    }
    # All 150 members are train documents, so they are halved by the seed.
    halves = split_attack(load_attack_documents(real_data("mia")), folds=folds, seed=0)
    assert [(len(half.members), len(half.nonmembers)) for half in halves.values()] == [(75, 75), (75, 75)]
    seeded = make_folds(data, splits=None, fractions=FRACTIONS, seed=0)
    assert len(documents(seeded["train"].forget, "Task3")) == 187  # 186.5, 93.25, 93.25
    assert len(documents(seeded["test"].forget, "Task2")) == 62  # 125, 62.5, 62.5: the remainder goes to validation


# --- the membership attack ---


def attack_on(data: ForgetRetain, *, num_nonmembers: int = 10) -> AttackDocuments:
    """The Task3 completions as members, their white space changed."""
    members = [record for record in data.forget if record.task == "Task3" and record.id.endswith("sc1")]
    return AttackDocuments(
        members=tuple(Document(id=record.document, text="  " + record.text.replace(" ", "\n")) for record in members),
        nonmembers=tuple(Document(id=f"n{number}", text=f"stranger {number}") for number in range(num_nonmembers)),
    )


def test_members_are_attacked_in_the_fold_that_scores_them() -> None:
    """With 12 documents: 6 train, 3 validation, 3 test; the six train documents go three and three."""
    data = make_data(documents_per_task=12)
    folds = make_folds(data, splits=None, fractions=FRACTIONS, seed=1)
    halves = split_attack(attack_on(data), folds=folds, seed=1)
    assert tuple(halves) == ("validation", "test")
    for fold, other in (("validation", "test"), ("test", "validation")):
        members = {member.id for member in halves[fold].members}
        assert documents(folds[fold].forget, "Task3") <= members
        assert not documents(folds[other].forget, "Task3") & members
        assert len(members) == 6


@pytest.mark.parametrize("documents_per_task", [3, 12])
@pytest.mark.parametrize("num_nonmembers", [2, 7, 30])
def test_the_halves_are_disjoint_and_lose_nothing(documents_per_task: int, num_nonmembers: int) -> None:
    """With 3 documents only one member is scored in each fold, so that the members are halved instead."""
    data = make_data(documents_per_task=documents_per_task)
    attack = attack_on(data, num_nonmembers=num_nonmembers)
    halves = split_attack(attack, folds=make_folds(data, splits=None, fractions=FRACTIONS, seed=0), seed=0)
    for name in ("members", "nonmembers"):
        parts = [getattr(half, name) for half in halves.values()]
        assert all(parts)
        assert Counter(item for part in parts for item in part) == Counter(getattr(attack, name))


def test_nonmembers_are_divided_in_proportion_to_the_members() -> None:
    """2 validation and 8 test members of 10: a fifth of the 30 non-members validates."""
    records = make_records(documents_per_task=10, tasks=["Task3"])
    folds = {
        "train": ForgetRetain(forget=(), retain=()),
        "validation": ForgetRetain(forget=records[:4], retain=()),
        "test": ForgetRetain(forget=records[4:], retain=()),
    }
    halves = split_attack(attack_on(ForgetRetain(records, ()), num_nonmembers=30), folds=folds, seed=0)
    assert {fold: (len(half.members), len(half.nonmembers)) for fold, half in halves.items()} == {"validation": (2, 6), "test": (8, 24)}


def test_the_halves_follow_the_seed_and_not_the_order() -> None:
    data = make_data(documents_per_task=3)
    attack = attack_on(data, num_nonmembers=12)
    folds = make_folds(data, splits=None, fractions=FRACTIONS, seed=0)
    backwards = AttackDocuments(members=attack.members[::-1], nonmembers=attack.nonmembers[::-1])

    def test_half(given: AttackDocuments, seed: int) -> frozenset[Document]:
        return frozenset(split_attack(given, folds=folds, seed=seed)["test"].nonmembers)

    assert test_half(backwards, 0) == test_half(attack, 0)
    assert len({test_half(attack, seed) for seed in range(6)}) > 1


def test_an_attack_of_one_document_cannot_be_halved() -> None:
    data = make_data(documents_per_task=3)
    folds = make_folds(data, splits=None, fractions=FRACTIONS, seed=0)
    with pytest.raises(InputError, match="the membership attack has 1 non-members"):
        split_attack(attack_on(data, num_nonmembers=1), folds=folds, seed=0)


# --- subsets ---


def test_a_subset_keeps_whole_documents_of_every_task() -> None:
    data = make_data(documents_per_task=9)
    part = subset_documents(data, documents_per_task=4, seed=0)
    for records, whole in ((part.forget, data.forget), (part.retain, data.retain)):
        assert {task: len(documents(records, task)) for task in ("Task1", "Task2", "Task3")} == dict.fromkeys(
            ("Task1", "Task2", "Task3"), 4
        )
        assert records == tuple(record for record in whole if record.document in documents(records))
    backwards = ForgetRetain(forget=data.forget[::-1], retain=data.retain[::-1])
    assert documents(subset_documents(backwards, documents_per_task=4, seed=0).forget) == documents(part.forget)
    assert documents(subset_documents(data, documents_per_task=4, seed=1).forget) != documents(part.forget)
    assert subset_documents(data, documents_per_task=99, seed=0) == data
    with pytest.raises(InputError, match="documents_per_task is 0"):
        subset_documents(data, documents_per_task=0, seed=0)


def test_a_subset_prefers_members_so_that_the_attack_survives() -> None:
    """Of 40 biographies 5 are members: without the preference a draw of 4 hits almost none of them."""
    data = make_data(documents_per_task=40)
    everything = attack_on(data)
    attack = AttackDocuments(members=everything.members[:5], nonmembers=everything.nonmembers)
    prefer = frozenset(normalise_whitespace(member.text) for member in attack.members)
    part = subset_documents(data, documents_per_task=4, seed=0, prefer=prefer)
    small = subset_attack(attack, data=part, seed=0)
    assert (len(small.members), len(small.nonmembers)) == (4, min(16, len(everything.nonmembers)))
    assert documents(part.forget, "Task3") == {member.id for member in small.members}
    with pytest.raises(InputError, match=r"only \d members of the membership attack remain(.|\n)*5 members were given"):
        subset_attack(attack, data=subset_documents(data, documents_per_task=4, seed=0), seed=0)


def test_a_subset_of_the_benchmark_can_be_attacked() -> None:
    data, attack = load_forget_retain(real_data("lume")), load_attack_documents(real_data("mia"))
    prefer = frozenset(normalise_whitespace(member.text) for member in attack.members)
    part = subset_documents(data, documents_per_task=12, seed=0, prefer=prefer)
    assert (len(part.forget), len(part.retain)) == (120, 120)  # 12 * (2 + 6 + 2)
    small = subset_attack(attack, data=part, seed=0)
    assert (len(small.members), len(small.nonmembers)) == (12, 48)

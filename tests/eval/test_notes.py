"""What a report tells its reader beside the numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from eval.aggregate import Term
from eval.measure import AttackLosses
from eval.mmlu import Question
from eval.mmlu_accuracy import MmluAnswer, MmluResult
from eval.notes import chance_difference, write_notes

TERMS = [
    Term(f"{name} Task{task} {kind}", 0.5) for name in ("forget", "retain") for task in (1, 2, 3) for kind in ("regurgitation", "knowledge")
]


def rows(documents: int, *, log_prob: float = -1.0) -> list[dict]:
    groups = [(name, task, kind) for name in ("forget", "retain") for task in ("Task1", "Task2", "Task3") for kind in ("sc", "qa")]
    return [
        {"part": "task", "set": name, "task": task, "kind": kind, "id": f"{name}-{task}-{i}{kind}1", "document": f"{name}-{task}-{i}"}
        | {"answer_log_prob": log_prob}
        for name, task, kind in groups
        for i in range(documents)
    ]


def attack(size: int, *, auc: float = 0.5, loss: float = 1.0) -> AttackLosses:
    return AttackLosses(members=[loss] * size, nonmembers=[1.0] * size, auc=auc)


def mmlu(right: int, *, of: int = 100, subject: str = "anatomy", cut: int = 0) -> MmluResult:
    asked = Question(subject, 1, "?", ("a", "b", "c", "d"), "A")
    return MmluResult(tuple(MmluAnswer(asked, "A" if i < right else "B", 4 if i < cut else 5) for i in range(of)))


def notes(**changes) -> list[str]:
    settings = {"terms": TERMS, "rows": rows(100), "attacked": attack(1000), "questions": mmlu(50), "skipped": 0, "altered": []}
    return write_notes(**(settings | changes))


def test_a_large_complete_evaluation_has_only_the_standard_error_to_tell():
    assert notes() == ["The AUC's standard error is 0.013 (Hanley and McNeil)."]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"skipped": 3}, "3 rows are neither completions nor questions"),
        ({"terms": [*TERMS[:-1], Term("retain Task3 knowledge", math.nan)]}, "No rows for retain Task3 knowledge: the task aggregate"),
        ({"terms": TERMS[:4]}, "made of 4 terms instead of the benchmark's 12"),
        ({"rows": rows(100, log_prob=math.nan)}, "1200 rows have a log-probability that is not finite"),
        ({"attacked": None}, "No membership attack was run: there is no AUC, MIA score or final score, and the official"),
        ({"attacked": attack(1000, loss=math.inf)}, "1000 attack documents have no finite loss"),
        ({"questions": None}, "MMLU was not run: there is no final score"),
        ({"questions": mmlu(37)}, "MMLU accuracy is below 0.371"),
        ({"questions": mmlu(50, cut=2)}, "2 MMLU prompts had solved examples dropped"),
        ({"questions": mmlu(50, subject="maps")}, "maps is no subject of MMLU"),
        ({"altered": ["num_beams = 3"]}, "(num_beams = 3): each row was decoded alone"),
        ({"rows": rows(29)}, "Few documents: the smallest term (forget Task1, questions) rests on 29, so that a single document moves it"),
        ({"attacked": attack(150)}, "Few attack documents: with 150 members and 150 non-members"),
    ],
)  # fmt: skip
def test_each_remark_is_made_when_it_holds_and_only_then(changes, says):
    assert sum(says in note for note in notes(**changes)) == 1
    assert not any(says in note for note in notes())


def test_the_noise_of_the_benchmarks_150_documents_is_given_in_numbers():
    """Standard error 0.0334 of one AUC; two of them differ by 1.96 * sqrt(2) * 0.0334 = 0.0925 by chance, MIA scores by 0.185."""
    (note,) = [note for note in notes(attacked=attack(150)) if note.startswith("Few attack documents")]
    assert chance_difference(num_members=150, num_nonmembers=150) == pytest.approx(0.09255, abs=1e-5)
    for number in ("0.093 in AUC", "0.185 in MIA score", "0.27 in MIA score"):
        assert number in note


def test_two_blind_attacks_exceed_the_chance_difference_in_one_of_twenty_cases():
    """2,000 pairs of attacks on pure noise: 5 % +- 1 % (two standard errors)."""
    rng = np.random.default_rng(0)
    aucs = (rng.random((4000, 40, 1)) < rng.random((4000, 1, 60))).mean((1, 2))
    exceeded = np.abs(aucs[::2] - aucs[1::2]) > chance_difference(num_members=40, num_nonmembers=60)
    assert 0.03 < exceeded.mean() < 0.07


def test_the_smallest_group_of_documents_is_named():
    """Seven retain documents of Task2 have a completion, 100 have a question."""
    group = [row for row in rows(100) if (row["set"], row["task"], row["kind"]) == ("retain", "Task2", "sc")]
    few = [row for row in rows(100) if row not in group[7:]]
    (note,) = [note for note in notes(rows=few) if note.startswith("Few documents")]
    assert "(retain Task2, completions) rests on 7, so that a single document moves it by up to 0.14" in note

"""How much better one model is by the search's objective: the difference itself, and an interval that knows what both share."""

from __future__ import annotations

import random
from typing import Any

import pytest

from eval.bootstrap import paired_difference, point_scores
from eval.report import EvalReport
from merging.config import ObjectiveWeights
from merging.gain import objective_gain


def report(*, quality: float, seed: int = 0, documents: int = 12, strangers: int = 12, mmlu: bool = True) -> EvalReport:
    """Rows of two tasks in both sets, an attack and questions; a larger quality retains more, and documents differ in difficulty."""
    chance = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for part in ("forget", "retain"):
        for number in range(documents):
            hard = chance.random() * 0.5
            for kind in ("sc", "qa"):
                value = 0.2 + 0.3 * hard if part == "forget" else quality - 0.3 * hard
                place = {
                    "set": part,
                    "id": f"{part}{number}{kind}",
                    "document": f"{part}{number}",
                    "task": f"Task{number % 2}",
                    "kind": kind,
                }
                scores = {"score": value, "answer_log_prob": -1.0, "num_tokens": 4, "token_accuracy": 0.5, "output": "a few words"}
                rows.append({"part": "task", **place, **scores})
    for number in range(strangers):
        rows.append({"part": "member", "id": f"m{number}", "document": f"m{number}", "loss": chance.gauss(2.0, 1.0)})
        rows.append({"part": "nonmember", "id": f"n{number}", "document": f"n{number}", "loss": chance.gauss(2.0, 1.0)})
    for number in range(10 if mmlu else 0):
        rows.append({"part": "mmlu", "id": f"q{number}", "document": f"q{number}", "correct": number % 3 > 0})
    scores = {name: None if value != value else value for name, value in point_scores(rows).items()}
    facts: dict[str, Any] = {"official": {}, "intervals": {}, "counts": {}, "terms": [], "deviations": [], "notes": [], "config": {}}
    return EvalReport(fold="validation", model=f"quality {quality}", scores=scores, seconds=0.0, rows=rows, **facts)


def test_equal_weights_are_the_paired_difference_of_the_final_score() -> None:
    """The same draws and the same quantiles as ``paired_difference``, to the digit."""
    a, b = report(quality=0.9), report(quality=0.7)
    gain = objective_gain(a, b, weights=ObjectiveWeights())
    assert gain == pytest.approx(paired_difference(a, b)["final_score"], abs=1e-12)


def test_weights_choose_what_counts() -> None:
    a, b = report(quality=0.9), report(quality=0.7)
    only = objective_gain(a, b, weights=ObjectiveWeights(mia_score=0, mmlu_average=0))
    assert only == pytest.approx(paired_difference(a, b)["task_aggregate"], abs=1e-12)
    twice = objective_gain(a, b, weights=ObjectiveWeights(task_aggregate=2, mia_score=0, mmlu_average=0))
    assert twice == pytest.approx(only)


def test_what_both_share_cancels() -> None:
    """Both have the same documents and losses, so the interval of a small gain is clear of 0; against other documents there is none."""
    a, b = report(quality=0.80), report(quality=0.78)
    gain = objective_gain(a, b, weights=ObjectiveWeights())
    assert gain is not None
    assert 0 < gain["low"] < gain["difference"] < gain["high"]
    assert objective_gain(a, report(quality=0.78, documents=11), weights=ObjectiveWeights()) is None
    same = objective_gain(a, a, weights=ObjectiveWeights())
    assert same == {"difference": 0.0, "low": 0.0, "high": 0.0}


def test_swapping_turns_the_sign() -> None:
    a, b = report(quality=0.9), report(quality=0.7)
    forth, back = (objective_gain(*pair, weights=ObjectiveWeights()) for pair in ((a, b), (b, a)))
    assert forth is not None
    assert back is not None
    assert back["difference"] == pytest.approx(-forth["difference"])
    assert (back["low"], back["high"]) == (pytest.approx(-forth["high"], abs=1e-9), pytest.approx(-forth["low"], abs=1e-9))


def test_a_part_that_one_lacks_is_left_out() -> None:
    a, b = report(quality=0.9, mmlu=False), report(quality=0.7, mmlu=False)
    gain = objective_gain(a, b, weights=ObjectiveWeights())
    both = objective_gain(a, b, weights=ObjectiveWeights(mmlu_average=0))
    assert gain == both
    assert gain is not None


def test_more_confidence_is_a_wider_interval() -> None:
    a, b = report(quality=0.9), report(quality=0.7)
    narrow, wide = (objective_gain(a, b, weights=ObjectiveWeights(), confidence=share) for share in (0.5, 0.99))
    assert narrow is not None
    assert wide is not None
    assert wide["low"] <= narrow["low"] <= narrow["high"] <= wide["high"]
    assert wide["high"] - wide["low"] > narrow["high"] - narrow["low"]

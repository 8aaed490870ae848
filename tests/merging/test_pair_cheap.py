"""What forward passes say about a model, worked by hand."""

from __future__ import annotations

import math

import pytest

from merging.cheap import CheapScores, RecallFit, fit_recall, harmonic, summarise
from merging.examples import Example
from trainers.data.types import Kind

RECALL = RecallFit(constant=0.0, accuracy=0.5, matched=0.5)


def row(part: str, kind: Kind, number: int, *, task: str = "Task1") -> Example:
    return Example(f"{part}{kind}{number}", part, task, kind)


def test_scores_by_hand() -> None:
    """Forget: a question of 4 tokens answered with all of them (value 1), a completion with 8 of 10 right, 6 of them at the start:
    0.5 * 0.8 + 0.5 * 0.6 = 0.7. Token accuracy 12 / 14, log-probability -7 / 14.
    Retain: a question with 1 of 2 tokens right (value 0), a completion with all 5 (value 1).
    Each term is (sum + 0.25) / 1.5: forget completion 1 - 0.95 / 1.5, question 1 - 1.25 / 1.5; retain 1.25 / 1.5 and 0.25 / 1.5.
    Forgetting 1 - (0.7 + 1) / 2 = 0.15, retention (1 + 0) / 2 = 0.5.
    Members 1.0 and 3.0 against strangers 2.0 and 2.5: the first wins twice, the second never: AUC 0.5. MMLU 1 of 2.
    """
    examples = [
        row("forget", Kind.QUESTION, 0),
        row("forget", Kind.COMPLETION, 0),
        row("retain", Kind.QUESTION, 0),
        row("retain", Kind.COMPLETION, 0),
        *(Example(f"m{number}", "member") for number in range(2)),
        *(Example(f"n{number}", "nonmember") for number in range(2)),
        Example("q0", "mmlu"),
        Example("q1", "mmlu"),
    ]
    results = [[-2.0, 4, 4, 4], [-5.0, 10, 8, 6], [-1.0, 2, 1, 0], [0.0, 5, 5, 5], [1.0], [3.0], [2.0], [2.5], [1.0], [0.0]]
    scores = summarise(examples, results=results, recall=RECALL)
    assert scores.forget_token_accuracy == pytest.approx(12 / 14)
    assert scores.forget_answer_log_prob == pytest.approx(-0.5)
    assert scores.retain_token_accuracy == pytest.approx(6 / 7)
    assert scores.terms == pytest.approx((1 - 0.95 / 1.5, 1 - 1.25 / 1.5, 1.25 / 1.5, 0.25 / 1.5))
    assert scores.task_aggregate == pytest.approx(4 / sum(1 / term for term in scores.terms))
    assert (scores.forgetting, scores.retention) == (pytest.approx(0.15), pytest.approx(0.5))
    assert (scores.mia_auc, scores.mia_score, scores.mmlu_average, scores.num_examples) == (0.5, 1.0, 0.5, 10)
    assert scores.is_finite


def test_nothing_measured_is_not_a_number() -> None:
    scores = summarise([row("forget", Kind.QUESTION, 0)], results=[[-1.0, 2, 2, 2]], recall=RECALL)
    assert math.isnan(scores.mia_auc)
    assert math.isnan(scores.retain_token_accuracy)
    assert scores.mmlu_average is None
    assert scores.retention is None
    assert not scores.is_finite


def test_one_loss_that_is_not_finite_spoils_the_attack() -> None:
    examples = [Example("m", "member"), Example("n", "nonmember"), row("forget", Kind.QUESTION, 0), row("retain", Kind.QUESTION, 0)]
    rows = [[-1.0, 2, 2, 2], [-1.0, 2, 2, 2]]
    assert summarise(examples, results=[[1.0], [2.0], *rows], recall=RECALL).is_finite
    assert not summarise(examples, results=[[1.0], [math.inf], *rows], recall=RECALL).is_finite
    assert not summarise(examples, results=[[math.nan], [2.0], *rows], recall=RECALL).is_finite


def test_terms_come_in_the_order_of_the_benchmark() -> None:
    """Per task completion then question, forget before retain; a worse forget question lowers the second term only."""
    examples = [
        row(part, kind, 0, task=task) for part in ("forget", "retain") for task in ("Task2", "Task1") for kind in Kind if kind != Kind.OTHER
    ]
    good = [[0.0, 2, 0, 0] if example.part == "forget" else [0.0, 2, 2, 2] for example in examples]
    before = summarise(examples, results=good, recall=RECALL).terms
    worse = [
        [0.0, 2, 2, 2] if (e.part, e.task, e.kind) == ("forget", "Task1", Kind.QUESTION) else r for e, r in zip(examples, good, strict=True)
    ]
    after = summarise(examples, results=worse, recall=RECALL).terms
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False] + [True] * 6


def test_the_recall_of_completions_is_fitted_where_there_are_enough() -> None:
    """Rows on the plane 0.1 + 0.2 * accuracy + 0.6 * matched give it back; questions and rows without tokens do not count."""
    rows = [
        {"part": "task", "kind": "sc", "token_accuracy": a / 10, "matched_fraction": m / 10, "score": 0.1 + 0.02 * a + 0.06 * m}
        for a in range(10)
        for m in range(0, a + 1, 2)
    ]
    noise = [{"part": "task", "kind": "qa", "token_accuracy": 1.0, "matched_fraction": 1.0, "score": 0.0}, {"part": "member", "loss": 1.0}]
    empty = [{"part": "task", "kind": "sc", "token_accuracy": None, "matched_fraction": None, "score": 0.0}]
    assert len(rows) >= 30
    fit = fit_recall([*noise, *empty, *rows])
    assert (fit.constant, fit.accuracy, fit.matched) == (pytest.approx(0.1), pytest.approx(0.2), pytest.approx(0.6))
    assert fit_recall(rows[:29]) == RecallFit()
    assert fit.recall(accuracy=2.0, matched=2.0) == 1.0
    assert RecallFit(constant=-1.0).recall(accuracy=0.5, matched=0.5) == 0.0


def test_missing_scores_of_a_report_are_not_numbers() -> None:
    scores = CheapScores.from_scores({"forget_token_accuracy": 0.5, "retain_token_accuracy": 0.5, "mia_auc": None, "mia_score": 0.1})
    assert not scores.is_finite
    assert scores.task_aggregate is None


def test_a_harmonic_mean_with_a_zero_is_zero() -> None:
    assert harmonic([1.0, 0.0]) == 0.0
    assert harmonic([1.0, 0.5]) == pytest.approx(2 / 3)

"""Verdicts: untouched, under-forgetting, balanced, over-forgetting, dead."""

from __future__ import annotations

import pytest

from eval.forgetting import Verdict, VerdictThresholds, alive, classify, rank_key

BASELINE = {
    "mia_auc": 0.98,
    "forgetting": 0.05,
    "retention": 0.9,
    "mmlu_average": 0.48,
    "degenerate_rate": 0.0,
    "forget_answer_log_prob": -0.1,
    "retain_answer_log_prob": -0.1,
}


def verdict(**changes):
    return classify(scores={**BASELINE, **changes}, baseline=BASELINE).verdict


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Verdict.UNTOUCHED),
        ({"forgetting": 0.09, "mia_auc": 0.97}, Verdict.UNTOUCHED),
        ({"forgetting": 0.2}, Verdict.UNDER_FORGETTING),
        ({"mia_auc": 0.9}, Verdict.UNDER_FORGETTING),
        ({"forgetting": 0.6, "mia_auc": 0.551}, Verdict.UNDER_FORGETTING),
        ({"forgetting": 0.6, "mia_auc": 0.549}, Verdict.BALANCED),
        ({"forgetting": 0.6, "mia_auc": 0.451}, Verdict.BALANCED),
        ({"forgetting": 0.6, "mia_auc": 0.449}, Verdict.OVER_FORGETTING),
        ({"forgetting": 0.6, "mia_auc": 0.3, "retention": 0.226}, Verdict.OVER_FORGETTING),
        ({"forgetting": 0.6, "mia_auc": 0.3, "retention": 0.224}, Verdict.DEAD),
        ({"forgetting": 0.6, "mia_auc": 0.3, "mmlu_average": 0.25}, Verdict.OVER_FORGETTING),
        ({"forgetting": 0.6, "mia_auc": 0.3, "mmlu_average": 0.25, "retention": 0.44}, Verdict.DEAD),
        ({"forgetting": 0.6, "mia_auc": 0.5, "degenerate_rate": 0.6}, Verdict.DEAD),
        ({"retain_answer_log_prob": None}, Verdict.DEAD),
        ({"forget_answer_log_prob": float("nan")}, Verdict.DEAD),
        ({"mia_auc": None}, Verdict.UNTOUCHED),
        ({"mia_auc": None, "forgetting": 0.3}, Verdict.UNDER_FORGETTING),
        ({"mia_auc": None, "forgetting": 0.7}, Verdict.BALANCED),
        ({"mia_auc": None, "forgetting": 0.7, "retention": 0.5}, Verdict.OVER_FORGETTING),
    ],
)
def test_classification(changes, expected):
    """Relative limits: 0.25 x 0.9 = 0.225, 0.5 x 0.9 = 0.45, 0.6 x 0.9 = 0.54, 0.75 x 0.48 = 0.36."""
    assert verdict(**changes) is expected


def test_the_thresholds_are_used():
    scores = {**BASELINE, "forgetting": 0.6, "mia_auc": 0.6}
    assert classify(scores=scores, baseline=BASELINE, thresholds=VerdictThresholds(balanced_halfwidth=0.1)).verdict is Verdict.BALANCED


def test_a_judgement_says_why():
    judgement = classify(scores={**BASELINE, "forgetting": 0.6, "mia_auc": 0.2}, baseline=BASELINE)
    assert any("0.200" in reason for reason in judgement.reasons)


def test_a_dead_model_never_ranks_above_a_live_one():
    """A destroyed model gets a MIA score near 1 and a final score near 0.4, more than most honest ones."""
    dead = {"final_score": 0.42, "forgetting": 1.0, "retention": 0.0}
    weak = {"final_score": 0.17, "forgetting": 0.1, "retention": 0.9}
    keys = {name: rank_key(verdict=name, scores=dead if name is Verdict.DEAD else weak) for name in Verdict}
    assert min(keys, key=keys.__getitem__) is Verdict.DEAD
    assert not alive(Verdict.DEAD)
    assert rank_key(verdict="balanced", scores={}) > rank_key(verdict="dead", scores={"final_score": 1.0})
    assert rank_key(verdict="balanced", scores=dead) > rank_key(verdict="balanced", scores=weak), "the living rank by final score"


def test_without_a_final_score_its_measured_parts_rank():
    better = {"final_score": None, "task_aggregate": 0.4, "mia_score": 0.9}
    worse = {"final_score": None, "task_aggregate": 0.4, "mia_score": 0.2}
    assert rank_key(verdict="balanced", scores=better) > rank_key(verdict="balanced", scores=worse)


def test_where_the_task_aggregate_is_zero_for_everybody_forgetting_and_retention_decide():
    """Harmonic means: 2 * 0.5 * 0.8 / 1.3 = 0.615 against 2 * 0.9 * 0.1 / 1.0 = 0.18."""
    even = {"final_score": 0.3, "forgetting": 0.5, "retention": 0.8}
    lopsided = {"final_score": 0.3, "forgetting": 0.9, "retention": 0.1}
    assert rank_key(verdict="balanced", scores=even) > rank_key(verdict="balanced", scores=lopsided)

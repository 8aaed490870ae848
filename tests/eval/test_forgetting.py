"""Verdicts: untouched, under-forgetting, balanced, over-forgetting, dead."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.forgetting import Verdict, VerdictThresholds, alive, classify, rank_key
from eval.report import SCORE_NAMES

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


ANY_SCORES = st.dictionaries(
    st.sampled_from(SCORE_NAMES), st.none() | st.floats(0, 1) | st.sampled_from([float("nan"), float("inf"), -float("inf"), -9.5])
)
LIVING = st.sampled_from([verdict for verdict in Verdict if verdict is not Verdict.DEAD])


@given(LIVING, ANY_SCORES, ANY_SCORES)
def test_no_scores_lift_a_dead_model_above_a_live_one(verdict, live, dead):
    """Missing scores, NaN and infinity among them."""
    assert rank_key(verdict=verdict, scores=live) > rank_key(verdict=Verdict.DEAD, scores=dead)
    assert rank_key(verdict=str(verdict), scores=live) == rank_key(verdict=verdict, scores=dict(live))


@given(st.lists(st.tuples(st.sampled_from(Verdict), ANY_SCORES), max_size=8))
def test_sorting_by_the_key_puts_all_dead_models_last(models):
    ranked = sorted(models, key=lambda model: rank_key(verdict=model[0], scores=model[1]), reverse=True)
    flags = [alive(verdict) for verdict, _ in ranked]
    assert flags == sorted(flags, reverse=True)


@given(ANY_SCORES, ANY_SCORES)
def test_every_model_gets_one_verdict_with_reasons(scores, baseline):
    judgement = classify(scores=scores, baseline=baseline)
    assert judgement.verdict in Verdict
    assert judgement.reasons
    assert all(isinstance(reason, str) and reason for reason in judgement.reasons)


@given(ANY_SCORES)
def test_lost_retention_is_death_whatever_else_a_model_scores(scores):
    """0.25 x 0.9 = 0.225."""
    assert classify(scores={**scores, "retention": 0.2}, baseline=BASELINE).verdict is Verdict.DEAD


@given(ANY_SCORES)
def test_loops_are_death_whatever_else_a_model_scores(scores):
    assert classify(scores={**scores, "degenerate_rate": 0.51}, baseline=BASELINE).verdict is Verdict.DEAD


WITHOUT_ATTACK = {"mia_auc": None, "forgetting": 0.7, "retention": 0.5}
EVERY_THRESHOLD = [
    ("untouched_forgetting", {"forgetting": 0.2}, 0.1, 0.2),
    ("untouched_auc", {"mia_auc": 0.9}, 0.05, 0.1),
    ("balanced_halfwidth", {"forgetting": 0.6, "mia_auc": 0.6}, 0.05, 0.2),
    ("dead_retention", {"retention": 0.5, "mia_auc": 0.4}, 0.5, 0.6),
    ("dead_mmlu", {"mmlu_average": 0.24, "retention": 0.4, "mia_auc": 0.4}, 0.4, 0.6),
    ("dead_mmlu_retention", {"mmlu_average": 0.2, "retention": 0.4, "mia_auc": 0.4}, 0.4, 0.6),
    ("dead_degenerate_rate", {"degenerate_rate": 0.4, "mia_auc": 0.4}, 0.5, 0.3),
    ("over_retention", WITHOUT_ATTACK, 0.5, 0.6),
    ("under_forgetting", {"mia_auc": None, "forgetting": 0.4}, 0.3, 0.5),
]


@pytest.mark.parametrize(("name", "changes", "value", "other"), EVERY_THRESHOLD)
def test_every_threshold_decides_something(name, changes, value, other):
    """The same scores, two values of one threshold, two verdicts."""
    first, second = (
        classify(scores={**BASELINE, **changes}, baseline=BASELINE, thresholds=VerdictThresholds(**{name: limit})).verdict
        for limit in (value, other)
    )
    assert first is not second


def test_the_table_of_thresholds_is_complete():
    assert {name for name, *_ in EVERY_THRESHOLD} == set(VerdictThresholds.model_fields)

"""What a search climbs, and which side of the pair a trial stands on."""

from __future__ import annotations

import math

import pytest

from launcher.search.surrogates import MOST_NATS, Side, Surrogates, side_of, surrogates_of

BASELINE = {"retain_token_accuracy": 0.9}


def signals(forget: float, retain: float, **more: float) -> dict[str, float]:
    return {"forget_answer_log_prob": forget, "retain_answer_log_prob": retain, **more}


def test_less_likely_forget_answers_and_likelier_retain_answers_are_better() -> None:
    before, after = surrogates_of(signals(-0.1, -0.5)), surrogates_of(signals(-2.0, -0.2))
    assert before == Surrogates(forgetting=0.1, retention=-0.5)
    assert after is not None
    assert before is not None
    assert after.beats(before)
    assert not before.beats(after)


def test_a_destroyed_model_forgets_no_more_than_one_that_has_forgotten() -> None:
    """Both ends are clipped, so that a model that gives every token e^-50 is not a tenfold success."""
    assert surrogates_of(signals(-50.0, -60.0)) == Surrogates(forgetting=MOST_NATS, retention=-MOST_NATS)


@pytest.mark.parametrize("value", [math.nan, -math.inf, None])
def test_what_was_not_measured_is_no_surrogate(value: float | None) -> None:
    assert surrogates_of({"forget_answer_log_prob": -1.0, "retain_answer_log_prob": value}) is None
    assert surrogates_of({"retain_answer_log_prob": -1.0}) is None


def test_equal_in_one_is_not_beaten() -> None:
    assert not Surrogates(2.0, -1.0).beats(Surrogates(1.0, -1.0))


@pytest.mark.parametrize(("auc", "side"), [(0.3, Side.OVER), (0.4999, Side.OVER), (0.5, Side.UNDER), (0.9, Side.UNDER)])
def test_the_attack_tells_the_side(auc: float, side: Side) -> None:
    """Even where everything retained is lost, or nothing."""
    assert side_of({"mia_auc": auc, "retain_token_accuracy": 0.0}, baseline=BASELINE) is side
    assert side_of({"mia_auc": auc, "retain_token_accuracy": 0.9}, baseline=BASELINE) is side


@pytest.mark.parametrize(("accuracy", "side"), [(0.53, Side.OVER), (0.55, Side.UNDER)])
def test_without_an_attack_lost_retention_tells_it(accuracy: float, side: Side) -> None:
    """0.6 of the baseline's 0.9 is 0.54."""
    assert side_of({"retain_token_accuracy": accuracy}, baseline=BASELINE) is side


def test_without_any_measure_a_trial_counts_as_under_forgetting() -> None:
    assert side_of({}, baseline={}) is Side.UNDER

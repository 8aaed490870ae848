"""Which trials may be paired, in which order, and how the scale is searched."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merging.calibration import next_scale, reachable_auc
from merging.config import PairConfig
from merging.pairs import (
    Candidate,
    CheapScores,
    bracketing_pairs,
    cheap_objective,
    failed_cheap_gate,
    failed_gate,
    predict,
    sides_of,
    smoothed_harmonic_mean,
)


def candidate(name: str, *, auc: float | None, verdict: str = "under-forgetting", terms: tuple[float, ...] = (0.5, 0.5)) -> Candidate:
    return Candidate(name=name, checkpoint=Path(name), scores={"mia_auc": auc}, verdict=verdict, terms=terms, content_hash=name)


def test_a_pair_has_one_trial_on_each_side_of_one_half():
    pairs = bracketing_pairs([candidate("o1", auc=0.1), candidate("o2", auc=0.49), candidate("u1", auc=0.5), candidate("u2", auc=0.9)])
    assert {pair.trials for pair in pairs} == {("o1", "u1"), ("o1", "u2"), ("o2", "u1"), ("o2", "u2")}


def test_dead_and_untouched_trials_are_excluded_with_a_reason():
    sides = sides_of(
        [
            candidate("dead", auc=0.1, verdict="dead"),
            candidate("still", auc=0.99, verdict="untouched"),
            candidate("blind", auc=None),
            candidate("nan", auc=math.nan),
        ]
    )
    assert set(sides.excluded) == {"dead", "still", "blind", "nan"}
    assert "utility" in sides.excluded["dead"]
    assert "AUC" in sides.excluded["blind"]
    assert sides.reason == "none of the 4 trials is alive with a membership AUC"


def test_a_balanced_trial_stands_on_either_side_and_is_paired_once_with_another():
    pairs = bracketing_pairs(
        [
            candidate("o", auc=0.2),
            candidate("b", auc=0.48, verdict="balanced"),
            candidate("c", auc=0.52, verdict="balanced"),
            candidate("u", auc=0.9),
        ]
    )
    assert {pair.trials for pair in pairs} == {("o", "b"), ("o", "c"), ("o", "u"), ("b", "c"), ("b", "u"), ("c", "u")}


@pytest.mark.parametrize(
    ("candidates", "reason"),
    [
        ([], "no trial finished"),
        ([candidate("u", auc=0.9)], "no live trial over-forgets"),
        ([candidate("o", auc=0.1)], "no live trial under-forgets"),
        ([candidate("b", auc=0.5, verdict="balanced")], "only one live trial, b"),
    ],
)
def test_an_empty_side_is_explained(candidates, reason):
    assert bracketing_pairs(candidates) == []
    assert reason in (sides_of(candidates).reason or "")


def test_the_prediction_by_hand():
    """Terms (1, 0) and (0, 1) average to (0.5, 0.5): harmonic mean 0.501. AUCs 0.2 and 0.7 average to 0.45: 1 - 2 * 0.05 = 0.9."""
    prediction = predict(candidate("o", auc=0.2, terms=(1.0, 0.0)), candidate("u", auc=0.7, terms=(0.0, 1.0)))
    assert prediction.task_aggregate == pytest.approx(0.501)
    assert prediction.score == pytest.approx((0.501 + 0.9) / 2)


def test_complementary_parents_come_before_parents_that_lost_the_same_term():
    complementary = predict(candidate("o", auc=0.3, terms=(1.0, 0.0)), candidate("u", auc=0.7, terms=(0.0, 1.0)))
    alike = predict(candidate("o", auc=0.3, terms=(1.0, 0.0)), candidate("u", auc=0.7, terms=(1.0, 0.0)))
    assert complementary.score > alike.score


def test_pairs_come_best_first_and_are_limited():
    names = {"good": (0.9, 0.9), "bad": (0.1, 0.1), "middle": (0.5, 0.5)}
    trials = [candidate("u", auc=0.7, terms=(0.9, 0.9)), *(candidate(name, auc=0.3, terms=terms) for name, terms in names.items())]
    assert [pair.over.name for pair in bracketing_pairs(trials)] == ["good", "middle", "bad"]
    assert len(bracketing_pairs(trials, limit=2)) == 2


def test_without_terms_the_prediction_reads_the_flat_scores_upwards():
    """Forget scores count inverted: 1 - (0.2 + 0.4) / 2 = 0.7, retain as they are: 0.7."""
    over = Candidate("o", Path("o"), {"mia_auc": 0.5, "forget_knowledge": 0.2, "retain_knowledge": 0.6}, "balanced")
    under = Candidate("u", Path("u"), {"mia_auc": 0.5, "forget_knowledge": 0.4, "retain_knowledge": 0.8}, "balanced")
    assert predict(over, under).task_aggregate == pytest.approx(0.701)


def test_one_zero_term_does_not_hide_the_others():
    assert smoothed_harmonic_mean([0.0, 0.9, 0.9]) > smoothed_harmonic_mean([0.0, 0.1, 0.1]) > 0
    assert smoothed_harmonic_mean([]) == 0


def _cheap(**changes) -> CheapScores:
    return CheapScores(**({"forget_token_accuracy": 0.4, "retain_token_accuracy": 0.7, "mia_auc": 0.6, "mia_score": 0.8} | changes))


def test_the_cheap_objective_by_hand():
    """(1 - 0.4 + 0.7 + 0.8) / 3 = 0.7."""
    assert cheap_objective(_cheap()) == pytest.approx(0.7)


def test_missing_scores_are_not_numbers():
    scores = CheapScores.from_scores({"forget_token_accuracy": 0.5, "retain_token_accuracy": 0.5, "mia_auc": None, "mia_score": 0.1})
    assert not scores.is_finite
    assert _cheap().is_finite


def test_gates_are_fractions_of_the_baseline():
    config = PairConfig(min_mmlu_fraction=0.75, min_retention_fraction=0.5)
    baseline = {"mmlu_average": 0.4, "retention": 0.8, "retain_token_accuracy": 0.9}
    assert failed_gate({"mmlu_average": 0.31, "retention": 0.41}, baseline=baseline, config=config) is None
    assert "mmlu_average = 0.290" in (failed_gate({"mmlu_average": 0.29, "retention": 0.4}, baseline=baseline, config=config) or "")
    assert "retention" in (failed_gate({"retention": 0.39}, baseline=baseline, config=config) or "")
    assert "dead" in (failed_gate({"degenerate_rate": 0.9, "retention": 0.8}, baseline=baseline, config=config) or "")
    assert failed_cheap_gate(_cheap(), baseline=baseline, config=config) is None
    assert failed_cheap_gate(_cheap(retain_token_accuracy=0.44), baseline=baseline, config=config) is not None


def _calibrate(curve, *, steps: int, bounds=(0.5, 1.5), tolerance=0.01) -> dict[float, float]:
    samples = {0.0: curve(0.0), 1.0: curve(1.0)}
    for _ in range(steps):
        scale = next_scale(auc_at=samples, bounds=bounds, tolerance=tolerance)
        if scale is None:
            break
        assert bounds[0] <= scale <= bounds[1]
        assert scale not in samples
        samples[scale] = curve(scale)
    return samples


@given(st.floats(0.55, 1.45), st.floats(0.5, 8.0))
@settings(max_examples=200, deadline=None)
def test_the_scale_of_a_falling_curve_is_found_in_four_steps(root, steepness):
    """A logistic curve through 0.5 at ``root``: after four measurements the best AUC is within 0.03 of one half."""
    samples = _calibrate(lambda scale: 1 / (1 + math.exp(steepness * (scale - root))), steps=4)
    assert min(abs(auc - 0.5) for scale, auc in samples.items() if scale) < 0.03


def test_a_straight_line_is_found_in_one_step():
    samples = _calibrate(lambda scale: 0.9 - 0.5 * scale, steps=4)
    assert len(samples) == 3
    assert samples[0.8] == pytest.approx(0.5)


@pytest.mark.parametrize(("level", "bound"), [(0.9, 1.5), (0.1, 0.5)])
def test_a_curve_that_never_meets_one_half_ends_at_the_bound(level, bound):
    samples = _calibrate(lambda scale: level - 0.01 * scale, steps=10)
    assert bound in samples
    assert len(samples) <= 5


def test_a_measurement_near_one_half_ends_the_search():
    assert next_scale(auc_at={0.0: 0.9, 1.0: 0.505}, bounds=(0.5, 1.5), tolerance=0.01) is None
    assert next_scale(auc_at={0.0: 0.9, 1.0: 0.55}, bounds=(0.5, 1.5), tolerance=0.01) is not None


def test_the_reachable_auc_is_cut_at_the_bounds():
    """From 1.0 through 0.8 at scale 1 the line has 0.7 at the bound 1.5; through 0.4 it meets 0.5 inside."""
    assert reachable_auc(baseline_auc=1.0, auc=0.8, bounds=(0.5, 1.5)) == pytest.approx(0.7)
    assert reachable_auc(baseline_auc=1.0, auc=0.4, bounds=(0.5, 1.5)) == pytest.approx(0.5)
    assert reachable_auc(baseline_auc=None, auc=0.8, bounds=(0.5, 1.5)) == 0.8

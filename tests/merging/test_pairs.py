"""Which trials may be paired, in which order, and how the scale is searched."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merging.calibration import height, next_scale
from merging.cheap import CheapScores
from merging.config import MergeConfig, ObjectiveWeights, PairConfig
from merging.pairs import (
    Candidate,
    bracketing_pairs,
    cheap_candidate,
    cheap_objective,
    failed_cheap_gate,
    failed_gate,
    merge_config,
    objective_value,
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
    assert sides.reason == "none of the 4 checkpoints is alive with a membership AUC"


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
        ([candidate("u", auc=0.9)], "no live checkpoint over-forgets"),
        ([candidate("o", auc=0.1)], "no live checkpoint under-forgets"),
        ([candidate("b", auc=0.5, verdict="balanced")], "only one live checkpoint, b"),
    ],
)
def test_an_empty_side_is_explained(candidates, reason):
    assert bracketing_pairs(candidates) == []
    assert reason in (sides_of(candidates).reason or "")


def test_the_prediction_by_hand():
    """AUCs 0.2 and 0.7: the line meets 0.5 at a share of (0.7 - 0.5) / (0.7 - 0.2) = 0.4 for the over-forgetting one. Terms (1, 0)
    and (0, 1) mix to (0.4, 0.6) there: harmonic mean of 0.401 and 0.601. The AUC is 0.5, so the membership score is 1."""
    prediction = predict(candidate("o", auc=0.2, terms=(1.0, 0.0)), candidate("u", auc=0.7, terms=(0.0, 1.0)))
    assert prediction.share == 0.4
    assert prediction.mia_auc == pytest.approx(0.5)
    assert prediction.task_aggregate == pytest.approx(2 / (1 / 0.401 + 1 / 0.601))
    assert prediction.score == pytest.approx((prediction.task_aggregate + 1) / 2)


def test_a_share_stays_a_merge():
    """AUCs 0.49 and 1.0 meet 0.5 at a share of 0.98, which is hardly a merge: 0.9 is the most, and the AUC there 0.541."""
    prediction = predict(candidate("o", auc=0.49), candidate("u", auc=1.0))
    assert (prediction.share, prediction.mia_auc) == (0.9, pytest.approx(0.541))
    both_under = predict(candidate("o", auc=0.52, verdict="balanced"), candidate("u", auc=0.52, verdict="balanced"))
    assert both_under.share == 0.5


def test_estimated_terms_are_compared_with_estimated_ones():
    """A full evaluation's terms are left aside where both have estimates, whose errors are alike."""
    cheap = _cheap(terms=(0.5, 0.5))
    over = Candidate("o", Path("o"), {"mia_auc": 0.4}, "over-forgetting", terms=(0.9, 0.9), cheap=cheap)
    under = Candidate("u", Path("u"), {"mia_auc": 0.6}, "under-forgetting", terms=(0.5, 0.5), cheap=cheap)
    assert predict(over, under).task_aggregate == pytest.approx(0.501)
    alone = Candidate("u", Path("u"), {"mia_auc": 0.6}, "under-forgetting", terms=(0.5, 0.5))
    assert predict(over, alone).task_aggregate == pytest.approx(0.701)


def test_the_order_of_the_candidates_does_not_matter():
    trials = [candidate(name, auc=auc) for name, auc in (("a", 0.2), ("b", 0.3), ("c", 0.7), ("d", 0.8))]
    names = [pair.name for pair in bracketing_pairs(trials)]
    assert [pair.name for pair in bracketing_pairs(trials[::-1])] == names
    assert [pair.name for pair in bracketing_pairs([trials[2], trials[0], trials[3], trials[1]])] == names


def test_an_earlier_checkpoint_belongs_to_its_trial():
    assert candidate("trial-03@112", auc=0.5).trial == candidate("trial-03", auc=0.5).trial == "trial-03"


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"mia_auc": 0.3}, "over-forgetting"),
        ({"mia_auc": 0.8}, "under-forgetting"),
        ({"mia_auc": 0.51}, "balanced"),
        ({"mia_auc": 0.3, "retention": 0.2}, "dead"),
        ({"mia_auc": 0.99, "forgetting": 0.06}, "untouched"),
        ({"mia_auc": math.nan, "retention": 0.5}, "over-forgetting"),
    ],
)
def test_a_checkpoint_of_which_only_losses_are_known_gets_a_verdict(changes, verdict):
    """Thresholds are those of a full evaluation: retention 0.2 is below a quarter of 0.95; AUC and forgetting hardly moved."""
    baseline = {"mia_auc": 1.0, "retention": 0.95, "forgetting": 0.02}
    cheap = _cheap(**({"retention": 0.8, "forgetting": 0.9} | changes))
    found = cheap_candidate(name="trial-00@10", checkpoint=Path("x"), cheap=cheap, baseline=baseline)
    assert (found.verdict, found.complete) == (verdict, False)


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


def test_the_objective_by_hand():
    """(0.6 + 0.8 + 0.4) / 3 = 0.6; without MMLU (0.6 + 0.8) / 2 = 0.7; with weights 3, 1 and 0 (3 * 0.6 + 0.8) / 4 = 0.65."""
    equal = ObjectiveWeights()
    assert cheap_objective(_cheap(task_aggregate=0.6, mmlu_average=0.4), weights=equal) == pytest.approx(0.6)
    assert cheap_objective(_cheap(task_aggregate=0.6), weights=equal) == pytest.approx(0.7)
    scores = {"task_aggregate": 0.6, "mia_score": 0.8, "mmlu_average": 0.4}
    assert objective_value(scores, weights=ObjectiveWeights(task_aggregate=3, mmlu_average=0)) == pytest.approx(0.65)
    assert objective_value(scores, weights=equal, without=["mmlu_average"]) == pytest.approx(0.7)
    assert objective_value({}, weights=equal) == -math.inf


def test_an_objective_without_weight_is_refused():
    with pytest.raises(ValueError, match="all weights are 0"):
        ObjectiveWeights(task_aggregate=0, mia_score=0, mmlu_average=0)


def test_equal_shares_are_the_plain_merge():
    """And others are weights around 1, counted in election and divisor where the method has them."""
    plain = MergeConfig()
    assert merge_config(plain, share=0.5, density=0.5, scale=1.2) == MergeConfig(density=0.5, scale=1.2)
    weighted = merge_config(plain, share=0.7, density=0.5, scale=1.0)
    assert (weighted.weights, weighted.elect, weighted.divisor) == ((1.4, 0.6), "weighted", "weight")
    assert merge_config(MergeConfig(weights=(1, 2)), share=0.7, density=0.8, scale=1.0).weights == (1, 2)
    linear = merge_config(MergeConfig(method="linear"), share=0.25, density=0.5, scale=1.0)
    assert (linear.weights, linear.density) == ((0.5, 1.5), MergeConfig().density)


def test_a_weighted_merge_runs_from_one_parent_to_the_other():
    """At density 1, where nothing is trimmed: at a share of 1 - 1e-6 the merge is the first parent, at 1e-6 the second."""
    import torch

    from merging.ties import ties

    a, b = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.5, 1.0, -3.0])

    def merged(share: float) -> torch.Tensor:
        config = merge_config(MergeConfig(), share=0.7, density=1.0, scale=1.0)
        return ties(
            updates=[a, b], density=1.0, weights=(2 * share, 2 - 2 * share), elect=config.elect, divisor=config.divisor, zero_sum="positive"
        )

    torch.testing.assert_close(merged(1 - 1e-6), a, atol=1e-4, rtol=0)
    torch.testing.assert_close(merged(1e-6), b, atol=1e-4, rtol=0)
    assert not torch.allclose(merged(0.5), a)


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


def test_a_line_of_quantiles_is_found_in_one_step():
    """Losses that drift apart evenly: the AUC is the normal distribution at 1.5 - 1.2 * scale, which is 0.5 at 1.25."""
    from statistics import NormalDist

    samples = _calibrate(lambda scale: NormalDist().cdf(1.5 - 1.2 * scale), steps=4)
    assert len(samples) == 3
    assert samples[1.25] == pytest.approx(0.5)


def test_quantiles_find_a_sudden_fall_sooner_than_the_auc_itself():
    """An AUC that stays at 1 for long and is 0.3 at scale 1: half-way by AUC is 0.71, where it is still 0.97."""
    from statistics import NormalDist

    def curve(scale: float) -> float:
        return NormalDist().cdf(3.0 - 3.5 * scale**2)

    samples = {0.0: curve(0.0), 1.0: curve(1.0)}
    proposal = next_scale(auc_at=samples, bounds=(0.5, 1.5), tolerance=0.01)
    straight = (samples[0.0] - 0.5) / (samples[0.0] - samples[1.0])
    assert proposal is not None
    assert abs(curve(proposal) - 0.5) < abs(curve(straight) - 0.5) / 2
    assert (height(0.5), height(1.0)) == (0.0, -height(0.0))


@pytest.mark.parametrize(("level", "bound"), [(0.9, 1.5), (0.1, 0.5)])
def test_a_curve_that_never_meets_one_half_ends_at_the_bound(level, bound):
    samples = _calibrate(lambda scale: level - 0.01 * scale, steps=10)
    assert bound in samples
    assert len(samples) <= 5


def test_a_measurement_near_one_half_ends_the_search():
    assert next_scale(auc_at={0.0: 0.9, 1.0: 0.505}, bounds=(0.5, 1.5), tolerance=0.01) is None
    assert next_scale(auc_at={0.0: 0.9, 1.0: 0.55}, bounds=(0.5, 1.5), tolerance=0.01) is not None

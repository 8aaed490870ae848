"""The membership attack's AUC and score."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.mia import attack_auc, auc_standard_error, count_not_finite, mia_score

LOSSES = st.lists(st.sampled_from([0.5, 1.0, 1.5, 2.0, 2.5]), min_size=1, max_size=9)


def test_auc_by_hand():
    """Members 1, 2; strangers 2, 3. Pairs: 1<2 win, 1<3 win, 2=2 half, 2<3 win -> 3.5 of 4."""
    assert attack_auc(member_losses=[1, 2], nonmember_losses=[2, 3]) == 0.875


def test_an_auc_of_one_means_still_remembered():
    assert attack_auc(member_losses=[0.1, 0.2], nonmember_losses=[3.0, 4.0]) == 1.0
    assert attack_auc(member_losses=[3.0, 4.0], nonmember_losses=[0.1, 0.2]) == 0.0


@given(LOSSES, LOSSES)
def test_swapping_members_and_nonmembers_maps_auc_to_one_minus_auc(members, strangers):
    there = attack_auc(member_losses=members, nonmember_losses=strangers)
    assert attack_auc(member_losses=strangers, nonmember_losses=members) == pytest.approx(1 - there, abs=1e-12)


def pairwise(members, strangers) -> float:
    wins = sum((m < s) + 0.5 * (m == s) for m in members for s in strangers)
    return wins / (len(members) * len(strangers))


@given(LOSSES, LOSSES)
def test_auc_counts_pairs_and_halves_of_ties(members, strangers):
    assert attack_auc(member_losses=members, nonmember_losses=strangers) == pytest.approx(pairwise(members, strangers), abs=1e-12)


@given(LOSSES, LOSSES)
def test_auc_agrees_with_scikit_learn_on_losses_themselves(members, strangers):
    from sklearn.metrics import auc, roc_curve

    labels = [1] * len(members) + [0] * len(strangers)
    false_rate, true_rate, _ = roc_curve(labels, [-loss for loss in (*members, *strangers)])
    assert attack_auc(member_losses=members, nonmember_losses=strangers) == auc(false_rate, true_rate)


@given(LOSSES, LOSSES, st.randoms())
def test_order_copies_and_rising_functions_of_the_losses_change_nothing(members, strangers, random):
    expected = attack_auc(member_losses=members, nonmember_losses=strangers)
    shuffled = random.sample(members, len(members)), random.sample(strangers, len(strangers))
    for other in (shuffled, (members * 3, strangers * 2), ([math.exp(x) for x in members], [math.exp(x) for x in strangers])):
        assert attack_auc(member_losses=other[0], nonmember_losses=other[1]) == pytest.approx(expected, abs=1e-12)


def test_auc_by_hand_with_ties_on_both_sides():
    """Members 1, 2, 2; strangers 2, 2, 1. The member 1 ties with 1 and beats 2 twice: 2.5; each 2 ties twice: 1. Together 4.5 of 9."""
    assert attack_auc(member_losses=[1, 2, 2], nonmember_losses=[2, 2, 1]) == 0.5
    assert attack_auc(member_losses=[1, 1, 2], nonmember_losses=[2, 2, 1]) == pytest.approx(6 / 9, abs=1e-12)


def test_losses_that_are_not_finite_count_as_infinite():
    """A diverged member (NaN) is less likely than every stranger; two infinities tie."""
    assert attack_auc(member_losses=[math.nan, 1.0], nonmember_losses=[2.0, 3.0]) == 0.5
    assert attack_auc(member_losses=[math.inf], nonmember_losses=[None]) == 0.5


def test_one_empty_side_is_an_error():
    with pytest.raises(ValueError, match="0 members"):
        attack_auc(member_losses=[], nonmember_losses=[1.0])


@pytest.mark.parametrize(("auc", "score"), [(0.5, 1.0), (1.0, 0.0), (0.0, 0.0), (0.75, 0.5), (0.25, 0.5)])
def test_mia_score_falls_on_both_sides_of_one_half(auc, score):
    assert mia_score(auc) == score


def test_mia_score_of_the_published_run():
    assert mia_score(0.998304) == pytest.approx(0.003392, abs=5e-7)


def test_standard_error_of_an_uninformative_attack_on_150_documents():
    """A = 1/2: Q1 = Q2 = 1/3, so (1/4 + 2 * 149 / 12) / 150^2 = 0.0011148, root 0.03339."""
    assert auc_standard_error(0.5, num_members=150, num_nonmembers=150) == pytest.approx(0.033389, abs=1e-6)


def test_losses_that_are_not_finite_are_counted():
    assert count_not_finite([1.0, None, math.inf, math.nan, -math.inf]) == 4


@pytest.mark.parametrize("auc", [0.5, 0.7, 0.9])
def test_the_standard_error_is_that_of_repeated_attacks_with_exponential_losses(auc):
    """Under the formula's own model it is exact: minus the loss ~ Exp with mean 1 for strangers and A / (1 - A) for members, so that
    P(member loss < stranger loss) = A.
    4,000 attacks give their standard deviation to about 1.1 %; a formula without the square root or the pairs would be far off."""
    rng = np.random.default_rng(0)
    m, n, repeats = 30, 50, 4000
    members = -rng.exponential(auc / (1 - auc), size=(repeats, m, 1))
    strangers = -rng.exponential(1.0, size=(repeats, 1, n))
    found = (members < strangers).mean((1, 2))
    assert found.mean() == pytest.approx(auc, abs=0.005)
    assert auc_standard_error(auc, num_members=m, num_nonmembers=n) == pytest.approx(found.std(), rel=0.05)


def test_the_standard_error_agrees_with_delongs_on_normal_losses():
    """DeLong's reads the variance off the sample, S10 / m + S01 / n, whatever the distribution; at 150 + 150 both are about 0.03."""
    rng = np.random.default_rng(1)
    members, strangers = rng.normal(0.0, 1.0, 150), rng.normal(0.5, 1.0, 150)
    wins = (members[:, None] < strangers[None, :]).astype(float)
    delong = math.sqrt(wins.mean(1).var(ddof=1) / 150 + wins.mean(0).var(ddof=1) / 150)
    formula = auc_standard_error(wins.mean(), num_members=150, num_nonmembers=150)
    assert formula == pytest.approx(delong, rel=0.1)
    assert 0.02 < delong < 0.04


def test_the_standard_error_does_not_depend_on_which_side_is_which():
    there = auc_standard_error(0.8, num_members=20, num_nonmembers=70)
    assert auc_standard_error(0.2, num_members=70, num_nonmembers=20) == pytest.approx(there, abs=1e-12)

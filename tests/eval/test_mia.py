"""The membership attack's AUC and score."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.mia import attack_auc, auc_standard_error, mia_score

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


@given(LOSSES, LOSSES)
def test_auc_agrees_with_scikit_learn(members, strangers):
    from sklearn.metrics import auc, roc_curve

    labels = [1] * len(members) + [0] * len(strangers)
    false_rate, true_rate, _ = roc_curve(labels, [-loss for loss in (*members, *strangers)])
    assert attack_auc(member_losses=members, nonmember_losses=strangers) == pytest.approx(auc(false_rate, true_rate), abs=1e-12)


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

"""The truth ratio, worked by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.suites.truth_ratio import forget_truth, retain_truth, truth_ratio, truth_share

LOSSES = st.lists(st.floats(0, 8), min_size=1, max_size=5)


def loss(probability: float) -> float:
    return -math.log(probability)


def test_wrong_answers_are_averaged_geometrically():
    """p(wrong) = 0.4 and 0.1: geometric mean 0.2; p(right) = 0.5, so R = 0.4. Arithmetically it would be 0.25 / 0.5 = 0.5."""
    assert truth_ratio(right_loss=loss(0.5), wrong_losses=[loss(0.4), loss(0.1)]) == pytest.approx(0.4, abs=1e-12)


@pytest.mark.parametrize(
    ("ratio", "forget", "retain", "share"),
    [
        (0.25, 0.25, 0.75, 0.8),  # the right answer is 4 times as likely
        (1.0, 1.0, 0.0, 0.5),  # no preference: forgotten
        (4.0, 0.25, 0.0, 0.2),  # the wrong ones are: forgetting shows again, in the other direction
        (0.0, 0.0, 1.0, 1.0),
        (math.inf, 0.0, 0.0, 0.0),
    ],
)
def test_both_variants_by_hand(ratio, forget, retain, share):
    """min(R, 1/R), max(0, 1 - R) and 1 / (1 + R)."""
    assert (forget_truth(ratio), retain_truth(ratio), truth_share(ratio)) == pytest.approx((forget, retain, share), abs=1e-12)


@given(LOSSES, st.floats(0, 8))
def test_exchanging_right_and_wrong_changes_the_retain_score_but_not_the_forget_score(wrong, right):
    """R becomes 1 / R."""
    mean = sum(wrong) / len(wrong)
    there = truth_ratio(right_loss=right, wrong_losses=wrong)
    back = truth_ratio(right_loss=mean, wrong_losses=[right])
    assert forget_truth(back) == pytest.approx(forget_truth(there), rel=1e-9)
    assert truth_share(back) == pytest.approx(1 - truth_share(there), abs=1e-9)
    assert min(retain_truth(there), retain_truth(back)) == 0.0


@given(LOSSES, st.floats(0, 8))
def test_wrong_answers_count_alike_in_any_order_and_number(wrong, right):
    expected = truth_ratio(right_loss=right, wrong_losses=wrong)
    assert truth_ratio(right_loss=right, wrong_losses=wrong[::-1]) == pytest.approx(expected, rel=1e-12)
    assert truth_ratio(right_loss=right, wrong_losses=[*wrong, *wrong]) == pytest.approx(expected, rel=1e-12)
    assert truth_ratio(right_loss=right, wrong_losses=[*wrong, max(wrong) + 1]) < expected


def test_a_ratio_beyond_floating_point_has_its_limits_as_scores():
    ratio = truth_ratio(right_loss=2000, wrong_losses=[0.0])
    assert (ratio, forget_truth(ratio), retain_truth(ratio), truth_share(ratio)) == (math.inf, 0.0, 0.0, 0.0)


def test_a_loss_that_is_not_a_number_stays_one():
    ratio = truth_ratio(right_loss=math.nan, wrong_losses=[1.0])
    assert all(math.isnan(value) for value in (ratio, forget_truth(ratio), retain_truth(ratio), truth_share(ratio)))

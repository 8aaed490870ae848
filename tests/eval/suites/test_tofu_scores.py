"""Model utility and forget quality, worked by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.suites.tofu import SCORE_NAMES, UTILITY_TERMS
from eval.suites.tofu_scores import forget_quality, model_utility

RATIOS = st.lists(st.integers(1, 400).map(lambda number: number / 4), min_size=1, max_size=12)


def test_utility_is_the_harmonic_mean_of_nine():
    """Eight ones and a half: 9 / (8 + 2) = 0.9; the arithmetic mean would be 0.944."""
    assert model_utility([1.0] * 8 + [0.5]) == pytest.approx(0.9, abs=1e-12)


@given(st.permutations([0.2, 0.5, 0.9]))
def test_the_order_of_terms_is_irrelevant(terms):
    assert model_utility(terms) == pytest.approx(3 / (1 / 0.2 + 1 / 0.5 + 1 / 0.9), abs=1e-12)


def test_one_lost_ability_makes_the_utility_zero_and_an_undefined_one_makes_it_undefined():
    assert model_utility([1.0] * 8 + [0.0]) == 0.0
    assert math.isnan(model_utility([1.0] * 8 + [math.nan]))


def test_the_terms_are_three_metrics_of_three_sets_and_none_of_the_forget_set():
    """The probability is normalised against wrong answers on the sets about the real world only."""
    expected = [
        *("retain_probability", "retain_rouge_l_recall", "retain_truth_ratio"),
        *("real_authors_normalised_probability", "real_authors_rouge_l_recall", "real_authors_truth_ratio"),
        *("world_facts_normalised_probability", "world_facts_rouge_l_recall", "world_facts_truth_ratio"),
    ]
    assert list(UTILITY_TERMS) == expected
    assert set(UTILITY_TERMS) < set(SCORE_NAMES)


def test_forget_quality_of_disjoint_samples_by_hand():
    """Three ratios below three others: the statistic is 1. Of the C(6, 3) = 20 orders two are as extreme: p = 0.1."""
    result = forget_quality(ratios=[0.1, 0.2, 0.3], retained_ratios=[1.0, 2.0, 3.0])
    assert (result.statistic, result.p_value) == pytest.approx((1.0, 0.1), abs=1e-9)


@given(RATIOS)
def test_a_model_that_equals_the_retained_one_has_quality_one(ratios):
    result = forget_quality(ratios=ratios, retained_ratios=ratios[::-1])
    assert (result.statistic, result.p_value) == (0.0, 1.0)


@given(RATIOS, RATIOS)
def test_the_test_is_symmetric_and_sees_ranks_only(a, b):
    expected = forget_quality(ratios=a, retained_ratios=b)
    for actual in (
        forget_quality(ratios=b, retained_ratios=a),
        forget_quality(ratios=[1 / x for x in a], retained_ratios=[1 / x for x in b]),
        forget_quality(ratios=[math.log(x) for x in a], retained_ratios=[math.log(x) for x in b]),
    ):
        assert actual.p_value == pytest.approx(expected.p_value, abs=1e-9)


def test_more_rows_of_the_same_kind_make_the_same_difference_less_likely():
    """Duplicating rows leaves means as they are, but not the p-value: 20 rows of 2 authors are no 20 independent rows."""
    a, b = [0.1, 0.2, 0.9], [0.8, 1.0, 2.0]
    once, often = forget_quality(ratios=a, retained_ratios=b), forget_quality(ratios=a * 5, retained_ratios=b * 5)
    assert often.statistic == pytest.approx(once.statistic, abs=1e-12)
    assert often.p_value < once.p_value


def test_infinite_ratios_are_ranks_and_undefined_ones_leave_the_quality_undefined():
    assert forget_quality(ratios=[1.0, math.inf], retained_ratios=[1.0, math.inf]).p_value == 1.0
    result = forget_quality(ratios=[1.0, math.nan], retained_ratios=[1.0, 2.0])
    assert math.isnan(result.p_value)
    assert math.isnan(result.statistic)

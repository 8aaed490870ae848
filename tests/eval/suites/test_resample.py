"""Means and AUCs, and their resamples."""

from __future__ import annotations

import math

import numpy as np
import pytest

from eval.mia import attack_auc
from eval.suites.resample import by_set, drawn, limits, once, weighted_auc, weighted_mean


def lines(values, *, name="forget", authors=None):
    return [{"set": name, "unit": f"author {authors[i]}" if authors else f"row {i}", "x": value} for i, value in enumerate(values)]


def test_every_row_once_gives_the_mean():
    sets = by_set(lines([1.0, 2.0, 6.0]))
    assert weighted_mean(sets["forget"].column("x"), once(sets)["forget"]).tolist() == [3.0]


def test_the_rows_of_an_author_are_drawn_together():
    """Two authors of two rows: a resample has 0, 2 or 4 rows of the first, and both of its rows equally often."""
    sets = by_set(lines([1.0, 2.0, 3.0, 4.0], authors=["a", "b", "a", "b"]))
    weights = drawn(sets, samples=200, seed=0)["forget"]
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, 1] == weights[:, 3]).all()
    assert set(weights[:, 0]) == {0.0, 1.0, 2.0}
    assert (weights.sum(1) == 4).all()


def test_rows_without_authors_are_drawn_alone():
    """The negative control of the test above."""
    weights = drawn(by_set(lines([1.0, 2.0, 3.0, 4.0])), samples=200, seed=0)["forget"]
    assert not (weights[:, 0] == weights[:, 2]).all()


def test_a_seed_gives_the_same_draws_and_another_does_not():
    sets = by_set(lines([1.0, 2.0, 3.0]))
    first, again, other = (drawn(sets, samples=50, seed=seed)["forget"] for seed in (1, 1, 2))
    assert (first == again).all()
    assert not (first == other).all()


def test_two_sets_are_drawn_independently():
    sets = by_set([*lines([1.0, 2.0, 3.0]), *lines([1.0, 2.0, 3.0], name="retain")])
    weights = drawn(sets, samples=50, seed=0)
    assert not (weights["forget"] == weights["retain"]).all()


def test_the_weighted_auc_of_every_row_once_is_the_auc():
    members, strangers = np.array([1.0, 2.0, math.nan]), np.array([2.0, 3.0])
    actual = weighted_auc(members, strangers, member_weights=np.ones((1, 3)), stranger_weights=np.ones((1, 2)))
    assert float(actual[0]) == pytest.approx(attack_auc(member_losses=list(members), nonmember_losses=list(strangers)), abs=1e-12)


def test_a_weight_is_a_repetition():
    members, strangers = np.array([1.0, 4.0]), np.array([2.0, 3.0, 5.0])
    actual = weighted_auc(members, strangers, member_weights=np.array([[3.0, 1.0]]), stranger_weights=np.array([[0.0, 2.0, 1.0]]))
    expected = attack_auc(member_losses=[1, 1, 1, 4], nonmember_losses=[3, 3, 5])
    assert float(actual[0]) == pytest.approx(expected, abs=1e-12)


def test_a_missing_value_leaves_mean_and_interval_undefined():
    sets = by_set(lines([1.0, None, 3.0]))
    assert math.isnan(weighted_mean(sets["forget"].column("x"), once(sets)["forget"])[0])
    assert limits(np.array([1.0, 2.0]), point=None, confidence=0.95) is None
    assert limits(np.array([math.nan, math.nan, 2.0]), point=2.0, confidence=0.95) is None


def test_the_interval_covers_its_point():
    assert limits(np.linspace(0, 1, 101), point=0.5, confidence=0.9) == pytest.approx([0.05, 0.95])
    assert limits(np.array([0.2, 0.2]), point=0.5, confidence=0.9) == [0.2, 0.5]

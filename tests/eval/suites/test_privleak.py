"""Privacy leakage, worked by hand."""

from __future__ import annotations

import math

import pytest

from eval.suites.privleak import privleak


@pytest.mark.parametrize(
    ("auc", "retained", "expected"),
    [
        (0.5, 0.5, 0.0),  # like a model that never saw the texts
        (1.0, 0.5, -100.0),  # under-unlearned: always recognised
        (0.0, 0.5, 100.0),  # over-unlearned: always less likely than strangers
        (0.7, 0.6, -25.0),  # (0.3 - 0.4) / 0.4
        (0.4, 0.4, 0.0),
    ],
)
def test_privleak_by_hand(auc, retained, expected):
    assert privleak(auc=auc, retained_auc=retained) == pytest.approx(expected, abs=1e-9)


def test_half_stands_in_for_a_retained_model():
    assert privleak(auc=0.75) == privleak(auc=0.75, retained_auc=0.5) == -50.0


def test_a_retained_model_that_is_always_recognised_leaves_it_undefined():
    assert math.isnan(privleak(auc=0.5, retained_auc=1.0))

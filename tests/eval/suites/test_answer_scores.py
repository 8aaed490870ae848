"""Scores of one answer, worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.suites.answer_scores import (
    answer_loss,
    exact_memorization,
    extraction_strength,
    normalised_probability,
    probability,
    without_end,
)
from eval.teacher_forced import TokenScores


def scores(*probabilities: float, correct: str = "") -> TokenScores:
    """Token probabilities, and ``1`` or ``0`` per token for whether it is the argmax."""
    flags = np.array([flag == "1" for flag in correct or "1" * len(probabilities)], dtype=bool)
    return TokenScores("row", np.log(np.array(probabilities, dtype=np.float64)), flags)


def flags(text: str) -> TokenScores:
    return scores(*[0.5] * len(text), correct=text)


def test_probability_is_the_geometric_mean_of_the_tokens():
    """1/2 and 1/8: loss (ln 2 + ln 8) / 2 = ln 4, probability 1/4. The arithmetic mean would be 0.3125."""
    assert answer_loss(scores(0.5, 0.125)) == pytest.approx(math.log(4), abs=1e-12)
    assert probability(scores(0.5, 0.125)) == pytest.approx(0.25, abs=1e-12)


def test_probability_does_not_fall_with_length_alone():
    assert probability(scores(0.5, 0.5, 0.5)) == pytest.approx(probability(scores(0.5)), abs=1e-12)


def test_a_token_that_is_impossible_makes_the_probability_zero():
    with np.errstate(divide="ignore"):
        assert probability(scores(0.5, 0.0)) == 0.0


def test_normalised_probability_by_hand():
    """Right 0.4, wrong 0.2, 0.1, 0.1: 0.4 / 0.8."""
    losses = [-math.log(p) for p in (0.2, 0.1, 0.1)]
    assert normalised_probability(right_loss=-math.log(0.4), wrong_losses=losses) == pytest.approx(0.5, abs=1e-12)


def test_normalised_probability_is_defined_where_all_probabilities_underflow():
    """exp(-2000) is 0 in floating point; the quotient of exp(-2000) and exp(-2000) + exp(-2001) is 1 / (1 + 1/e)."""
    actual = normalised_probability(right_loss=2000, wrong_losses=[2001])
    assert actual == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-12)


@given(st.permutations([0.3, 1.0, 2.5]))
def test_the_order_of_wrong_answers_is_irrelevant_but_not_their_number(losses):
    expected = normalised_probability(right_loss=0.7, wrong_losses=[0.3, 1.0, 2.5])
    assert normalised_probability(right_loss=0.7, wrong_losses=losses) == pytest.approx(expected, abs=1e-12)
    assert normalised_probability(right_loss=0.7, wrong_losses=[*losses, 1.0]) < expected


@pytest.mark.parametrize(("text", "expected"), [("1011", 0.75), ("0000", 0.0), ("1", 1.0)])
def test_exact_memorization_counts_tokens_that_are_the_argmax(text, expected):
    assert exact_memorization(flags(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1111", 1.0),  # nothing has to be given
        ("0111", 0.75),  # one token of four
        ("1011", 0.5),  # the first two: position 1 is wrong, whatever stands before it
        ("1110", 0.0),  # not even the last one; open-unlearning says 1/4
        ("0000", 0.0),
    ],
)
def test_extraction_strength_by_hand(text, expected):
    """1 - k / n, k the shortest prefix after which every token is the argmax."""
    assert extraction_strength(flags(text)) == expected


@given(st.text(alphabet="01", min_size=1, max_size=12))
def test_extraction_strength_agrees_with_its_definition(text):
    n = len(text)
    k = next(k for k in range(n + 1) if "0" not in text[k:])
    assert extraction_strength(flags(text)) == pytest.approx(1 - k / n, abs=1e-12)


def test_an_answer_without_tokens_has_no_scores():
    for metric in (answer_loss, probability, exact_memorization, extraction_strength):
        assert math.isnan(metric(scores()))


def test_the_end_token_can_be_left_out_of_every_column():
    whole = TokenScores("row", np.array([-1.0, -2.0]), np.array([True, False]), np.array([-3.0, -4.0]), np.array([5.0, 6.0]))
    text = without_end(whole)
    assert (text.log_prob_N.tolist(), text.correct_N.tolist()) == ([-1.0], [True])
    assert text.mean_N is not None
    assert text.variance_N is not None
    assert (text.mean_N.tolist(), text.variance_N.tolist(), text.row_id) == ([-3.0], [5.0], "row")

"""How a step's terms become its loss: every total is divided once, by the count of the whole step."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.objectives.terms import LossTerm, Side, StepCounts, Unit, step_loss

COUNTS = StepCounts(forget_tokens=10, forget_sequences=2, retain_tokens=5, retain_sequences=4)


def term(total: float | torch.Tensor, *, unit: Unit = Unit.TOKEN, side: Side = Side.FORGET, weight: float = 1.0) -> LossTerm:
    return LossTerm("any", torch.as_tensor(total, dtype=torch.float64), unit, side, weight)


@pytest.mark.parametrize(
    ("unit", "side", "expected"),
    [
        (Unit.TOKEN, Side.FORGET, 10),
        (Unit.SEQUENCE, Side.FORGET, 2),
        (Unit.TOKEN, Side.RETAIN, 5),
        (Unit.SEQUENCE, Side.RETAIN, 4),
    ],
)
def test_each_set_and_unit_has_a_denominator_of_its_own(unit: Unit, side: Side, expected: int) -> None:
    assert COUNTS.of(term(1.0, unit=unit, side=side)) == expected


def test_the_loss_is_the_weighted_sum_of_totals_over_counts() -> None:
    """0.5 * 20 / 10 + 2 * 3 / 4 = 1 + 1.5 = 2.5; one shared denominator of 15 tokens would give something else."""
    terms = (term(20.0, weight=0.5), term(3.0, unit=Unit.SEQUENCE, side=Side.RETAIN, weight=2.0))
    assert float(step_loss(terms, counts=COUNTS)) == 2.5


def test_an_empty_side_counts_as_one_and_contributes_zero() -> None:
    empty = StepCounts(0, 0, 0, 0)
    assert empty.of(term(0.0)) == 1
    assert float(step_loss((term(0.0),), counts=empty)) == 0.0


def test_a_term_of_weight_zero_neither_adds_nor_spreads_a_gradient() -> None:
    total = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    loss = step_loss((term(1.0), term(total, side=Side.RETAIN, weight=0.0)), counts=COUNTS)
    assert float(loss) == 0.1
    assert not loss.requires_grad
    only = step_loss((term(total, weight=0.0),), counts=COUNTS)
    only.backward()
    assert float(total.grad) == 0.0, "the loss of a step without weights can still be walked backwards"


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-20, 0), min_size=1, max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=5),
)
def test_splitting_a_step_into_micro_batches_changes_nothing(values: list[float], cuts: list[int]) -> None:
    """The micro-batches' losses add up to the loss of the step, however it is cut, empty pieces included."""
    counts = StepCounts(forget_tokens=len(values), forget_sequences=1, retain_tokens=0, retain_sequences=0)
    bounds = [0, *sorted(min(cut, len(values)) for cut in cuts), len(values)]
    pieces = [values[low:high] for low, high in itertools.pairwise(bounds)]
    expected = float(step_loss((term(sum(values)),), counts=counts))
    actual = sum(float(step_loss((term(sum(piece)),), counts=counts)) for piece in pieces)
    assert actual == pytest.approx(expected, abs=1e-9)


def test_a_mean_of_micro_batch_means_is_something_else() -> None:
    """Negative control. Tokens 1, 1, 1 | 5: the mean is 2, the mean of the micro-batches' means (1 and 5) is 3."""
    pieces = [[1.0, 1.0, 1.0], [5.0]]
    whole = StepCounts(4, 1, 0, 0)
    assert sum(float(step_loss((term(sum(piece)),), counts=whole)) for piece in pieces) == 2.0
    means = [float(step_loss((term(sum(piece)),), counts=StepCounts(len(piece), 1, 0, 0))) for piece in pieces]
    assert sum(means) / len(means) == 3.0

"""How a step's terms become its loss: every total is divided once, by the count of the whole step."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.config import Average
from trainers.objectives.terms import LossTerm, Side, SideCounts, StepCounts, Unit, averaged, step_loss

COUNTS = StepCounts(
    forget=SideCounts(tokens=10, sequences=2, positions=30, real_tokens=50),
    retain=SideCounts(tokens=5, sequences=4, positions=7, real_tokens=11),
)


def term(total: float | torch.Tensor, *, unit: Unit = Unit.TOKEN, side: Side = Side.FORGET, weight: float = 1.0) -> LossTerm:
    return LossTerm("any", torch.as_tensor(total, dtype=torch.float64), unit, side, weight)


def forget_tokens(number: int) -> StepCounts:
    return StepCounts(forget=SideCounts(tokens=number, sequences=1), retain=SideCounts())


@pytest.mark.parametrize(
    ("unit", "side", "expected"),
    [
        (Unit.TOKEN, Side.FORGET, 10),
        (Unit.SEQUENCE, Side.FORGET, 2),
        (Unit.POSITION, Side.FORGET, 30),
        (Unit.REAL_TOKEN, Side.FORGET, 50),
        (Unit.LATER_TOKEN, Side.FORGET, 8),
        (Unit.TOKEN, Side.RETAIN, 5),
        (Unit.SEQUENCE, Side.RETAIN, 4),
        (Unit.POSITION, Side.RETAIN, 7),
        (Unit.REAL_TOKEN, Side.RETAIN, 11),
        (Unit.LATER_TOKEN, Side.RETAIN, 1),
    ],
)
def test_each_set_and_unit_has_a_denominator_of_its_own(unit: Unit, side: Side, expected: int) -> None:
    assert COUNTS.of(term(1.0, unit=unit, side=side)) == expected


def test_every_unit_can_be_counted() -> None:
    """A unit without a count would stop a trial at its first step."""
    for unit, side in itertools.product(Unit, Side):
        assert COUNTS.of(term(1.0, unit=unit, side=side)) >= 1


def test_later_tokens_are_those_behind_the_first_of_each_sequence() -> None:
    """Answers of 3, 1 and 2 tokens: 6 tokens, 3 of them first ones. Sequences of one token have no later one."""
    assert SideCounts(tokens=6, sequences=3).later_tokens == 3
    assert SideCounts(tokens=3, sequences=3).later_tokens == 0
    assert SideCounts().later_tokens == 0


def test_the_loss_is_the_weighted_sum_of_totals_over_counts() -> None:
    """0.5 * 20 / 10 + 2 * 3 / 4 = 1 + 1.5 = 2.5; one shared denominator of 15 tokens would give something else."""
    terms = (term(20.0, weight=0.5), term(3.0, unit=Unit.SEQUENCE, side=Side.RETAIN, weight=2.0))
    assert float(step_loss(terms, counts=COUNTS)) == 2.5


def test_an_empty_side_counts_as_one_and_contributes_zero() -> None:
    empty = StepCounts(SideCounts(), SideCounts())
    for unit in Unit:
        assert empty.of(term(0.0, unit=unit)) == 1
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
    counts = forget_tokens(len(values))
    bounds = [0, *sorted(min(cut, len(values)) for cut in cuts), len(values)]
    pieces = [values[low:high] for low, high in itertools.pairwise(bounds)]
    expected = float(step_loss((term(sum(values)),), counts=counts))
    actual = sum(float(step_loss((term(sum(piece)),), counts=counts)) for piece in pieces)
    assert actual == pytest.approx(expected, abs=1e-9)


def test_a_mean_of_micro_batch_means_is_something_else() -> None:
    """Negative control. Tokens 1, 1, 1 | 5: the mean is 2, the mean of the micro-batches' means (1 and 5) is 3."""
    pieces = [[1.0, 1.0, 1.0], [5.0]]
    assert sum(float(step_loss((term(sum(piece)),), counts=forget_tokens(4))) for piece in pieces) == 2.0
    means = [float(step_loss((term(sum(piece)),), counts=forget_tokens(len(piece)))) for piece in pieces]
    assert sum(means) / len(means) == 3.0


# --- what is averaged ---

VALUES_N, ROW_N = torch.tensor([1.0, 2.0, 6.0, 10.0], dtype=torch.float64), torch.tensor([0, 0, 0, 2])
"""Row 0 has three tokens with mean 3, row 1 has none, row 2 has one."""


def test_averaging_tokens_keeps_their_sum_and_their_unit() -> None:
    total, unit = averaged(VALUES_N, row_N=ROW_N, num_rows=3, average=Average.TOKEN)
    assert (float(total), unit) == (19.0, Unit.TOKEN)
    assert averaged(VALUES_N, row_N=ROW_N, num_rows=3, average=Average.TOKEN, token_unit=Unit.POSITION)[1] is Unit.POSITION


def test_averaging_sequences_sums_their_means_and_counts_sequences() -> None:
    """3 + 10 = 13, whatever a token is called; the row without tokens adds nothing."""
    for token_unit in Unit:
        total, unit = averaged(VALUES_N, row_N=ROW_N, num_rows=3, average=Average.SEQUENCE, token_unit=token_unit)
        assert (float(total), unit) == (13.0, Unit.SEQUENCE)


def test_sequences_of_one_length_are_averaged_alike_either_way() -> None:
    """Two rows of two tokens: 19 / 4 both times. With unequal rows, as above, 19 / 4 is not 13 / 2."""
    counts = StepCounts(SideCounts(tokens=4, sequences=2), SideCounts())

    def loss(row_N: torch.Tensor, average: Average) -> float:
        total, unit = averaged(VALUES_N, row_N=row_N, num_rows=3, average=average)
        return float(step_loss((term(total, unit=unit),), counts=counts))

    even_N = torch.tensor([0, 0, 1, 1])
    assert loss(even_N, Average.TOKEN) == loss(even_N, Average.SEQUENCE) == 4.75
    assert (loss(ROW_N, Average.TOKEN), loss(ROW_N, Average.SEQUENCE)) == (4.75, 6.5)


def test_tokens_left_out_neither_add_nor_count() -> None:
    """Without the first tokens of the rows: 2 + 6 of row 0, with mean 4; row 2 has nothing left."""
    kept_N = torch.tensor([False, True, True, False])
    token, sequence = (averaged(VALUES_N, row_N=ROW_N, num_rows=3, average=average, kept_N=kept_N)[0] for average in Average)
    assert (float(token), float(sequence)) == (8.0, 4.0)
    everything, _ = averaged(VALUES_N, row_N=ROW_N, num_rows=3, average=Average.SEQUENCE, kept_N=torch.ones(4, dtype=torch.bool))
    assert float(everything) == 13.0


def test_a_token_left_out_gets_no_gradient() -> None:
    values_N = VALUES_N.clone().requires_grad_()
    kept_N = torch.tensor([False, True, True, True])
    total, _ = averaged(values_N, row_N=ROW_N, num_rows=3, average=Average.SEQUENCE, kept_N=kept_N)
    (gradient_N,) = torch.autograd.grad(total, values_N)
    assert gradient_N.tolist() == [0.0, 0.5, 0.5, 1.0]

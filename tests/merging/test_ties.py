"""TIES as maths: what is kept, which sign wins, and what is averaged."""

from __future__ import annotations

import itertools
import random
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merging.linear import linear, task_arithmetic
from merging.ties import count_sign_conflicts, kth_largest_magnitude, ties, ties_merge, trim

DENSITIES = (0.05, 0.2, 0.5, 0.8, 0.99, 1.0)


def _updates(*, models: int, shape: tuple[int, ...] = (37, 41), seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [1e-3 * torch.randn(shape, generator=generator) for _ in range(models)]


def _peft(updates, *, density, weights=None):
    from peft.utils.merge_utils import ties as peft_ties

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft_ties(list(updates), torch.tensor(weights or [1.0] * len(updates)), density)


def _reference(updates, *, density: float) -> torch.Tensor:
    """The paper's three steps per tensor, in Python's float64, one element at a time."""
    vectors = [[float(value) for value in update.flatten()] for update in updates]
    for vector in vectors:
        order = sorted(range(len(vector)), key=lambda i: -abs(vector[i]))
        for i in order[int(density * len(vector)) :]:
            vector[i] = 0.0
    merged = []
    for values in zip(*vectors, strict=True):
        sign = 1 if sum(values) >= 0 else -1
        agreeing = [value for value in values if value * sign > 0]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return torch.tensor(merged, dtype=torch.float64).reshape(updates[0].shape)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("models", [1, 2, 3])
def test_the_default_is_bit_equal_to_peft(density, models):
    updates = _updates(models=models)
    assert torch.equal(ties(updates=updates, density=density), _peft(updates, density=density))


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("models", [2, 3])
def test_it_is_bit_equal_to_peft_where_magnitudes_repeat(density, models):
    """Rounded to eighths, thousands of elements share a few magnitudes, so the border runs through equal ones. By default others stay."""
    updates = [(8 * update * 1e3).round() / 8 for update in _updates(models=models)]
    expected = _peft(updates, density=density)
    assert torch.equal(ties(updates=updates, density=density, equal_magnitudes="topk"), expected)
    assert torch.equal(ties(updates=updates, density=density), expected) == (density in (0.99, 1.0))


@pytest.mark.parametrize("density", [*DENSITIES, 0.33])
@pytest.mark.parametrize("shape", [(7,), (37, 41), (1100, 1000)])
def test_the_first_of_equal_magnitudes_stay(density, shape):
    """What a stable sort by falling magnitude puts first, also where the last equal one is a million elements further on."""
    update = (4 * _updates(models=1, shape=shape, seed=3)[0] * 1e3).round() / 4
    flat = update.flatten()
    expected = torch.zeros_like(flat)
    chosen = torch.sort(flat.abs(), descending=True, stable=True).indices[: int(density * flat.numel())]
    expected[chosen] = flat[chosen]
    assert torch.equal(trim(update, density=density), expected.reshape(shape))


def test_a_merge_of_trims_drops_the_surplus_of_each(monkeypatch):
    """Blocks of ten elements: each trim's surplus falls into some of them, on and next to their edges."""
    monkeypatch.setattr("merging.ties.BLOCK", 10)
    updates = [(4 * update * 1e3).round() / 4 for update in _updates(models=2)]
    trimmed = [trim(update, density=0.4) for update in updates]
    found = ties_merge(updates=updates, density=0.4)
    assert torch.equal(found.update, ties(updates=trimmed, density=1.0))
    assert found.kept == tuple(int(part.count_nonzero()) for part in trimmed)
    assert found.conflicts == count_sign_conflicts(trimmed)
    assert all(0 < int((update.abs() == part[part != 0].abs().min()).sum()) > int((part.abs() == part[part != 0].abs().min()).sum())
               for update, part in zip(updates, trimmed, strict=True)), "the border runs through equal magnitudes"  # fmt: skip


def test_it_is_bit_equal_to_peft_with_weights():
    updates = _updates(models=2)
    assert torch.equal(ties(updates=updates, density=0.5, weights=(0.6, 0.4)), _peft(updates, density=0.5, weights=[0.6, 0.4]))


@pytest.mark.parametrize("density", DENSITIES)
def test_it_matches_a_plain_float64_reference(density):
    """Two float32 roundings, one in the sum and one in the division: a relative 2e-7. A wrong sign or divisor is off by 0.5 or more."""
    updates = _updates(models=3, shape=(19, 23))
    actual = ties(updates=updates, density=density).double()
    torch.testing.assert_close(actual, _reference(updates, density=density), rtol=3e-7, atol=0)


def test_two_models_follow_the_closed_form():
    """Both survive with one sign: the mean. One survives: that one. Opposite signs: the larger in magnitude."""
    a, b = (trim(update, density=0.6) for update in _updates(models=2))
    larger = torch.where(a.abs() >= b.abs(), a, b)
    expected = torch.where(a * b > 0, (a + b) / 2, larger)
    actual = ties(updates=_updates(models=2), density=0.6)
    assert torch.equal(actual, expected)
    assert not torch.equal(actual, (a + b) / 2)


def test_the_steps_by_hand():
    """Keep 3 of 5: a = (4, -3, 2, 0, 0), b = (0, 5, -2, 6, 0). Sums (4, 2, 0, 6, 0): all positive, zero counting as positive."""
    a, b = torch.tensor([4.0, -3.0, 2.0, 1.0, 0.5]), torch.tensor([1.0, 5.0, -2.0, 6.0, 0.5])
    assert trim(a, density=0.6).tolist() == [4, -3, 2, 0, 0]
    assert trim(b, density=0.6).tolist() == [0, 5, -2, 6, 0]
    trimmed = [trim(a, density=0.6), trim(b, density=0.6)]
    assert count_sign_conflicts(trimmed) == 2
    found = ties_merge(updates=[a, b], density=0.6)
    assert (found.update.tolist(), found.kept, found.conflicts) == ([4, 5, 2, 6, 0], (3, 3), 2)


@pytest.mark.parametrize(("zero_sum", "expected"), [("positive", 0.5), ("drop", 0.0)])
def test_equal_and_opposite_values_follow_the_zero_sum_rule(zero_sum, expected):
    updates = [torch.tensor([0.5]), torch.tensor([-0.5])]
    assert ties(updates=updates, density=1.0, zero_sum=zero_sum).item() == expected


@pytest.mark.parametrize(
    ("elect", "divisor", "a", "b", "weights", "expected"),
    [
        ("unweighted", "count", 0.4, -0.9, (1.0, 0.2), -0.18),
        ("weighted", "count", 0.4, -0.9, (1.0, 0.2), 0.4),
        ("unweighted", "count", 1.0, 1.0, (0.6, 0.4), 0.5),
        ("weighted", "weight", 1.0, 1.0, (0.6, 0.4), 1.0),
        ("unweighted", "weight", 1.0, 0.0, (0.6, 0.4), 1.0),
        ("unweighted", "count", 1.0, 0.0, (0.6, 0.4), 0.6),
    ],
)
def test_what_weights_mean_is_explicit(elect, divisor, a, b, weights, expected):
    """Rows 1 and 2: 0.4 - 0.9 < 0 elects minus and leaves -0.9 * 0.2; weighted, 0.4 - 0.18 > 0 elects plus and leaves 0.4."""
    updates = [torch.tensor([a]), torch.tensor([b])]
    merged = ties(updates=updates, density=1.0, weights=weights, elect=elect, divisor=divisor)
    assert merged.item() == pytest.approx(expected)


def test_one_model_at_density_one_is_returned():
    (update,) = _updates(models=1)
    assert torch.equal(ties(updates=[update], density=1.0), update)
    assert not torch.equal(ties(updates=[update], density=0.9), update)


def test_two_equal_models_at_density_one_are_returned():
    (update,) = _updates(models=1)
    assert torch.equal(ties(updates=[update, update], density=1.0), update)


def test_the_order_of_models_does_not_matter():
    """Exactly for two models; for three, up to the order of additions. Unequal weights are the negative control."""
    a, b, c = _updates(models=3)
    assert torch.equal(ties(updates=[a, b], density=0.5), ties(updates=[b, a], density=0.5))
    torch.testing.assert_close(ties(updates=[a, b, c], density=0.5), ties(updates=[c, a, b], density=0.5), rtol=3e-7, atol=0)
    assert not torch.equal(ties(updates=[a, b], density=0.5, weights=(0.6, 0.4)), ties(updates=[b, a], density=0.5, weights=(0.6, 0.4)))


def test_scaling_the_updates_scales_the_result():
    """By a power of two, exactly. A negative factor is the control: at a zero sum the sign is positive on both sides."""
    updates = _updates(models=2)
    assert torch.equal(ties(updates=[4 * update for update in updates], density=0.3), 4 * ties(updates=updates, density=0.3))
    opposite = [torch.tensor([0.5, 1.0]), torch.tensor([-0.5, 1.0])]
    negated = ties(updates=[-update for update in opposite], density=1.0)
    assert negated.tolist() == [0.5, -1.0]
    assert (-ties(updates=opposite, density=1.0)).tolist() == [-0.5, -1.0]


def test_merging_the_factors_apart_is_another_algorithm():
    """The same update stored as (A, B) and (-A, -B): TIES of the updates returns it, TIES of the factors does not."""
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(4, 32, generator=generator), torch.randn(24, 4, generator=generator)
    merged = ties(updates=[b @ a, (-b) @ (-a)], density=1.0)
    assert torch.equal(merged, b @ a)
    from_factors = ties(updates=[b, -b], density=1.0) @ ties(updates=[a, -a], density=1.0)
    assert torch.cosine_similarity(merged.flatten(), from_factors.flatten(), dim=0).abs() < 0.5


def test_the_support_grows_with_density():
    (update,) = _updates(models=1)
    kept = [trim(update, density=density) != 0 for density in DENSITIES]
    for smaller, larger in itertools.pairwise(kept):
        assert bool((larger | ~smaller).all())
        assert int(larger.sum()) > int(smaller.sum())


def test_a_density_that_keeps_nothing_gives_no_update():
    assert trim(torch.ones(4), density=0.2).count_nonzero() == 0


@given(st.lists(st.floats(-(2.0**90), 2.0**90, width=32), min_size=1, max_size=60), st.floats(0.01, 1.0))
@settings(max_examples=150, deadline=None)
def test_exactly_int_density_n_elements_are_kept_and_none_below_a_dropped_one(values, density):
    update = torch.tensor(values, dtype=torch.float32)
    kept = trim(update, density=density)
    num_kept = int(density * update.numel())
    assert kept.count_nonzero() == min(num_kept, int(update.count_nonzero()))
    dropped = update[kept == 0].abs()
    if num_kept and dropped.numel() and kept.count_nonzero():
        assert dropped.max() <= kept[kept != 0].abs().min()


def test_the_threshold_is_exact_down_to_subnormal_numbers():
    update = torch.tensor([1e-45, -1e-44, 1e-38, -3.0, 3.0000002, 0.0, -0.0, 1e30])
    ordered = sorted((abs(float(value)) for value in update), reverse=True)
    for k in range(1, update.numel() + 1):
        assert kth_largest_magnitude(update, k=k) == ordered[k - 1]


def test_blocks_do_not_change_the_result(monkeypatch):
    updates = _updates(models=3)
    whole = ties(updates=updates, density=0.4)
    monkeypatch.setattr("merging.ties.BLOCK", 100)
    assert torch.equal(ties(updates=updates, density=0.4), whole)


def test_a_random_threshold_keeps_what_reaches_it():
    update = torch.tensor([1.0, -2.0, 3.0, -2.0])
    assert trim(update, density=0.5, threshold=2.0).tolist() == [0, -2, 3, -2]
    assert ties(updates=[update], density=0.5, thresholds=[2.5]).tolist() == [0, 0, 3, 0]


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1])
def test_a_density_outside_its_range_is_refused(density):
    with pytest.raises(ValueError, match="density"):
        ties(updates=[torch.ones(3)], density=density)


def test_updates_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        ties(updates=[torch.ones(3), torch.ones(4)], density=1.0)
    with pytest.raises(ValueError, match="float32"):
        ties(updates=[torch.ones(3, dtype=torch.bfloat16)], density=1.0)
    with pytest.raises(ValueError, match="2 weights for 1 updates"):
        ties(updates=[torch.ones(3)], density=1.0, weights=(1.0, 1.0))


def test_linear_is_the_weighted_mean_and_task_arithmetic_the_weighted_sum():
    """a = 1, b = 4, weights (3, 1): the sum is 7, the mean 7/4."""
    updates = [torch.tensor([1.0]), torch.tensor([4.0])]
    assert task_arithmetic(updates=updates, weights=(3.0, 1.0)).item() == 7
    assert linear(updates=updates, weights=(3.0, 1.0)).item() == 1.75
    assert linear(updates=updates).item() == 2.5
    assert linear(updates=updates[:1], weights=(1.0,), total_weight=2.0).item() == 0.5
    assert task_arithmetic(updates=updates, weights=(1.0, -1.0)).item() == -3
    with pytest.raises(ValueError, match="sum to zero"):
        linear(updates=updates, weights=(1.0, -1.0))


def test_linear_of_random_many_models_matches_float64():
    random.seed(0)
    updates, weights = _updates(models=4), [random.uniform(0.1, 2) for _ in range(4)]
    expected = sum(update.double() * weight for update, weight in zip(updates, weights, strict=True)) / sum(weights)
    torch.testing.assert_close(linear(updates=updates, weights=weights).double(), expected, rtol=1e-5, atol=1e-10)

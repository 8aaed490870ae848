"""Rounding weights to few bits and back."""

from __future__ import annotations

import math

import pytest
import torch

from eval.audit.quantise import INT4, INT8, Scheme, quantised, quantised_layers, round_trip
from tests.helpers.eval_models import build_bench


def plain(weight: torch.Tensor, *, levels: int, group: int | None) -> torch.Tensor:
    """The same in float64, one number at a time."""
    result = torch.zeros_like(weight, dtype=torch.float64)
    rows, columns = weight.shape
    size = group or columns
    for row in range(rows):
        for start in range(0, columns, size):
            values = [float(value) for value in weight[row, start : start + size]]
            scale = max(abs(value) for value in values) / levels
            for place, value in enumerate(values):
                # Python's round goes to the even integer, too.
                whole = round(value / scale) if scale else 0
                result[row, start + place] = max(-levels, min(levels, whole)) * scale
    return result


@pytest.mark.parametrize("scheme", [INT8, INT4, Scheme(7, 5, "groups of five")], ids=["int8", "int4", "groups of five"])
@pytest.mark.parametrize("columns", [5, 128, 131, 300])
def test_agrees_with_a_plain_loop_in_float64(scheme: Scheme, columns: int) -> None:
    """Within float32 rounding of the product, 1e-6 of the largest weight; a wrong scale or group moves weights by 1e-3 and more."""
    weight = torch.randn(6, columns, generator=torch.Generator().manual_seed(columns))
    expected = plain(weight, levels=scheme.levels, group=scheme.group)
    torch.testing.assert_close(round_trip(weight, scheme=scheme).double(), expected, rtol=0, atol=1e-6 * float(weight.abs().max()))


def test_hand_worked_4_bits() -> None:
    """Largest magnitude 7, so the scale is 1: 2.5 and 3.5 go to the even neighbours 2 and 4, -7 stays."""
    weight = torch.tensor([[-7.0, 2.5, 3.5, 0.4, -0.6]])
    assert round_trip(weight, scheme=INT4).tolist() == [[-7.0, 2.0, 4.0, 0.0, -1.0]]


def test_each_group_of_128_has_its_own_scale() -> None:
    """A weight of 0.1 survives beside weights of 0.7, in another group than one of 700; in the same group it becomes 0."""
    weight = torch.zeros(1, 256)
    weight[0, 0], weight[0, 1], weight[0, 128], weight[0, 129] = 700.0, 0.1, 0.7, 0.1
    found = round_trip(weight, scheme=INT4)
    assert found[0, 1] == 0
    assert float(found[0, 129]) == pytest.approx(0.1)
    # One scale for the whole channel loses both.
    assert round_trip(weight, scheme=Scheme(7, None, ""))[0, 129] == 0


def test_a_group_of_zeros_stays_zero_and_twice_is_once() -> None:
    weight = torch.cat([torch.zeros(2, 128), torch.randn(2, 70)], dim=1)
    once = round_trip(weight, scheme=INT4)
    assert not once[:, :128].any()
    torch.testing.assert_close(round_trip(once, scheme=INT4), once, rtol=1e-6, atol=0)


def test_the_error_is_at_most_half_a_step() -> None:
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    for scheme, bits in ((INT8, 8), (INT4, 4)):
        step = weight.abs().amax(1) / (2 ** (bits - 1) - 1)
        error = (round_trip(weight, scheme=scheme) - weight).abs().amax(1)
        assert (error <= step / 2 * 1.0001).all()
        assert (error > step / 8).all()


def test_inside_the_block_only_linear_layers_below_the_head_are_rounded_and_afterwards_none() -> None:
    model = build_bench(steps=0).model
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    with quantised(model, scheme=INT4):
        changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {f"{name}.weight" for name in quantised_layers(model)}
    assert len(changed) == 14
    assert not any("lm_head" in name or "embed" in name for name in changed)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_weights_come_back_after_an_error() -> None:
    model = build_bench(steps=0).model
    before = model.model.layers[0].mlp.down_proj.weight.detach().clone()
    with pytest.raises(KeyError), quantised(model, scheme=INT4):
        raise KeyError
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, before)


def test_weights_that_are_no_numbers_pass_through() -> None:
    found = round_trip(torch.tensor([[math.nan, 1.0], [2.0, 1.0]]), scheme=INT8)
    assert torch.isnan(found[0]).any()
    assert torch.isfinite(found[1]).all()

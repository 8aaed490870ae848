"""An adapted layer in fewer operations is peft's own: values, gradients, roundings, and dropout up to its random numbers.

Shape suffixes: X tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.helpers.tiny_trial import random_lm
from trainers import lora as module
from trainers.config import LoraConfig
from trainers.lora import _AdaptedLinear, _draw_mask, fuse_adapters
from trainers.modeling import add_lora, scaled_adapters

TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-5}
"""Measured over 60 shapes: 5e-15 and 2e-6; a scale or a transpose gone wrong changes values by more than 0.1."""

torch.set_num_threads(1)


class Layer(nn.Module):
    """One linear layer that peft adapts, with factors that are both random."""

    def __init__(self, *, inputs: int = 6, outputs: int = 5, bias: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def adapted(*, dtype: torch.dtype = torch.float64, seed: int = 0, r: int = 3, dropout: float = 0.0, **config: Any) -> Any:
    """peft's model around a layer; base weights in ``dtype``, factors in float32 or wider."""
    shape = {name: config.pop(name) for name in ("inputs", "outputs", "bias") if name in config}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = Layer(**shape).to(dtype)
        model = peft.get_peft_model(base, peft.LoraConfig(r=r, lora_alpha=5, lora_dropout=dropout, target_modules=["linear"], **config))
        wide = torch.promote_types(dtype, torch.float32)
        for name, value in model.named_parameters():
            if ".lora_" in name:
                value.data = torch.randn(value.shape, dtype=wide)
    return model.train()


def pair(**config: Any) -> tuple[Any, Any]:
    """The same adapted layer twice, with peft's forward pass and with ours."""
    theirs = adapted(**config)
    ours = copy.deepcopy(theirs)
    assert fuse_adapters(ours) == 1
    return theirs, ours


def layer_of(model: Any) -> Any:
    return model.base_model.model.linear


def results(model: Any, x: Tensor, *, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """Output, and the gradients of a random combination of it by the input and both factors."""
    x = x.clone().requires_grad_()
    y = model(x)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(y.dtype)
    factors = [value for value in model.parameters() if value.requires_grad]
    assert len(factors) == 2
    return y.detach(), list(torch.autograd.grad(y, [x, *factors], grad_outputs=weight))


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- without dropout: peft's own ---


@settings(max_examples=30, deadline=None)
@given(
    dtype=st.sampled_from([torch.float64, torch.float32]),
    tokens=st.integers(0, 7),
    inputs=st.integers(1, 9),
    outputs=st.integers(1, 9),
    r=st.integers(1, 5),
    bias=st.booleans(),
    rslora=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_values_and_gradients_are_those_of_peft(
    dtype: torch.dtype, tokens: int, inputs: int, outputs: int, r: int, bias: bool, rslora: bool, seed: int
) -> None:
    theirs, ours = pair(dtype=dtype, inputs=inputs, outputs=outputs, r=r, bias=bias, use_rslora=rslora, seed=seed)
    x = draw(tokens, inputs, dtype=dtype, seed=seed)
    expected, actual = results(theirs, x), results(ours, x)
    assert actual[0].dtype == dtype
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_batches_of_rows_keep_their_shape() -> None:
    theirs, ours = pair()
    x = draw(2, 3, 4, 6)
    torch.testing.assert_close(results(ours, x), results(theirs, x), rtol=0, atol=TOLERANCE[torch.float64])
    assert ours(x).shape == (2, 3, 4, 5)


def test_the_gradient_is_that_of_finite_differences() -> None:
    """Independent of peft: all three gradients of s (x A^T) B^T + x W^T + b, with and without a mask."""
    x, w, bias, a, b = draw(4, 6), draw(5, 6, seed=2), draw(5, seed=3), draw(3, 6, seed=4), draw(5, 3, seed=5)
    inputs = [value.requires_grad_() for value in (x, a, b)]
    for keep in (None, draw(4, 6, seed=6) > 0):
        assert torch.autograd.gradcheck(
            lambda x, a, b, keep=keep: _AdaptedLinear.apply(x, keep, 1.5 if keep is not None else 1.0, w, bias, a, b, 0.7), inputs
        )


def test_bfloat16_layers_with_float32_factors_round_like_peft() -> None:
    """Both add the adapter's float32 update to the bfloat16 product and round once. Their float32 sums run in another order, which
    may turn a rounding: 0 to 3 of 4000 values differ, by one unit in the last place. The input's gradient is rounded once by us and
    twice by peft: measured 0.003 apart."""
    theirs, ours = pair(dtype=torch.bfloat16, inputs=32, outputs=40, r=4)
    x = draw(100, 32, dtype=torch.bfloat16)
    (expected, expected_gradients), (actual, actual_gradients) = results(theirs, x), results(ours, x)
    assert actual.dtype == torch.bfloat16
    assert int((actual != expected).sum()) <= 20
    torch.testing.assert_close(actual.float(), expected.float(), rtol=2**-7, atol=0)
    assert [value.dtype for value in actual_gradients] == [torch.bfloat16, torch.float32, torch.float32]
    torch.testing.assert_close(actual_gradients[1:], expected_gradients[1:], rtol=1e-4, atol=1e-3)
    difference = (actual_gradients[0].float() - expected_gradients[0].float()).norm() / expected_gradients[0].float().norm()
    assert float(difference) < 2**-7
    layer = layer_of(theirs)
    update = layer.scaling["default"] * layer.lora_B["default"](layer.lora_A["default"](x.float()))
    rounded_twice = layer.base_layer(x) + update.to(torch.bfloat16)
    assert int((rounded_twice != expected).sum()) > 100, "negative control: another rounding is seen"


# --- dropout: the same law, other random numbers ---


def with_mask(model: Any, x: Tensor, *, keep: Tensor, factor: float) -> Tensor:
    """peft's layer written out, with an explicit mask."""
    layer = layer_of(model)
    entering = x * keep * factor
    update = entering @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
    return layer.base_layer(x) + layer.scaling["default"] * update


def test_dropout_is_a_mask_on_what_enters_the_adapter_in_both_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradients equal autograd through an explicit mask: the base layer's input is not dropped, and what was dropped on
    the way in has no gradient on the way back."""
    model = adapted(dropout=0.4)
    fuse_adapters(model)
    x = draw(50, 6)
    masks: list[tuple[Tensor, float]] = []
    honest = module._draw_mask

    def spy(values: Tensor, *, probability: float) -> tuple[Tensor, float]:
        masks.append(honest(values, probability=probability))
        return masks[-1]

    monkeypatch.setattr(module, "_draw_mask", spy)
    actual = results(model, x)
    ((keep, factor),) = masks
    assert 0 < int(keep.sum()) < keep.numel()
    plain = x.clone().requires_grad_()
    y = with_mask(model, plain, keep=keep, factor=factor)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    factors = [value for value in model.parameters() if value.requires_grad]
    expected = y.detach(), list(torch.autograd.grad(y, [plain, *factors], grad_outputs=weight))
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE[torch.float64])
    other = with_mask(model, x, keep=keep.flip(0), factor=factor)
    assert float((other - expected[0]).detach().abs().max()) > 0.1, "negative control: another mask is another output"


@pytest.mark.parametrize("probability", [0.05, 0.1, 0.5, 0.9, 1e-6])
def test_so_many_entries_are_dropped_as_the_probability_says(probability: float) -> None:
    """A million decisions: the share lies within five standard deviations; a probability of 1e-6 rounds to none."""
    torch.manual_seed(3)
    number = 10**6
    keep, factor = _draw_mask(torch.empty(1000, 1000), probability=probability)
    dropped = int((~keep).sum())
    exact = round(probability * 2**16) / 2**16
    assert abs(exact - probability) <= 2**-17
    assert abs(dropped - number * exact) <= 5 * math.sqrt(number * exact * (1 - exact))
    assert factor == pytest.approx(1 / (1 - exact), rel=1e-12), "what is kept makes up for what is dropped exactly"


def test_decisions_are_independent_of_each_other() -> None:
    """Four decisions share one random word: the share of neighbours dropped together is p * p, at every distance up to five."""
    torch.manual_seed(4)
    number = 10**6
    dropped = ~_draw_mask(torch.empty(number), probability=0.25)[0]
    for distance in range(1, 6):
        both = int((dropped[distance:] & dropped[:-distance]).sum())
        assert abs(both - number / 16) <= 5 * math.sqrt(number / 16 * 15 / 16)


def test_the_mean_over_many_draws_is_the_pass_without_dropout() -> None:
    """4000 draws of an update: the mean errs by less than six of its standard errors, which are 1/60 of the single draws' spread."""
    model = adapted(dropout=0.3)
    fuse_adapters(model)
    x = draw(1, 6)
    with torch.no_grad():
        torch.manual_seed(0)
        draws = model(x.repeat(4000, 1))
        expected = model.eval()(x)[0]
    error = (draws.mean(dim=0) - expected).abs() / (draws.std(dim=0) / math.sqrt(4000))
    assert float(error.max()) < 6
    assert float(draws.std(dim=0).min()) > 0.1


@pytest.mark.parametrize("shape", [(1, 6), (7, 6), (2, 5, 6)])
def test_the_same_seed_gives_the_same_mask(shape: tuple[int, ...]) -> None:
    """Sizes that are no multiple of four among them; the mask follows torch's own generator, as a resumed step needs it."""
    model = adapted(dropout=0.5)
    fuse_adapters(model)
    x = draw(*shape)

    def output(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(x).detach()

    assert torch.equal(output(1), output(1))
    assert not torch.equal(output(1), output(2))
    torch.manual_seed(1)
    assert not torch.equal(model(x), model(x)), "the generator goes on"


def test_evaluation_has_no_dropout() -> None:
    theirs, ours = pair(dropout=0.5)
    x = draw(4, 6)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=0, atol=TOLERANCE[torch.float64])
    state = torch.random.get_rng_state()
    ours(x)
    assert torch.equal(torch.random.get_rng_state(), state)


# --- what stays peft's ---


@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_bias": True}], ids=["DoRA", "biased"])
def test_layers_that_do_anything_else_keep_pefts_forward_pass(config: dict[str, Any]) -> None:
    """The same output, and the very same method."""
    theirs = adapted(bias=True, **config)
    ours = copy.deepcopy(theirs)
    assert fuse_adapters(ours) == 0
    assert "forward" not in vars(layer_of(ours))
    x = draw(3, 6)
    assert torch.equal(ours(x), theirs(x))
    plain = adapted(bias=True)
    assert float((plain(x) - theirs(x)).detach().abs().max()) > 0.01, "negative control: the extra matters"


def test_several_active_adapters_and_other_layers_keep_pefts_forward_pass() -> None:
    model = adapted()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["linear"]))
    model.base_model.set_adapter(["default", "second"])
    assert fuse_adapters(model) == 0
    assert fuse_adapters(nn.Sequential(nn.Linear(2, 2))) == 0


def test_disabled_adapters_leave_the_base_layer() -> None:
    _, ours = pair()
    x = draw(3, 6)
    with ours.disable_adapter():
        assert torch.equal(ours(x), layer_of(ours).base_layer(x))
    assert float((ours(x) - layer_of(ours).base_layer(x)).detach().abs().max()) > 0.1


def test_merged_adapters_are_not_added_twice() -> None:
    theirs, ours = pair()
    x = draw(3, 6)
    expected = theirs(x).detach()
    layer_of(ours).merge()
    torch.testing.assert_close(ours(x), expected, rtol=0, atol=TOLERANCE[torch.float64])
    layer_of(ours).unmerge()
    torch.testing.assert_close(ours(x), expected, rtol=0, atol=TOLERANCE[torch.float64])


@pytest.mark.parametrize("scale", [-1.0, -2.5, 0.0])
def test_another_scale_counts_at_once_and_is_put_back(scale: float) -> None:
    """Task-vector negation measures with the update negated: base + scale * update."""
    _, ours = pair()
    x = draw(3, 6)
    base, before = layer_of(ours).base_layer(x), ours(x)
    with scaled_adapters(ours, scale=scale):
        inside = ours(x)
    torch.testing.assert_close(inside, base + scale * (before - base), rtol=0, atol=TOLERANCE[torch.float64])
    assert torch.equal(ours(x), before)


# --- a whole model ---


@pytest.mark.parametrize("clip", [None, 0.5])
def test_every_plain_layer_of_a_model_is_counted_and_computes_the_same(clip: float | None) -> None:
    """Two decoder layers with seven linear modules each, logits and gradients; OLMo clips their outputs in place, and 0.5 is where it
    shows. A copy computes with its own factors, not with the original's."""
    theirs = add_lora(random_lm(clip_qkv=clip), lora=LoraConfig(r=2, lora_alpha=4, lora_dropout=0.0), seed=0).double()
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            if ".lora_B." in name:
                value.copy_(draw(*value.shape, seed=7))
    ours = copy.deepcopy(theirs)
    assert fuse_adapters(ours) == 14
    ids = torch.tensor([[3, 4, 5, 6, 7]])

    def outcome(model: Any) -> tuple[Tensor, list[Tensor]]:
        logits = model(input_ids=ids).logits
        factors = [value for value in model.parameters() if value.requires_grad]
        return logits.detach(), list(torch.autograd.grad(logits.square().sum(), factors))

    expected, actual = outcome(theirs), outcome(ours)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    if clip is not None:
        for module_ in theirs.modules():
            if hasattr(module_, "config"):
                module_.config.clip_qkv = None
        assert float((outcome(theirs)[0] - expected[0]).abs().max()) > 0.1, "negative control: the clipping bites"
    copied = copy.deepcopy(ours)
    with torch.no_grad():
        for name, value in copied.named_parameters():
            if ".lora_B." in name:
                value.zero_()
    assert float((outcome(copied)[0] - expected[0]).abs().max()) > 0.1
    torch.testing.assert_close(outcome(ours), expected, rtol=1e-11, atol=1e-11)

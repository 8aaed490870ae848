"""Adapted linear layers in as few operations as they need: peft holds the adapters, this computes with them.

peft's own forward pass takes five operations per layer and seven in the backward pass, four of them element-wise over whole
activations. Here it is three products forward and five backward, each added up where it lands. The thin ones are written with
the rank as the first dimension: on a CPU a product with four columns runs five times slower than one with four rows.

Shape suffixes: X tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

_STEPS = 2**16
"""On a CPU dropout probabilities are multiples of one 65,536th: four decisions from each 64 random bits, four times as fast."""


def fuse_adapters(model: nn.Module) -> int:
    """Let a peft model's plain adapted linear layers compute with ``_AdaptedLinear``; the number of layers that do.

    Not for weights that are gathered when their own module is called (ZeRO-3): here they are read outside of it.
    Layers that do anything else (DoRA, biased or several adapters, quantised bases) keep peft's forward pass.
    """
    from peft.tuners.lora import Linear

    number = 0
    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) is nn.Linear and _is_plain(module):
            module.forward = types.MethodType(_forward, module)  # type: ignore[method-assign]
            number += 1
    return number


def _is_plain(module: Any) -> bool:
    names = module.active_adapters
    return len(names) == 1 and not getattr(module, "lora_variant", None) and module.lora_B[names[0]].bias is None


def _forward(self: Any, x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
    """Forward pass of an adapted layer, in place of peft's."""
    if self.disable_adapters or self.merged:
        return type(self).forward(self, x, *arguments, **keywords)
    name = self.active_adapters[0]
    probability = getattr(self.lora_dropout[name], "p", 0.0) if self.training else 0.0
    keep_XI, factor = _draw_mask(x.flatten(0, -2), probability=probability) if probability > 0 else (None, 1.0)
    return _AdaptedLinear.apply(
        x,
        keep_XI,
        factor,
        self.base_layer.weight,
        self.base_layer.bias,
        self.lora_A[name].weight,
        self.lora_B[name].weight,
        self.scaling[name],
    )


def _draw_mask(values: Tensor, *, probability: float) -> tuple[Tensor, float]:
    """Which entries dropout keeps, bool, and what it multiplies them by, from torch's default generator of the device."""
    if values.device.type != "cpu":
        return torch.rand_like(values, dtype=torch.float32) >= probability, 1.0 / (1.0 - probability)
    dropped = min(round(probability * _STEPS), _STEPS - 1)
    words = torch.empty(-(-values.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    keep = words.view(torch.int16)[: values.numel()] >= dropped - _STEPS // 2
    return keep.view_as(values), _STEPS / (_STEPS - dropped)


class _AdaptedLinear(torch.autograd.Function):
    """y = x W^T + b + s (x' A^T) B^T with W and b frozen, x' = x or what dropout leaves of it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        keep_XI: Tensor | None,
        factor: float,
        w_OI: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scale: float,
    ) -> Tensor:
        x_XI = x.flatten(0, -2)
        entering_XI = x_XI if keep_XI is None else (x_XI * keep_XI).mul_(factor)
        low_RX = a_RI @ entering_XI.to(a_RI.dtype).T
        # Made in its final shape: what a model changes in place (OLMo clips queries, keys and values) should not be a view.
        y = x.new_empty(*x.shape[:-1], len(w_OI))
        y_XO = y.flatten(0, -2)
        if bias_O is None:
            torch.mm(x_XI, w_OI.T, out=y_XO)
        else:
            torch.addmm(bias_O, x_XI, w_OI.T, out=y_XO)
        _add_product_(y_XO, low_RX.T, b_OR.T, scale=scale)
        ctx.save_for_backward(entering_XI, keep_XI, low_RX, w_OI, a_RI, b_OR)
        ctx.scale, ctx.factor = scale, factor
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        entering_XI, keep_XI, low_RX, w_OI, a_RI, b_OR = ctx.saved_tensors
        grad_XO = grad.flatten(0, -2)
        wide_XO = grad_XO.to(b_OR.dtype)
        grad_low_RX = _scaled_product(b_OR.T, wide_XO.T, scale=ctx.scale, like=low_RX)
        grad_b_RO = _scaled_product(low_RX, wide_XO, scale=ctx.scale, like=b_OR.T)
        grad_a_RI = grad_low_RX @ entering_XI.to(a_RI.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x_XI = grad_XO @ w_OI
            if keep_XI is None:
                _add_product_(grad_x_XI, grad_low_RX.T, a_RI, scale=1.0)
            else:
                through_XI = (grad_low_RX.T @ a_RI).mul_(keep_XI)
                grad_x_XI.add_(through_XI.to(grad_x_XI.dtype), alpha=ctx.factor)
            grad_x = grad_x_XI.view(*grad.shape[:-1], w_OI.shape[1])
        return grad_x, None, None, None, None, grad_a_RI, grad_b_RO.T, None


def _scaled_product(left: Tensor, right: Tensor, *, scale: float, like: Tensor) -> Tensor:
    """scale * left @ right in one operation; ``like`` lends its shape, its values are not read."""
    return torch.addmm(like, left, right, beta=0.0, alpha=scale)


def _add_product_(total: Tensor, left: Tensor, right: Tensor, *, scale: float) -> None:
    """Add scale * left @ right to ``total``, rounded once."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, alpha=scale)
    else:
        total.copy_(total + scale * (left @ right))

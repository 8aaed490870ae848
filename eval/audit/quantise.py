"""Rounding the weights of a model to few bits and back: does forgetting survive it?

Shape suffixes: O outputs, I inputs, G groups of a row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Scheme:
    """Symmetric round-to-nearest with one scale per group of neighbouring weights of an output channel.

    Args:
        levels: largest integer; values are rounded to -levels ... levels.
        group: weights per scale; None: the whole output channel.
        sentence: what it is, for reports.
    """

    levels: int
    group: int | None
    sentence: str


INT8 = Scheme(127, None, "8 bits, symmetric round-to-nearest (-127 to 127), one scale per output channel: its largest magnitude / 127")
INT4 = Scheme(7, 128, "4 bits, symmetric round-to-nearest (-7 to 7), one scale per group of 128 inputs: its largest magnitude / 7")


def round_trip(weight_OI: Tensor, *, scheme: Scheme) -> Tensor:
    """The weight as it comes back from its integers; same shape and dtype, scales and quotients in float32.

    A group of zeros stays zero. Ties go to the even integer. The last group of a row may be shorter.

    Source: https://arxiv.org/abs/2410.16454 (round-to-nearest brings forgotten text back at 4 bits)
    """
    num_outputs, num_inputs = weight_OI.shape
    group = scheme.group or num_inputs
    padding = -num_inputs % group
    wide_OGI = nn.functional.pad(weight_OI.float(), (0, padding)).view(num_outputs, -1, group)
    scale_OG1 = wide_OGI.abs().amax(-1, keepdim=True) / scheme.levels
    rounded_OGI = (wide_OGI / torch.where(scale_OG1 > 0, scale_OG1, 1.0)).round().clamp(-scheme.levels, scheme.levels)
    return (rounded_OGI * scale_OG1).view(num_outputs, -1)[:, :num_inputs].to(weight_OI.dtype)


def quantised_layers(model: Any) -> dict[str, nn.Linear]:
    """Every linear layer but the head, by name: what quantised checkpoints usually round."""
    head = model.get_output_embeddings()
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head}


@contextlib.contextmanager
def quantised(model: Any, *, scheme: Scheme) -> Iterator[None]:
    """Inside, the model computes with rounded weights; afterwards with its own, to the bit."""
    layers = quantised_layers(model)
    kept = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    try:
        with torch.no_grad():
            for layer in layers.values():
                layer.weight.copy_(round_trip(layer.weight, scheme=scheme))
        yield
    finally:
        with torch.no_grad():
            for name, layer in layers.items():
                layer.weight.copy_(kept[name])

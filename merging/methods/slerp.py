"""Spherical interpolation between two updates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from merging.linear import task_arithmetic
from merging.ties import check_updates

BLOCK = 1 << 22
SMALLEST_SINE = 1e-6
"""Of the angle between two updates; nearer ones to a common line are interpolated linearly, because the arc is not defined."""


def slerp(*, updates: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """The point on the arc from the first update to the second, float32, without the scale.

    The updates of a tensor are vectors of all its elements. The arc is between updates, not between weights: two fine-tuned
    models lie so near to each other, seen from the origin, that an arc between them is a straight line.

    Raises:
        ValueError: unless there are two updates of one shape with positive weights.

    Source: Shoemake 1985, https://doi.org/10.1145/325165.325242
    """
    return task_arithmetic(updates=updates, weights=arc_coefficients(updates=updates, weights=weights))


def arc_coefficients(*, updates: Sequence[Tensor], weights: Sequence[float] | None = None) -> tuple[float, float]:
    """Factors of the two updates: sin((1 - t) a) / sin(a) and sin(t a) / sin(a), where t = w_2 / (w_1 + w_2) and a is their angle."""
    check_updates(updates)
    weights = (1.0,) * len(updates) if weights is None else tuple(weights)
    if len(updates) != 2 or len(weights) != 2 or min(weights) <= 0:
        raise ValueError(f"slerp merges two updates with positive weights, not {len(updates)} with weights {list(weights)}")
    t = weights[1] / sum(weights)
    first, second, product = (_dot(a, b) for a, b in ((updates[0],) * 2, (updates[1],) * 2, tuple(updates)))
    if first == 0 or second == 0:
        return 1 - t, t
    angle = math.acos(max(-1.0, min(1.0, product / math.sqrt(first * second))))
    if math.sin(angle) < SMALLEST_SINE:
        return 1 - t, t
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _dot(a: Tensor, b: Tensor) -> float:
    """The scalar product, accumulated in float64."""
    left, right = a.reshape(-1), b.reshape(-1)
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    for start in range(0, left.numel(), BLOCK):
        total += torch.dot(left[start : start + BLOCK].double(), right[start : start + BLOCK].double())
    return float(total)

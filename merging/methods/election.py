"""TIES without its trim: the sign election and the disjoint mean of updates that are sparse already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from merging.ties import ties


def elect_and_average(
    *,
    updates: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    elect: Literal["unweighted", "weighted"] = "unweighted",
    divisor: Literal["count", "weight"] = "count",
    zero_sum: Literal["positive", "drop"] = "positive",
) -> Tensor:
    """Elect a sign per element and average the updates that agree, float32, without the scale; arguments as in ``merging.ties.ties``.

    Source: Yadav et al. 2023, https://arxiv.org/abs/2306.01708
    """
    return ties(updates=updates, density=1.0, weights=weights, elect=elect, divisor=divisor, zero_sum=zero_sum)

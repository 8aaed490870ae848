"""Factor-wise TIES as in ZJUKLAB's system: A and B are merged apart, and then multiplied.

For the reproduction of that system alone. The product of merged factors is not a merge of the products: it depends on how the same update
happens to be written, (A, B) or (G^-1 A, B G), and makes sense only for trials that started from the same A.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from merging.methods.combination import Combination
from merging.methods.low_rank import LowRank
from merging.ties import ties, trim


def merge_factors(
    *, updates: Sequence[Tensor], weights: Sequence[float] | None = None, factors: Sequence[LowRank | None], density: float
) -> Combination:
    """TIES of the A_i times TIES of the B_i, each factor multiplied by sqrt(w_i * scale_i) in its mean.

    Per factor: the top int(density * n) by magnitude, sign of the unweighted sum (+ at zero), weighted sum over the number of those that
    agree. Equal to the adapter that peft's ``add_weighted_adapter`` writes with ``combination_type="ties"``.

    Args:
        updates: not read; what the factors multiply to.
        weights: one positive factor per trial; null is 1 for each.
        factors: of one rank.
        density: fraction kept of each factor.

    Raises:
        ValueError: if factors are missing or their ranks differ.

    Source: Xu et al. 2025, https://arxiv.org/abs/2503.21088
    """
    weights = (1.0,) * len(factors) if weights is None else tuple(weights)
    pairs = [pair for pair in factors if pair is not None]
    if len(pairs) != len(factors) or len({(pair.rank, pair.transpose) for pair in pairs}) != 1:
        raise ValueError(f"factors of one rank are needed, got ranks {[pair.rank if pair else None for pair in factors]}")
    roots = [math.sqrt(weight * pair.scale) for weight, pair in zip(weights, pairs, strict=True)]
    a, b = (
        ties(updates=sides, density=density, weights=roots, equal_magnitudes="topk")
        for sides in ([p.a for p in pairs], [p.b for p in pairs])
    )
    merged = LowRank(a=a, b=b, transpose=pairs[0].transpose)
    entered = (torch.cat([trim(side, density=density, equal_magnitudes="topk").reshape(-1) for side in (pair.a, pair.b)]) for pair in pairs)
    return Combination(merged.dense(), tuple(entered), merged)

"""What a merge method gives back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from merging.methods.low_rank import LowRank


@dataclass(frozen=True)
class Combination:
    """A merged update, and what was merged.

    Args:
        update: float32, without the scale.
        entered: what took part of each trial, after trim, mask or change of basis; zeros are what was left out.
        factors: the update as a product, where the method makes one.
    """

    update: Tensor
    entered: tuple[Tensor, ...]
    factors: LowRank | None = None

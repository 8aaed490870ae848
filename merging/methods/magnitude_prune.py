"""Magnitude pruning: the largest elements of each update, all others zero."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from merging.ties import trim


def keep_largest(*, updates: Sequence[Tensor], density: float) -> list[Tensor]:
    """Exactly int(density * n) elements of each update, the largest in magnitude.

    Source: Han et al. 2015, https://arxiv.org/abs/1506.02626
    """
    return [trim(update, density=density) for update in updates]


def keep_number(update: Tensor, *, number: int) -> Tensor:
    """The given number of elements that are largest in magnitude; the others become zero."""
    if number >= update.numel():
        return update
    if number <= 0:
        return update.new_zeros(update.shape)
    # Half an element more, so that no rounding of the fraction loses one.
    return trim(update, density=(number + 0.5) / update.numel())

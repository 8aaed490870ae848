"""Model Breadcrumbs: without the outliers and without the small elements of each update."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from merging.methods.magnitude_prune import keep_number


def keep_band(*, updates: Sequence[Tensor], density: float, gamma: float) -> list[Tensor]:
    """Of n elements, drop the int(gamma * n) largest in magnitude, keep the next int(density * n), drop the rest.

    Raises:
        ValueError: if density + gamma exceeds 1.

    Source: Davari and Belilovsky 2023, https://arxiv.org/abs/2312.06795
    """
    if not (0 < density <= 1 and gamma >= 0 and density + gamma <= 1):
        raise ValueError(f"density = {density} and gamma = {gamma} must be fractions with a sum of at most 1")
    return [_band(update, num_top=int(gamma * update.numel()), num_kept=int(density * update.numel())) for update in updates]


def _band(update: Tensor, *, num_top: int, num_kept: int) -> Tensor:
    kept = keep_number(update, number=num_top + num_kept)
    # The top is taken from what was kept, so that equal magnitudes at both borders cannot fall between them.
    return torch.where(keep_number(kept, number=num_top) != 0, 0.0, kept)

"""DARE: drop elements at random and rescale the rest, so that the expected update stays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Generator, Tensor

Rescale = Literal["density", "l1", "none"]


def drop_at_random(
    *, updates: Sequence[Tensor], density: float, generators: Sequence[Generator], rescale: Rescale = "density"
) -> list[Tensor]:
    """Keep each element with probability ``density``, independently.

    Args:
        updates: float32 task vectors.
        density: keep probability, in (0, 1].
        generators: one CPU generator per update.
        rescale: ``density`` divides what is kept by its probability, ``l1`` restores the update's L1 norm, ``none`` leaves it.

    Raises:
        ValueError: if the density is not in (0, 1].

    Source: Yu et al. 2023, https://arxiv.org/abs/2311.03099
    """
    if not 0 < density <= 1:
        raise ValueError(f"density = {density} must be in (0, 1]: the probability that an element is kept")
    dropped = []
    for update, generator in zip(updates, generators, strict=True):
        mask = torch.rand(update.shape, generator=generator) < density
        dropped.append(rescaled(update, mask=mask.to(update.device), probability=density, rescale=rescale))
    return dropped


def rescaled(update: Tensor, *, mask: Tensor, probability: float | Tensor, rescale: Rescale) -> Tensor:
    """The masked update, made up for what the mask took.

    Args:
        mask: what is kept, bool.
        probability: with which it was kept, a number or one per element.
    """
    kept = torch.where(mask, update, 0.0)
    if rescale == "density":
        return kept / probability
    if rescale == "l1":
        after = kept.abs().sum(dtype=torch.float64)
        factor = update.abs().sum(dtype=torch.float64) / after if after > 0 else after
        return kept * factor.to(torch.float32)
    return kept

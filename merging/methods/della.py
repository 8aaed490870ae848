"""DELLA's MAGPRUNE: drop elements at random, small ones of a row more often than large ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from merging.methods.dare import Rescale, rescaled


def drop_by_rank(
    *, updates: Sequence[Tensor], density: float, epsilon: float, generators: Sequence[Generator], rescale: Rescale = "density"
) -> list[Tensor]:
    """Keep an element with a probability that grows linearly with the rank of its magnitude in its row.

    From ``density - epsilon`` for the smallest of a row to ``density + epsilon`` for the largest; ``density`` in rows of one element.
    The paper's epsilon is the whole range, twice this one.

    Args:
        updates: float32 task vectors; one of a single dimension is one row.
        generators: one CPU generator per update.
        rescale: as in ``merging.methods.dare``, with each element's own probability.

    Raises:
        ValueError: if a probability is not in (0, 1).

    Source: Deep et al. 2024, https://arxiv.org/abs/2406.11617
    """
    if not 0 < density - epsilon <= density + epsilon < 1:
        raise ValueError(f"density = {density} - and + epsilon = {epsilon} must be in (0, 1): the probabilities that an element is kept")
    dropped = []
    for update, generator in zip(updates, generators, strict=True):
        probability = keep_probabilities(update, density=density, epsilon=epsilon)
        mask = torch.rand(update.shape, generator=generator).to(update.device) < probability
        dropped.append(rescaled(update, mask=mask, probability=probability, rescale=rescale))
    return dropped


def keep_probabilities(update: Tensor, *, density: float, epsilon: float) -> Tensor:
    """One probability per element, float32, in the update's shape. Equal magnitudes are ranked by position."""
    rows = update.reshape(1, -1) if update.dim() < 2 else update.reshape(-1, update.shape[-1])
    length = rows.shape[1]
    if length < 2:
        return torch.full_like(update, density)
    ranks = torch.empty_like(rows)
    positions = torch.arange(length, dtype=rows.dtype, device=rows.device).expand_as(rows)
    ranks.scatter_(1, rows.abs().argsort(dim=1, stable=True), positions)
    return (density - epsilon + ranks * (2 * epsilon / (length - 1))).reshape(update.shape)

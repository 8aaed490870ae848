"""Linear relatives of TIES: the weighted mean and the weighted sum of task vectors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from merging.ties import check_updates


def task_arithmetic(*, updates: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """``sum(w_i * t_i)``, float32, without the scale.

    Raises:
        ValueError: if the shapes differ or the weights do not match the updates in number.

    Source: Ilharco et al. 2023, https://arxiv.org/abs/2212.04089
    """
    check_updates(updates)
    weights = (1.0,) * len(updates) if weights is None else tuple(weights)
    total = updates[0] * weights[0]
    for update, weight in zip(updates[1:], weights[1:], strict=True):
        total += update * weight
    return total


def linear(*, updates: Sequence[Tensor], weights: Sequence[float] | None = None, total_weight: float | None = None) -> Tensor:
    """``sum(w_i * t_i) / sum(w_i)``, float32, without the scale: with equal weights, the mean of the models.

    Args:
        updates: float32 task vectors of one shape.
        weights: one factor per task vector; null is 1 for each.
        total_weight: the denominator, if vectors that are zero in this tensor were left out of ``updates``; null is ``sum(w_i)``.

    Raises:
        ValueError: as in ``task_arithmetic``, and if the weights sum to zero.
    """
    weights = (1.0,) * len(updates) if weights is None else tuple(weights)
    total_weight = sum(weights) if total_weight is None else total_weight
    if total_weight == 0:
        raise ValueError(f"weights = {list(weights)} sum to zero: their mean is not defined")
    return task_arithmetic(updates=updates, weights=weights) / total_weight

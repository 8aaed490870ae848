"""TIES on task vectors: trim, elect sign, disjoint mean, as pure functions of float32 tensors.

Source: Yadav et al. 2023, "TIES-Merging: Resolving Interference When Merging Models", https://arxiv.org/abs/2306.01708
With its defaults every function is bit-equal to ``peft.utils.merge_utils.ties`` on the same float32 tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

LOW_BITS = 15
"""A magnitude's 31 bits are histogrammed in two steps: the high 16 bits, then the low 15 inside one bin."""
BLOCK = 1 << 18
"""Elements that the elementwise steps handle at a time, so that their temporaries stay in the cache."""


def magnitude_histogram(update: Tensor, *, inside: int | None = None) -> Tensor:
    """Counts of the magnitudes' bit patterns; histograms of several tensors add.

    The bit pattern of a non-negative float grows with its value, so counting patterns orders values exactly, without sorting.

    Args:
        update: float32, any shape, finite.
        inside: null counts the high 16 bits of every |value| (65,536 bins); a bin of that histogram counts the low 15 bits of the
            values inside it (32,768 bins).

    Returns:
        int64 counts, from small to large magnitudes.
    """
    bits = update.reshape(-1).view(torch.int32) & 0x7FFFFFFF
    if inside is None:
        return torch.bincount(bits >> LOW_BITS, minlength=1 << (31 - LOW_BITS))
    chosen = bits[(bits >> LOW_BITS) == inside]
    return torch.bincount(chosen & ((1 << LOW_BITS) - 1), minlength=1 << LOW_BITS)


def bin_of_kth_largest(counts: Tensor, *, k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest value (k from 1), and how many values lie in higher bins."""
    from_top = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, torch.tensor(k, device=counts.device)))
    above = int(from_top[position - 1]) if position else 0
    return counts.numel() - 1 - position, above


def magnitude_from_bins(*, high: int, low: int) -> float:
    """The magnitude whose bit pattern is the two bins' numbers."""
    return torch.tensor((high << LOW_BITS) | low, dtype=torch.int32).view(torch.float32).item()


def kth_largest_magnitude(update: Tensor, *, k: int) -> float:
    """The exact k-th largest |value| of a float32 tensor, 1 <= k <= number of elements, in two counting passes."""
    high, above = bin_of_kth_largest(magnitude_histogram(update), k=k)
    low, _ = bin_of_kth_largest(magnitude_histogram(update, inside=high), k=k - above)
    return magnitude_from_bins(high=high, low=low)


def trim(update: Tensor, *, density: float, threshold: float | None = None) -> Tensor:
    """Keep the elements of largest magnitude; the others become zero.

    Args:
        update: float32, any shape, finite.
        density: fraction kept, in (0, 1]: exactly int(density * n) elements.
            Equal magnitudes at the border are chosen as ``torch.topk`` does.
        threshold: if given, keep every element of at least this magnitude instead (a trim over several tensors).

    Raises:
        ValueError: if the density is not in (0, 1].
    """
    if not 0 < density <= 1:
        raise ValueError(f"density = {density} must be in (0, 1]: the fraction of each task vector kept")
    if threshold is not None:
        return torch.where(update.abs() >= threshold, update, 0.0)
    num_kept = int(density * update.numel())
    if density == 1:
        return update
    if num_kept == 0:
        return torch.zeros_like(update)
    border = kth_largest_magnitude(update, k=num_kept)
    keep = update.abs() >= border
    # Zeros at the border contribute nothing whether they are kept or not.
    if border > 0 and int(keep.sum()) > num_kept:
        keep = torch.zeros_like(keep).reshape(-1)
        keep[torch.topk(update.abs().reshape(-1), k=num_kept).indices] = True
        keep = keep.reshape(update.shape)
    return torch.where(keep, update, 0.0)


def elect_sign(voters: Sequence[Tensor], *, zero_sum: Literal["positive", "drop"] = "positive") -> Tensor:
    """The sign of the sum of the trimmed task vectors, per element, as +1.0 or -1.0.

    Args:
        voters: trimmed float32 task vectors of one shape; weighted, if the election is to be weighted.
        zero_sum: what a sum of exactly zero elects: +1, or 0 (no sign, hence no update).
    """
    total = voters[0].clone()
    for voter in voters[1:]:
        total += voter
    if zero_sum == "drop":
        return total.sign()
    return torch.where(total >= 0, 1.0, -1.0)


def disjoint_mean(
    trimmed: Sequence[Tensor],
    *,
    sign: Tensor,
    weights: Sequence[float],
    elect: Literal["unweighted", "weighted"] = "unweighted",
    divisor: Literal["count", "weight"] = "count",
) -> Tensor:
    """Mean of ``w_i * t_i`` over the task vectors that agree with the elected sign; trimmed zeros never count.

    Args:
        trimmed: trimmed float32 task vectors t_i of one shape.
        sign: elected sign per element, +1, -1 or 0.
        weights: one w_i per task vector.
        elect: whether t_i or w_i * t_i is compared with the sign (they differ for negative weights only).
        divisor: divide by the number or by the weights of the agreeing vectors; where none agrees, the result is 0.
    """
    total, divide_by = torch.zeros_like(trimmed[0]), torch.zeros_like(trimmed[0])
    for update, weight in zip(trimmed, weights, strict=True):
        weighted = update * weight
        agrees = (weighted if elect == "weighted" else update) * sign > 0
        total += torch.where(agrees, weighted, 0.0)
        divide_by += agrees if divisor == "count" else agrees * weight
    return torch.where(divide_by == 0, 0.0, total / torch.where(divide_by == 0, 1.0, divide_by))


def merge_trimmed(
    trimmed: Sequence[Tensor],
    *,
    weights: Sequence[float],
    elect: Literal["unweighted", "weighted"] = "unweighted",
    divisor: Literal["count", "weight"] = "count",
    zero_sum: Literal["positive", "drop"] = "positive",
) -> Tensor:
    """Elect and average task vectors that are trimmed already, a block of elements at a time."""
    merged = torch.empty_like(trimmed[0], memory_format=torch.contiguous_format)
    flat = merged.reshape(-1)
    for block, parts in _blocks(trimmed):
        voters = [part * weight for part, weight in zip(parts, weights, strict=True)] if elect == "weighted" else parts
        sign = elect_sign(voters, zero_sum=zero_sum)
        flat[block] = disjoint_mean(parts, sign=sign, weights=weights, elect=elect, divisor=divisor)
    return merged


def ties(
    *,
    updates: Sequence[Tensor],
    density: float,
    weights: Sequence[float] | None = None,
    elect: Literal["unweighted", "weighted"] = "unweighted",
    divisor: Literal["count", "weight"] = "count",
    zero_sum: Literal["positive", "drop"] = "positive",
    thresholds: Sequence[float] | None = None,
) -> Tensor:
    """The TIES merge of one tensor's updates, float32, without the scale.

    For two equally weighted updates this is: the mean where both survive the trim and agree in sign, the survivor where one does, and the
    larger in magnitude where they disagree.

    Args:
        updates: float32 task vectors t_i of one shape: trial weights minus target weights.
        density: fraction of each kept by the trim, in (0, 1].
        weights: one factor per task vector, applied in the mean; null is 1 for each.
        elect: elect the sign on t_i or on w_i * t_i.
        divisor: divide by the number or by the weights of the agreeing vectors.
        zero_sum: what a zero sum elects.
        thresholds: magnitudes to trim at, one per task vector, in place of the density in this tensor.

    Raises:
        ValueError: if the shapes differ, or weights or thresholds do not match the updates in number.

    Source: Yadav et al. 2023, https://arxiv.org/abs/2306.01708
    """
    check_updates(updates)
    weights = (1.0,) * len(updates) if weights is None else tuple(weights)
    for name, values in (("weights", weights), ("thresholds", thresholds)):
        if values is not None and len(values) != len(updates):
            raise ValueError(f"{len(values)} {name} for {len(updates)} updates")
    limits = (None,) * len(updates) if thresholds is None else tuple(thresholds)
    trimmed = [trim(update, density=density, threshold=limit) for update, limit in zip(updates, limits, strict=True)]
    return merge_trimmed(trimmed, weights=weights, elect=elect, divisor=divisor, zero_sum=zero_sum)


def count_sign_conflicts(trimmed: Sequence[Tensor]) -> int:
    """Elements where the kept values of the task vectors have both signs."""
    conflicts = 0
    for _, parts in _blocks(trimmed):
        positive, negative = parts[0] > 0, parts[0] < 0
        for part in parts[1:]:
            positive |= part > 0
            negative |= part < 0
        conflicts += int((positive & negative).sum())
    return conflicts


def check_updates(updates: Sequence[Tensor]) -> None:
    """Raises ValueError unless there is at least one update and all are float32 of one shape."""
    if not updates:
        raise ValueError("no updates to merge")
    for update in updates:
        if update.dtype != torch.float32 or update.shape != updates[0].shape:
            raise ValueError(
                f"updates must be float32 of one shape, got {update.dtype} {tuple(update.shape)} beside {tuple(updates[0].shape)}"
            )


def _blocks(tensors: Sequence[Tensor]) -> Iterator[tuple[slice, list[Tensor]]]:
    flat = [tensor.reshape(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), BLOCK):
        block = slice(start, start + BLOCK)
        yield block, [tensor[block] for tensor in flat]

"""TIES on task vectors: trim, elect sign, disjoint mean, as pure functions of float32 tensors.

Source: Yadav et al. 2023, "TIES-Merging: Resolving Interference When Merging Models", https://arxiv.org/abs/2306.01708
With its defaults every function is bit-equal to ``peft.utils.merge_utils.ties`` on the same float32 tensors, unless a trim's border runs
through equal magnitudes: then the first of them stay, and with ``equal_magnitudes="topk"`` those that peft keeps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

LOW_BITS = 15
"""A magnitude's 31 bits are histogrammed in two steps: the high 16 bits, then the low 15 inside one bin."""
FIRST_NOT_FINITE = 0x7F800000 >> LOW_BITS
"""The bin of infinity; NaN has it too, or a higher one."""
COUNT_BLOCK = 1 << 20
"""Elements counted at a time: the temporaries stay in the cache."""
BLOCK = 1 << 15
"""Elements merged at a time: a few blocks fit the innermost caches, and arithmetic then costs less than reading."""


def magnitude_histogram(update: Tensor, *, inside: int | None = None) -> Tensor:
    """Counts of the magnitudes' bit patterns; histograms of several tensors add.

    The bit pattern of a non-negative float grows with its value, so counting patterns orders values exactly, without sorting.

    Args:
        update: float32, any shape; values that are not finite are counted from bin ``FIRST_NOT_FINITE`` on.
        inside: null counts the high 16 bits of every |value| (65,536 bins); a bin of that histogram counts the low 15 bits of the
            values inside it (32,768 bins).

    Returns:
        int64 counts, from small to large magnitudes.
    """
    patterns = update.reshape(-1).view(torch.int32)
    num_bins = 1 << (31 - LOW_BITS) if inside is None else 1 << LOW_BITS
    counts = torch.zeros(num_bins, dtype=torch.int64, device=update.device)
    step = COUNT_BLOCK if update.device.type == "cpu" else max(patterns.numel(), 1)
    for start in range(0, patterns.numel(), step):
        bits = patterns[start : start + step] & 0x7FFFFFFF
        if inside is None:
            bits = bits >> LOW_BITS
        else:
            bits = bits[(bits >> LOW_BITS) == inside] & ((1 << LOW_BITS) - 1)
        counts += torch.bincount(bits, minlength=num_bins)
    return counts


def bin_of_kth_largest(counts: Tensor, *, k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest value (k from 1), and how many values lie in higher bins."""
    from_top = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, torch.tensor(k, device=counts.device)))
    above = int(from_top[position - 1]) if position else 0
    return counts.numel() - 1 - position, above


def magnitude_from_bins(*, high: int, low: int) -> float:
    """The magnitude whose bit pattern is the two bins' numbers."""
    return torch.tensor((high << LOW_BITS) | low, dtype=torch.int32).view(torch.float32).item()


@dataclass(frozen=True)
class Border:
    """Where a trim cuts.

    Args:
        magnitude: the smallest |value| that is kept; 0 keeps everything, infinity nothing.
        reaching: how many elements reach it; more than are to be kept where equal magnitudes meet at the border.
    """

    magnitude: float
    reaching: int


def find_borders(update: Tensor, *, num_kept: Sequence[int]) -> list[Border]:
    """The exact borders that keep the given numbers of elements of a float32 tensor.

    The first counting pass serves all of them, and each takes a second one over the values of one bin.

    Args:
        update: float32, any shape, finite.
        num_kept: how many elements are kept, 0 to all of them.
    """
    numel = update.numel()
    counts = magnitude_histogram(update) if any(0 < number < numel for number in num_kept) else None
    borders = []
    for number in num_kept:
        if number >= numel:
            borders.append(Border(0.0, numel))
        elif number == 0:
            borders.append(Border(math.inf, 0))
        else:
            assert counts is not None
            high, above = bin_of_kth_largest(counts, k=number)
            inner = magnitude_histogram(update, inside=high)
            low, inner_above = bin_of_kth_largest(inner, k=number - above)
            borders.append(Border(magnitude_from_bins(high=high, low=low), above + inner_above + int(inner[low])))
    return borders


def kth_largest_magnitude(update: Tensor, *, k: int) -> float:
    """The exact k-th largest |value| of a float32 tensor, 1 <= k <= number of elements, in two counting passes."""
    if k == update.numel():
        return float(update.abs().min())
    return find_borders(update, num_kept=[k])[0].magnitude


EqualMagnitudes = Literal["first", "topk"]
"""Which of several equal magnitudes at the border stay: the first in memory order, as in mergekit, or those that ``torch.topk`` happens to
choose, as in peft. The latter depends on all other elements, and costs a selection over the whole tensor."""


def trim(update: Tensor, *, density: float, threshold: float | None = None, equal_magnitudes: EqualMagnitudes = "first") -> Tensor:
    """Keep the elements of largest magnitude; the others become zero.

    Args:
        update: float32, any shape, finite.
        density: fraction kept, in (0, 1]: exactly int(density * n) elements.
        threshold: if given, keep every element of at least this magnitude instead (a trim over several tensors).
        equal_magnitudes: which of them stay where the border runs through them.

    Raises:
        ValueError: if the density is not in (0, 1].
    """
    prepared = prepare_trim(update, density=density, threshold=threshold, equal_magnitudes=equal_magnitudes)
    return prepared.source if prepared.keeps_all else prepared.block(0, update.numel()).reshape(update.shape)


@dataclass(frozen=True)
class PreparedTrim:
    """A trim that is decided, but not carried out.

    Args:
        source: the update.
        limit: the magnitude from which elements are kept; 0 keeps all.
        surplus: elements of that magnitude that are dropped all the same, int64 positions in memory order, ascending.
    """

    source: Tensor
    limit: float = 0.0
    surplus: Tensor | None = None

    @functools.cached_property
    def _bound(self) -> float:
        """What a kept magnitude is larger than."""
        return _below(self.limit) if self.limit > 0 else 0.0

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is trimmed."""
        return self.limit == 0 and self.surplus is None

    def block(self, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` in memory order, trimmed, one-dimensional; never a view of the source."""
        # hardshrink keeps what is larger in magnitude than its parameter.
        part = torch.hardshrink(self.source.reshape(-1)[start:stop], self._bound)
        if self.surplus is not None:
            first, last = torch.searchsorted(self.surplus, torch.tensor([start, stop], device=self.surplus.device)).tolist()
            if last > first:
                part[self.surplus[first:last] - start] = 0.0
        return part


def prepare_trim(
    update: Tensor,
    *,
    density: float,
    threshold: float | None = None,
    border: Border | None = None,
    equal_magnitudes: EqualMagnitudes = "first",
) -> PreparedTrim:
    """Decide a trim.

    Args:
        update, density, threshold, equal_magnitudes: as in ``trim``.
        border: of int(density * n) elements, if it is known.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density = {density} must be in (0, 1]: the fraction of each task vector kept")
    if threshold is not None:
        return PreparedTrim(update, threshold)
    num_kept = int(density * update.numel())
    if density == 1:
        return PreparedTrim(update)
    border = border or find_borders(update, num_kept=[num_kept])[0]
    # Zeros at the border contribute nothing whether they are kept or not.
    if border.magnitude == 0 or border.reaching <= num_kept:
        return PreparedTrim(update, border.magnitude)
    if equal_magnitudes == "first":
        surplus = _last_of_magnitude(update, magnitude=border.magnitude, number=border.reaching - num_kept)
        return PreparedTrim(update, border.magnitude, surplus)
    kept = torch.zeros_like(update, memory_format=torch.contiguous_format)
    chosen = torch.topk(update.abs().reshape(-1), k=num_kept).indices
    kept.reshape(-1)[chosen] = update.reshape(-1)[chosen]
    return PreparedTrim(kept)


def _last_of_magnitude(update: Tensor, *, magnitude: float, number: int) -> Tensor:
    """Positions, ascending, of the last ``number`` elements of exactly this magnitude; the search ends where they are found."""
    flat = update.reshape(-1)
    step = COUNT_BLOCK if flat.device.type == "cpu" else max(flat.numel(), 1)
    found: list[Tensor] = []
    stop = flat.numel()
    while number > 0 and stop > 0:
        start = max(0, stop - step)
        here = (flat[start:stop].abs() == magnitude).nonzero().reshape(-1)[-number:] + start
        found.insert(0, here)
        number, stop = number - here.numel(), start
    return torch.cat(found)


def _below(limit: float) -> float:
    """The largest float32 under a magnitude: what is larger than it reaches the magnitude."""
    return float(torch.nextafter(torch.tensor(limit), torch.tensor(0.0)))


@dataclass(frozen=True)
class TiesMerge:
    """The merge of one tensor, and what happened there.

    Args:
        update: the disjoint mean, float32, without the scale.
        kept: per task vector, the number of elements that survived the trim with a value other than zero.
        conflicts: number of elements where the kept values have both signs.
    """

    update: Tensor
    kept: tuple[int, ...]
    conflicts: int


def merge_updates(
    trims: Sequence[PreparedTrim],
    *,
    weights: Sequence[float],
    elect: Literal["unweighted", "weighted"] = "unweighted",
    divisor: Literal["count", "weight"] = "count",
    zero_sum: Literal["positive", "drop"] = "positive",
) -> TiesMerge:
    """Carry out trims, elect and average, a block of elements at a time.

    Everything is arithmetic on whole blocks: a trimmed value times the elected sign is positive where it agrees, so its positive part is
    what enters the mean, and the sign of that part counts it.

    Args:
        trims: of float32 task vectors t_i of one shape, finite.
        weights: one positive w_i per task vector.
        elect: elect the sign of sum(t_i) or of sum(w_i * t_i).
        divisor: divide sum(w_i * t_i) over those that agree by their number, or by their weights.
        zero_sum: what a sum of exactly zero elects: +, or no sign, hence no update.
    """
    merged = torch.empty_like(trims[0].source, memory_format=torch.contiguous_format)
    flat = merged.reshape(-1)
    unit = all(weight == 1 for weight in weights)
    step = BLOCK if merged.device.type == "cpu" else 1 << 24
    one = torch.ones((), device=merged.device)
    kept: list[int | Tensor] = [0 for _ in trims]
    conflicts = torch.zeros((), dtype=torch.int64, device=merged.device)
    against = torch.zeros((), dtype=torch.float64, device=merged.device)
    for start in range(0, flat.numel(), step):
        parts = [one.block(start, start + step) for one in trims]
        kept = [count + count_nonzero(part) for count, part in zip(kept, parts, strict=True)]
        total = _sum(parts, weights if elect == "weighted" and not unit else None)
        sign = torch.copysign(one, total) if zero_sum == "positive" else total.sign()
        agreeing = [(part * sign).relu_() for part in parts]
        votes = [part.sign() for part in agreeing]
        number = _sum(votes, None)
        divide_by = _sum(votes, weights) if divisor == "weight" and not unit else number
        smallest = 1.0 if divide_by is number else min(weights)
        numerator = _sum(agreeing, None if unit else weights)
        torch.mul(numerator.div_(divide_by.clamp(min=smallest)), sign, out=flat[start : start + step])
        if len(parts) == 2 and zero_sum == "positive":
            against -= number.sum(dtype=torch.float64)
        elif len(parts) > 1:
            conflicts += count_sign_conflicts(parts)
    if len(trims) == 2 and zero_sum == "positive":
        # Of two values at most one disagrees, and then the other agrees: a conflict is a kept value that did not vote.
        conflicts = sum(kept) + against.to(torch.int64)
    return TiesMerge(update=merged, kept=tuple(int(count) for count in kept), conflicts=int(conflicts))


def ties(
    *,
    updates: Sequence[Tensor],
    density: float,
    weights: Sequence[float] | None = None,
    elect: Literal["unweighted", "weighted"] = "unweighted",
    divisor: Literal["count", "weight"] = "count",
    zero_sum: Literal["positive", "drop"] = "positive",
    thresholds: Sequence[float] | None = None,
    equal_magnitudes: EqualMagnitudes = "first",
) -> Tensor:
    """The TIES merge of one tensor's updates, float32, without the scale.

    For two equally weighted updates this is: the mean where both survive the trim and agree in sign, the survivor where one does, and the
    larger in magnitude where they disagree.

    Args:
        updates: float32 task vectors t_i of one shape: trial weights minus target weights.
        density: fraction of each kept by the trim, in (0, 1].
        weights: one positive factor per task vector, applied in the mean; null is 1 for each.
        elect: elect the sign on t_i or on w_i * t_i.
        divisor: divide by the number or by the weights of the agreeing vectors.
        zero_sum: what a zero sum elects.
        thresholds: magnitudes to trim at, one per task vector, in place of the density in this tensor.
        equal_magnitudes: which of them stay where the border of a trim runs through them.

    Raises:
        ValueError: if the shapes differ, or weights or thresholds do not match the updates in number.

    Source: Yadav et al. 2023, https://arxiv.org/abs/2306.01708
    """
    return ties_merge(
        updates=updates,
        density=density,
        weights=weights,
        elect=elect,
        divisor=divisor,
        zero_sum=zero_sum,
        thresholds=thresholds,
        equal_magnitudes=equal_magnitudes,
    ).update


def ties_merge(
    *,
    updates: Sequence[Tensor],
    density: float,
    weights: Sequence[float] | None = None,
    elect: Literal["unweighted", "weighted"] = "unweighted",
    divisor: Literal["count", "weight"] = "count",
    zero_sum: Literal["positive", "drop"] = "positive",
    thresholds: Sequence[float] | None = None,
    borders: Sequence[Border | None] | None = None,
    equal_magnitudes: EqualMagnitudes = "first",
) -> TiesMerge:
    """As ``ties``, with what happened; ``borders`` are those of int(density * n) elements where they are known."""
    check_updates(updates)
    weights = (1.0,) * len(updates) if weights is None else tuple(weights)
    for name, values in (("weights", weights), ("thresholds", thresholds)):
        if values is not None and len(values) != len(updates):
            raise ValueError(f"{len(values)} {name} for {len(updates)} updates")
    prepared = [
        prepare_trim(
            update,
            density=density,
            threshold=None if thresholds is None else thresholds[index],
            border=None if borders is None else borders[index],
            equal_magnitudes=equal_magnitudes,
        )
        for index, update in enumerate(updates)
    ]
    return merge_updates(prepared, weights=weights, elect=elect, divisor=divisor, zero_sum=zero_sum)


def _sum(parts: Sequence[Tensor], weights: Sequence[float] | None) -> Tensor:
    """Sum from the first to the last, each product rounded before it is added."""
    if weights is None:
        total = parts[0] + parts[1] if len(parts) > 1 else parts[0].clone()
        for part in parts[2:]:
            total += part
        return total
    total = parts[0] * weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total += part * weight
    return total


def count_nonzero(values: Tensor) -> int | Tensor:
    """How many elements are not zero; on an accelerator a tensor, so that nobody waits for it."""
    if values.device.type != "cpu":
        return torch.count_nonzero(values)
    # numpy counts booleans with vector instructions, torch counts floats one by one.
    return int(np.count_nonzero((values != 0).numpy()))


def count_sign_conflicts(trimmed: Sequence[Tensor]) -> int:
    """Elements where the kept values of the task vectors have both signs."""
    lowest, highest = functools.reduce(torch.minimum, trimmed), functools.reduce(torch.maximum, trimmed)
    return int(torch.count_nonzero((lowest < 0) & (highest > 0)))


def check_updates(updates: Sequence[Tensor]) -> None:
    """Raises ValueError unless there is at least one update and all are float32 of one shape."""
    if not updates:
        raise ValueError("no updates to merge")
    for update in updates:
        if update.dtype != torch.float32 or update.shape != updates[0].shape:
            raise ValueError(
                f"updates must be float32 of one shape, got {update.dtype} {tuple(update.shape)} beside {tuple(updates[0].shape)}"
            )

"""One tensor of a merge: the trials' updates in, the new weights out. The file writer and the in-memory search both use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from merging.config import MergeConfig
from merging.linear import linear, task_arithmetic
from merging.ties import (
    BLOCK,
    Border,
    bin_of_kth_largest,
    count_sign_conflicts,
    magnitude_from_bins,
    magnitude_histogram,
    ties_merge,
)


class Updates(Protocol):
    """What a merge needs of a task vector."""

    @property
    def names(self) -> tuple[str, ...]:
        """Base tensors that the trial changes."""

    def update(self, name: str, *, device: str = "cpu") -> Tensor:
        """The float32 update of one of them."""


@dataclass(frozen=True)
class Merged:
    """The merged update of one tensor, float32, without the scale, and what the merge did there."""

    update: Tensor
    kept: tuple[float, ...]
    """Share of each trial's elements that survived the trim with a value other than zero."""
    conflicts: float
    """Share of elements where the kept values have both signs."""
    norm_ratio: float
    """Norm of the merged update over the mean norm of the trials' updates."""


def combine(
    name: str,
    *,
    vectors: Sequence[Updates],
    config: MergeConfig,
    thresholds: Sequence[float] | None = None,
    device: str = "cpu",
    with_stats: bool = True,
) -> Merged:
    """Merge the updates of one tensor. A trial that does not change the tensor takes part with a zero update.

    Args:
        vectors: the trials, at least one of which changes the tensor.
        thresholds: for ``trim_scope = model``, the magnitude that each trial is trimmed at (see ``model_thresholds``).
        with_stats: without them the figures are 0, and three passes over the tensor are saved.
    """
    weights = config.trial_weights(len(vectors))
    # A zero update never agrees with a sign, so leaving it out changes only the denominator of the linear mean.
    present = [index for index, vector in enumerate(vectors) if name in vector.names]
    updates = [vectors[index].update(name, device=device) for index in present]
    norms = [float(update.norm()) for update in updates] if with_stats else []
    chosen = [weights[index] for index in present]
    kept = [0.0] * len(vectors)
    conflicts = None
    if config.method == "ties":
        found = ties_merge(
            updates=updates,
            density=config.density,
            weights=chosen,
            elect=config.elect,
            divisor=config.divisor,
            zero_sum=config.zero_sum,
            thresholds=None if thresholds is None else [thresholds[index] for index in present],
            borders=None if thresholds is not None else [_border(vectors[index], name, config.density, device) for index in present],
        )
        merged, conflicts = found.update, found.conflicts
        for index, number in zip(present, found.kept, strict=True):
            kept[index] = number / max(merged.numel(), 1)
    elif config.method == "linear":
        merged = linear(updates=updates, weights=chosen, total_weight=sum(weights))
    else:
        merged = task_arithmetic(updates=updates, weights=chosen)
    if not with_stats:
        return Merged(update=merged, kept=(), conflicts=0.0, norm_ratio=0.0)
    if conflicts is None:
        conflicts = count_sign_conflicts(updates)
        for index, update in zip(present, updates, strict=True):
            kept[index] = int(torch.count_nonzero(update)) / max(update.numel(), 1)
    mean_norm = sum(norms) / len(vectors)
    return Merged(
        update=merged,
        kept=tuple(kept),
        conflicts=conflicts / max(merged.numel(), 1),
        norm_ratio=float(merged.norm()) / mean_norm if mean_norm else 0.0,
    )


def _border(vector: Updates, name: str, density: float, device: str) -> Border | None:
    """A trim's border, where the task vector remembers those that it has found."""
    remembered = getattr(vector, "border", None)
    return None if remembered is None or density == 1 else remembered(name, density=density, device=device)


def add_update(base: Tensor, *, update: Tensor, scale: float) -> Tensor:
    """``base + scale * update`` in float32, rounded once to the base's dtype; on a CPU a block at a time, without whole copies."""
    if base.device.type != "cpu" or not base.is_contiguous():
        return (base.to(torch.float32) + update * scale).to(base.dtype)
    after = torch.empty_like(base)
    old, new, change = base.reshape(-1), after.reshape(-1), update.reshape(-1)
    for start in range(0, old.numel(), BLOCK):
        block = slice(start, start + BLOCK)
        part = change[block] if scale == 1 else change[block] * scale
        new[block].copy_(old[block].to(torch.float32) + part)
    return after


def count_changed(before: Tensor, after: Tensor) -> int:
    """Number of weights whose stored bits differ."""
    bits = {2: torch.int16, 4: torch.int32}[before.element_size()]
    return int(torch.count_nonzero(before.view(bits) != after.view(bits)))


def model_thresholds(*, vectors: Sequence[Updates], density: float, device: str = "cpu") -> tuple[float, ...]:
    """For each trial, the magnitude of its int(density * n)-th largest element over all tensors that it changes (n elements).

    Two streaming passes count bit patterns in histograms, which add over tensors; no more than one update is held.
    """
    return tuple(_threshold(vector, density=density, device=device) for vector in vectors)


def _threshold(vector: Updates, *, density: float, device: str) -> float:
    if density == 1:
        return 0.0
    high_counts = sum(magnitude_histogram(vector.update(name, device=device)) for name in vector.names)
    assert isinstance(high_counts, Tensor)
    num_kept = int(density * int(high_counts.sum()))
    if num_kept == 0:
        return float("inf")
    high, above = bin_of_kth_largest(high_counts, k=num_kept)
    low_counts = sum(magnitude_histogram(vector.update(name, device=device), inside=high) for name in vector.names)
    assert isinstance(low_counts, Tensor)
    low, _ = bin_of_kth_largest(low_counts, k=num_kept - above)
    return magnitude_from_bins(high=high, low=low)

"""One tensor of a merge: the trials' updates in, the new weights out. The file writer and the in-memory search both use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Generator, Tensor

from merging.config import MergeConfig
from merging.methods.low_rank import LowRank
from merging.methods.run import run_method
from merging.methods.seeded import generator_for
from merging.methods.table import METHODS, Need
from merging.ties import (
    BLOCK,
    Border,
    bin_of_kth_largest,
    count_sign_conflicts,
    magnitude_from_bins,
    magnitude_histogram,
    ties_merge,
    trim,
)
from trainers.errors import InputError

if TYPE_CHECKING:
    from merging.task_vectors import TaskVector


class Updates(Protocol):
    """What a merge needs of a task vector."""

    @property
    def names(self) -> tuple[str, ...]:
        """Base tensors that the trial changes."""

    @property
    def content_hash(self) -> str:
        """SHA-256 of what the updates depend on."""

    def update(self, name: str, *, device: str = "cpu") -> Tensor:
        """The float32 update of one of them."""

    def factors(self, name: str, *, device: str = "cpu") -> LowRank | None:
        """Its factors, where it has them."""


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
    factors: LowRank | None = None
    """The merged update as a product, where the method makes one."""


def combine(
    name: str,
    *,
    vectors: Sequence[Updates],
    config: MergeConfig,
    thresholds: Sequence[float] | None = None,
    majority: int | None = None,
    device: str = "cpu",
    with_stats: bool = True,
) -> Merged:
    """Merge the updates of one tensor. A trial that does not change the tensor takes part with a zero update.

    Args:
        vectors: the trials, at least one of which changes the tensor.
        thresholds: for ``trim_scope = model``, the magnitude that each trial is trimmed at (see ``model_thresholds``).
        majority: for ``zero_sum = majority``, the sign of most elements (see ``majority_sign``).
        with_stats: without them the figures are 0, and three passes over the tensor are saved.
    """
    weights = config.trial_weights(len(vectors))
    # A zero update never agrees with a sign, so for most methods leaving it out changes only the denominator of the linear mean.
    present = [index for index, vector in enumerate(vectors) if name in vector.names]
    updates = [vectors[index].update(name, device=device) for index in present]
    if Need.ABSENT in METHODS[config.method].needs and len(present) < len(vectors):
        found_updates = dict(zip(present, updates, strict=True))
        present = list(range(len(vectors)))
        updates = [found_updates.get(index, torch.zeros_like(updates[0])) for index in present]
    norms = [float(update.norm()) for update in updates] if with_stats else []
    chosen = [weights[index] for index in present]
    kept = [0.0] * len(vectors)
    factors = None
    if config.method == "ties":
        zero_sum, flip = config.zero_sum, False
        if zero_sum == "majority":
            if majority is None:
                raise InputError("zero_sum = majority needs the signs of the whole model", fix="use zero_sum = positive or drop here")
            # A negative sign at a zero sum is the positive one of the negated updates.
            zero_sum, flip = "positive", majority <= 0
        found = ties_merge(
            updates=[-update for update in updates] if flip else updates,
            density=config.density,
            weights=chosen,
            elect=config.elect,
            divisor=config.divisor,
            zero_sum=zero_sum,
            thresholds=None if thresholds is None else [thresholds[index] for index in present],
            equal_magnitudes=config.equal_magnitudes,
            borders=None if thresholds is not None else [_border(vectors[index], name, config.density, device) for index in present],
        )
        merged, conflicts = (-found.update if flip else found.update), found.conflicts / max(found.update.numel(), 1)
        for index, number in zip(present, found.kept, strict=True):
            kept[index] = number / max(merged.numel(), 1)
    else:
        made = run_method(
            updates=updates,
            weights=chosen,
            config=config,
            total_weight=sum(weights),
            generators=[_generator(vectors[index], name, config) for index in present] if config.reads("seed") else (),
            factors=[_factors(vectors[index], name, device) for index in present] if Need.FACTORS in METHODS[config.method].needs else (),
        )
        merged, factors, conflicts = made.update, made.factors, 0.0
        if with_stats:
            conflicts = count_sign_conflicts(made.entered) / max(made.entered[0].numel(), 1)
            for index, update in zip(present, made.entered, strict=True):
                kept[index] = int(torch.count_nonzero(update)) / max(update.numel(), 1)
    if not with_stats:
        return Merged(update=merged, kept=(), conflicts=0.0, norm_ratio=0.0, factors=factors)
    mean_norm = sum(norms) / len(vectors)
    return Merged(
        update=merged,
        kept=tuple(kept),
        conflicts=conflicts,
        norm_ratio=float(merged.norm()) / mean_norm if mean_norm else 0.0,
        factors=factors,
    )


def check_vectors(vectors: Sequence[TaskVector], *, config: MergeConfig) -> None:
    """Refuse trials that a method is not defined for, before anything is computed.

    Raises:
        InputError: for ``method = seed`` unless all trials are adapters of the same tensors with the same ranks.
    """
    if config.method != "seed":
        return
    shapes = [vector.ranks() for vector in vectors]
    for vector, ranks in zip(vectors, shapes, strict=True):
        whole = sorted(name for name, rank in ranks.items() if rank is None)
        differing = sorted(name for name in ranks.keys() | shapes[0].keys() if ranks.get(name) != shapes[0].get(name))
        if whole:
            raise InputError(
                f"method = seed merges factors, but tensor {whole[0]} has none",
                where=f"trial {vector.trial}, {vector.folder}",
                why="A and B are merged apart, and a full tensor has neither",
                fix="use method = ties",
            )
        if differing:
            first, here = shapes[0].get(differing[0]), ranks.get(differing[0])
            raise InputError(
                f"method = seed needs adapters of equal ranks and targets, but {differing[0]} has "
                + " and ".join("no factors" if rank is None else f"rank {rank}" for rank in (first, here)),
                where=f"trials {vectors[0].trial} and {vector.trial}",
                why="factors of different shapes cannot be merged element by element",
                fix="use method = ties, or knots",
            )


def _generator(vector: Updates, name: str, config: MergeConfig) -> Generator:
    return generator_for(seed=config.seed, tensor=name, content=vector.content_hash)


def _factors(vector: Updates, name: str, device: str) -> LowRank | None:
    return vector.factors(name, device=device) if name in vector.names else None


def _border(vector: Updates, name: str, density: float, device: str) -> Border | None:
    """A trim's border, where the task vector remembers those that it has found."""
    remembered = getattr(vector, "border", None)
    return None if remembered is None or density == 1 else remembered(name, density=density, device=device)


def _magnitude_counts(vector: Updates, device: str) -> Tensor:
    """The histogram of all magnitudes of a trial, which serves every density, where the task vector remembers it."""
    remembered = getattr(vector, "magnitude_counts", None)
    return count_magnitudes(vector, device=device) if remembered is None else remembered(device=device)


def count_magnitudes(vector: Updates, *, device: str) -> Tensor:
    """``magnitude_histogram`` over all tensors that a trial changes; one of them is held at a time."""
    counts = sum(magnitude_histogram(vector.update(name, device=device)) for name in vector.names)
    assert isinstance(counts, Tensor)
    return counts


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


def model_thresholds(
    *, vectors: Sequence[Updates], density: float, device: str = "cpu", trim_count: Literal["floor", "floor_plus_one"] = "floor"
) -> tuple[float, ...]:
    """For each trial, the magnitude of its int(density * n)-th largest element over all tensors that it changes (n elements).

    Two streaming passes count bit patterns in histograms, which add over tensors; no more than one update is held.

    Args:
        trim_count: floor_plus_one takes the element after that one.
    """
    return tuple(_threshold(vector, density=density, device=device, more=int(trim_count == "floor_plus_one")) for vector in vectors)


def majority_sign(*, vectors: Sequence[Updates], thresholds: Sequence[float] | None, config: MergeConfig, device: str = "cpu") -> int:
    """The sign of the sum of all elected signs over the tensors that a trial changes; a streaming pass over all updates.

    Args:
        thresholds: of ``model_thresholds``, one per trial; null trims each tensor by the density.
    """
    weights = config.trial_weights(len(vectors))
    limits = [None] * len(vectors) if thresholds is None else list(thresholds)
    total = 0
    for name in dict.fromkeys(name for vector in vectors for name in vector.names):
        votes: Tensor | None = None
        for vector, threshold, weight in zip(vectors, limits, weights, strict=True):
            if name not in vector.names:
                continue
            kept = trim(
                vector.update(name, device=device),
                density=config.density,
                threshold=threshold,
                equal_magnitudes=config.equal_magnitudes,
            )
            kept = kept * weight if config.elect == "weighted" else kept
            votes = kept if votes is None else votes + kept
        assert votes is not None
        total += int(votes.sign().sum(dtype=torch.int64))
    return (total > 0) - (total < 0)


def _threshold(vector: Updates, *, density: float, device: str, more: int = 0) -> float:
    if density == 1:
        return 0.0
    high_counts = _magnitude_counts(vector, device)
    num_kept = min(int(density * int(high_counts.sum())) + more, int(high_counts.sum()))
    if num_kept == 0:
        return float("inf")
    high, above = bin_of_kth_largest(high_counts, k=num_kept)
    low_counts = sum(magnitude_histogram(vector.update(name, device=device), inside=high) for name in vector.names)
    assert isinstance(low_counts, Tensor)
    low, _ = bin_of_kth_largest(low_counts, k=num_kept - above)
    return magnitude_from_bins(high=high, low=low)

"""Merges tried on a resident model, without writing a checkpoint."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from merging.combine import add_update, check_vectors, combine, count_magnitudes, majority_sign, model_thresholds
from merging.config import MergeConfig
from merging.methods.low_rank import LowRank
from merging.task_vectors import TaskVector, all_finite
from merging.tensor_store import open_base
from merging.ties import Border, find_borders
from trainers.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TensorCache:
    """Tensors by key, the least recently used dropped beyond a number of bytes."""

    def __init__(self, *, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.num_bytes = 0
        self._tensors: OrderedDict[tuple, Tensor] = OrderedDict()

    def get(self, key: tuple) -> Tensor | None:
        """The tensor of a key, or null."""
        tensor = self._tensors.get(key)
        if tensor is not None:
            self._tensors.move_to_end(key)
        return tensor

    def put(self, key: tuple, tensor: Tensor) -> Tensor:
        """Keep a tensor if it fits at all; returns it."""
        size = tensor.numel() * tensor.element_size()
        if size <= self.limit_bytes and key not in self._tensors:
            self._tensors[key] = tensor
            self.num_bytes += size
            while self.num_bytes > self.limit_bytes:
                _, dropped = self._tensors.popitem(last=False)
                self.num_bytes -= dropped.numel() * dropped.element_size()
        return tensor


class _CachedVector:
    """A task vector whose updates are computed once while they fit the cache, and whose borders are found once for all densities."""

    def __init__(self, vector: TaskVector, cache: TensorCache, *, densities: Sequence[float]) -> None:
        self._vector, self._cache, self._densities = vector, cache, tuple(densities)
        self._borders: dict[tuple[str, float, str], Border] = {}
        self._counts: dict[str, Tensor] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return self._vector.names

    def update(self, name: str, *, device: str = "cpu") -> Tensor:
        key = ("update", self._vector.trial, name, device)
        cached = self._cache.get(key)
        return self._cache.put(key, self._vector.update(name, device=device)) if cached is None else cached

    @property
    def content_hash(self) -> str:
        return self._vector.content_hash

    def factors(self, name: str, *, device: str = "cpu") -> LowRank | None:
        return self._vector.factors(name, device=device)

    def magnitude_counts(self, *, device: str = "cpu") -> Tensor:
        """The histogram of all magnitudes, counted once for every density."""
        if device not in self._counts:
            self._counts[device] = count_magnitudes(self, device=device)
        return self._counts[device]

    def border(self, name: str, *, density: float, device: str = "cpu") -> Border:
        """Where a trim of one tensor cuts; the first question about a tensor answers those about the other densities, too."""
        if (name, density, device) not in self._borders:
            densities = sorted({density, *self._densities})
            update = self.update(name, device=device)
            found = find_borders(update, num_kept=[int(one * update.numel()) for one in densities])
            self._borders |= {(name, one, device): border for one, border in zip(densities, found, strict=True)}
        return self._borders[name, density, device]


class MergeSession:
    """Rewrites a resident model as base + merged update, as often as a search asks.

    The weights are always rebuilt from the base, never by taking an update off again, and are rounded to the base file's dtype as
    ``merge_checkpoint`` does: on a CPU the model equals the written checkpoint bit for bit (in the model's dtype). On an accelerator the
    updates are computed there, and differ in their last float32 bits.

    Args:
        model: a causal language model loaded from ``base``; its parameters are changed in place.
        base: the model folder that the trials started from.
        vectors: the trials that may be merged; their names must differ.
        cache_bytes: float32 bytes of updates, merged updates and base weights kept between calls.
        densities: those that will be asked for, whose thresholds are then found together.

    Raises:
        InputError: if a changed tensor is not in the model or two trials share a name.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        base: Path,
        vectors: Sequence[TaskVector],
        cache_bytes: int = 8 << 30,
        densities: Sequence[float] = (),
    ) -> None:
        self._store = open_base(base)
        self._parameters = model.state_dict()
        self._cache = TensorCache(limit_bytes=cache_bytes)
        self._vectors = {vector.trial: _CachedVector(vector, self._cache, densities=densities) for vector in vectors}
        self._sources = {vector.trial: vector for vector in vectors}
        self._thresholds: dict[tuple[str, float, str], float] = {}
        self._majorities: dict[tuple, int] = {}
        self._merged: set[str] = set()
        if len(self._vectors) != len(vectors):
            raise InputError("two trials have the same name", where=", ".join(vector.trial for vector in vectors))
        for vector in vectors:
            for name in vector.names:
                if name not in self._parameters or tuple(self._parameters[name].shape) != self._store.tensors[name].shape:
                    raise InputError(
                        f"tensor {name} is not in the loaded model", where=f"trial {vector.trial}", why=f"model loaded from {base}"
                    )

    @torch.no_grad()
    def apply(self, trials: Sequence[str], config: MergeConfig) -> None:
        """Make the model the merge of the named trials.

        Raises:
            InputError: if a trial is unknown, the weights do not match, or a value is not finite.
        """
        unknown = [name for name in trials if name not in self._vectors]
        if unknown or not trials:
            raise InputError(f"unknown trials: {', '.join(unknown) or 'none given'}", where=f"known: {', '.join(self._vectors)}")
        vectors = [self._vectors[name] for name in trials]
        try:
            config.trial_weights(len(vectors))
        except ValueError as error:
            raise InputError(str(error), where="weights") from None
        check_vectors([self._sources[name] for name in trials], config=config)
        thresholds = majority = None
        if config.method == "ties" and config.trim_scope == "model":
            thresholds = [self._threshold(name, config) for name in trials]
        names = [name for name in self._store.tensors if any(name in vector.names for vector in vectors)]
        self._restore(self._merged - set(names))
        self._merged |= set(names)
        # A calibration changes the scale only: the merged update stays.
        recipe = (tuple(trials), config.model_copy(update={"scale": 1.0}).model_dump_json())
        if config.method == "ties" and config.zero_sum == "majority":
            if recipe not in self._majorities:
                self._majorities[recipe] = majority_sign(vectors=vectors, thresholds=thresholds, config=config)
            majority = self._majorities[recipe]
        for name in names:
            parameter = self._parameters[name]
            device = str(parameter.device)
            update = self._cache.get(("merged", recipe, name, device))
            if update is None:
                merged = combine(
                    name, vectors=vectors, config=config, thresholds=thresholds, majority=majority, device=device, with_stats=False
                )
                update = self._cache.put(("merged", recipe, name, device), merged.update)
            after = add_update(self._base(name).to(device), update=update, scale=config.scale)
            if not all_finite(after):
                raise InputError(
                    f"the merged tensor {name} is not finite", where=f"trials {', '.join(trials)}", fix="lower the scale or the weights"
                )
            parameter.copy_(after)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the base weights back."""
        self._restore(self._merged)
        self._merged = set()

    def _restore(self, names: set[str]) -> None:
        for name in names:
            self._parameters[name].copy_(self._base(name))

    def _base(self, name: str) -> Tensor:
        cached = self._cache.get(("base", name))
        return self._cache.put(("base", name), self._store.read(name)) if cached is None else cached

    def _threshold(self, trial: str, config: MergeConfig) -> float:
        key = (trial, config.density, config.trim_count)
        if key not in self._thresholds:
            vectors = [self._vectors[trial]]
            self._thresholds[key] = model_thresholds(vectors=vectors, density=config.density, trim_count=config.trim_count)[0]
        return self._thresholds[key]

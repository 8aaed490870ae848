"""Which settings a sweep searches, and the trials drawn from them."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from launcher.config import train_relations
from trainers.config import TrainConfig
from trainers.errors import InputError

log = logging.getLogger(__name__)

Distribution = Literal["uniform", "log_uniform", "int_uniform"]
_REDRAWS = 1000
"""Draws in a row that repeat earlier trials before the space counts as exhausted."""


@dataclass(frozen=True)
class Choice:
    """One of several values, all equally likely."""

    values: tuple[Any, ...]

    @property
    def middle(self) -> Any:
        return self.values[0]

    @property
    def ends(self) -> tuple[tuple[str, Any], ...]:
        return tuple((f"values[{index}]", value) for index, value in enumerate(self.values))

    def draw(self, stream: random.Random) -> Any:
        return copy.deepcopy(self.values[stream.randrange(len(self.values))])

    def spec(self) -> dict[str, Any]:
        return {"values": list(self.values)}


@dataclass(frozen=True)
class Range:
    """A number between two ends, both included."""

    min: float
    max: float
    distribution: Distribution

    @property
    def middle(self) -> float:
        if self.distribution == "log_uniform":
            return _round(math.sqrt(self.min * self.max), low=self.min, high=self.max)
        if self.distribution == "int_uniform":
            return int(self.min + self.max) // 2
        return _round((self.min + self.max) / 2, low=self.min, high=self.max)

    @property
    def ends(self) -> tuple[tuple[str, Any], ...]:
        return (("min", self.min), ("max", self.max))

    def draw(self, stream: random.Random) -> float:
        if self.distribution == "int_uniform":
            return stream.randint(int(self.min), int(self.max))
        if self.distribution == "log_uniform":
            value = math.exp(stream.uniform(math.log(self.min), math.log(self.max)))
        else:
            value = stream.uniform(self.min, self.max)
        return _round(value, low=self.min, high=self.max)

    def spec(self) -> dict[str, Any]:
        return {"min": self.min, "max": self.max, "distribution": self.distribution}


Domain = Choice | Range


@dataclass(frozen=True)
class SearchSpace:
    """The searched settings of ``train``: dotted path below ``train`` -> domain, in the file's order."""

    domains: Mapping[str, Domain] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.domains)

    @property
    def size(self) -> int | None:
        """How many different configurations there are; None if infinitely many."""
        if all(isinstance(domain, Choice) for domain in self.domains.values()):
            return math.prod(len(domain.values) for domain in self.domains.values() if isinstance(domain, Choice))
        return None

    def middle(self) -> dict[str, Any]:
        """The first value of every choice and the middle of every range (geometric for ``log_uniform``)."""
        return {path: copy.deepcopy(domain.middle) for path, domain in self.domains.items()}


@dataclass(frozen=True)
class TrialSpec:
    """One trial to run: its name, what distinguishes it from the others, and its complete configuration."""

    name: str
    overrides: dict[str, Any]
    config: TrainConfig


def draw_trials(
    *,
    base: TrainConfig,
    space: SearchSpace,
    start_points: Sequence[Mapping[str, Any]] = (),
    num_trials: int,
    search: Literal["random", "grid"] = "random",
    seed: int,
) -> tuple[TrialSpec, ...]:
    """The trials of a sweep: start points first, then draws (or the grid in the file's order).

    The same arguments give the same trials, and the first n trials do not depend on ``num_trials``. Each draw of
    each setting has its own random stream, so adding a searched setting leaves the draws of the others alone.
    Configurations that come up twice are skipped; fewer trials than asked for come back, with a warning, when the
    space holds no more. ``train.seed`` follows from (seed, trial index) unless ``base`` was given one, or it is
    searched or part of a start point.

    Raises:
        InputError: if a range stands in a grid, or a drawn configuration is not a valid trial.
    """
    if search == "grid":
        ranges = [path for path, domain in space.domains.items() if isinstance(domain, Range)]
        if ranges:
            raise InputError(
                "a grid needs lists of values, but a range is searched",
                where=", ".join(f"train.{path}" for path in ranges),
                fix="write `values: [...]` there, or sweep.search: random",
            )
    candidates = itertools.chain(
        ({**space.middle(), **flatten_overrides(point)} for point in start_points),
        _grid(space) if search == "grid" else _random(space, seed=seed),
    )
    trials: list[TrialSpec] = []
    seen: set[str] = set()
    repeats = 0
    for overrides in candidates:
        if len(trials) == num_trials or repeats > _REDRAWS:
            break
        config = trial_config(base, overrides, seed=trial_seed(seed, index=len(trials)))
        # Two trials are the same when they differ in nothing but the seed that we gave them.
        key = json.dumps([config.model_dump(mode="json", exclude={"seed"}), overrides.get("seed")], sort_keys=True)
        if key in seen:
            repeats += 1
            continue
        seen.add(key)
        repeats = 0
        trials.append(TrialSpec(name=f"trial-{len(trials):02d}", overrides=overrides, config=config))
    if len(trials) < num_trials:
        log.warning("sweep.num_trials = %d, but there are only %d different configurations", num_trials, len(trials))
    elif search == "grid":
        run = sum(_in_grid(trial, space=space) for trial in trials)
        if space.size is not None and run < space.size:
            log.warning("the grid has %d configurations, of which sweep.num_trials = %d leaves room for %d", space.size, num_trials, run)
    return tuple(trials)


def _in_grid(trial: TrialSpec, *, space: SearchSpace) -> bool:
    return all(
        path in space.domains and any(value == allowed for _, allowed in space.domains[path].ends)
        for path, value in trial.overrides.items()
    )


def _random(space: SearchSpace, *, seed: int) -> Iterator[dict[str, Any]]:
    for index in itertools.count():
        yield {path: domain.draw(random.Random(f"{seed}/{index}/{path}")) for path, domain in space.domains.items()}


def _grid(space: SearchSpace) -> Iterator[dict[str, Any]]:
    axes = [domain.values for domain in space.domains.values() if isinstance(domain, Choice)]
    for values in itertools.product(*axes):
        yield dict(zip(space.domains, copy.deepcopy(values), strict=True))


def trial_seed(seed: int, *, index: int) -> int:
    """The seed of one trial, in [0, 2**31): a hash, so that neighbouring experiments share no streams."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:4], "big") >> 1


def trial_config(base: TrainConfig, overrides: Mapping[str, Any], *, seed: int | None = None) -> TrainConfig:
    """A trial's configuration: ``base`` with settings replaced by dotted path.

    ``seed`` is used where neither ``base`` nor the overrides were given one.

    Raises:
        InputError: if the result is not a valid configuration.
    """
    values = base_values(base)
    if seed is not None:
        values.setdefault("seed", seed)
    for path, value in overrides.items():
        set_path(values, path, value)
    try:
        config = TrainConfig.model_validate_json(json.dumps(values), strict=True)
        broken = [f"{relation.path}: {relation.message}" for relation in train_relations(config)]
    except ValueError as error:
        from pydantic import ValidationError

        if not isinstance(error, ValidationError):
            raise
        broken = ["train." + ".".join(map(str, one["loc"])) + f": {one['msg']}" for one in error.errors()]
    if broken:
        settings = ", ".join(f"train.{path}={value}" for path, value in overrides.items())
        raise InputError(
            "a drawn trial is not valid: " + "; ".join(broken),
            where=settings or "train",
            fix="change the searched values so that every combination is allowed, or use sweep.start_points",
        )
    return config


def base_values(base: TrainConfig) -> dict[str, Any]:
    """All settings of ``base`` as plain values, without the seed where nobody set it."""
    values = base.model_dump(mode="json")
    if "seed" not in base.model_fields_set:
        del values["seed"]
    return values


def set_path(values: dict[str, Any], path: str, value: Any) -> None:
    """Set ``a.b.c`` in nested mappings, in place; whatever is no mapping on the way is replaced by one."""
    *parents, leaf = path.split(".")
    for name in parents:
        if not isinstance(values.get(name), dict):
            values[name] = {}
        values = values[name]
    values[leaf] = copy.deepcopy(value)


def flatten_overrides(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested or dotted settings as dotted ones: {"lora": {"r": 8}} and {"lora.r": 8} both give {"lora.r": 8}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update({f"{name}.{inner}": item for inner, item in flatten_overrides(value).items()})
        else:
            flat[str(name)] = value
    return flat


def _round(value: float, *, low: float, high: float) -> float:
    """Four significant digits: what the report prints is what was used."""
    return min(max(float(f"{value:.4g}"), low), high)

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

from launcher.config import ExperimentConfig, Search, train_relations
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
        """What stands in for the setting where one value is needed: the first."""
        return self.values[0]

    @property
    def ends(self) -> tuple[tuple[str, Any], ...]:
        """Every value, with its name for messages."""
        return tuple((f"values[{index}]", value) for index, value in enumerate(self.values))

    def draw(self, stream: random.Random) -> Any:
        """One of the values at random."""
        return copy.deepcopy(self.values[stream.randrange(len(self.values))])

    def at(self, part: float) -> Any:
        """The value at a part of the domain, in [0, 1)."""
        return copy.deepcopy(self.values[min(int(part * len(self.values)), len(self.values) - 1)])

    def spec(self) -> dict[str, Any]:
        """The domain as a configuration writes it."""
        return {"values": list(self.values)}


@dataclass(frozen=True)
class Range:
    """A number between two ends, both included."""

    min: float
    max: float
    distribution: Distribution

    @property
    def middle(self) -> float:
        """What stands in for the setting where one value is needed: the middle, in the measure of the distribution."""
        if self.distribution == "log_uniform":
            return _round(math.sqrt(self.min * self.max), low=self.min, high=self.max)
        if self.distribution == "int_uniform":
            return int(self.min + self.max) // 2
        return _round((self.min + self.max) / 2, low=self.min, high=self.max)

    @property
    def ends(self) -> tuple[tuple[str, Any], ...]:
        """Both ends, with their names for messages."""
        return (("min", self.min), ("max", self.max))

    def draw(self, stream: random.Random) -> float:
        """A number at random by the distribution."""
        if self.distribution == "int_uniform":
            return stream.randint(int(self.min), int(self.max))
        if self.distribution == "log_uniform":
            value = math.exp(stream.uniform(math.log(self.min), math.log(self.max)))
        else:
            value = stream.uniform(self.min, self.max)
        return self.rounded(value)

    def at(self, part: float) -> float:
        """The value at a part of the domain, in [0, 1), in the measure of its distribution."""
        if self.distribution == "int_uniform":
            return int(self.min) + min(int(part * (self.max - self.min + 1)), int(self.max - self.min))
        if self.distribution == "log_uniform":
            return self.rounded(math.exp(math.log(self.min) + part * (math.log(self.max) - math.log(self.min))))
        return self.rounded(self.min + part * (self.max - self.min))

    def rounded(self, value: float) -> float:
        """Four significant digits, inside the range."""
        return _round(value, low=self.min, high=self.max)

    def spec(self) -> dict[str, Any]:
        """The domain as a configuration writes it."""
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

    @property
    def key(self) -> str:
        """What two trials have in common that differ in nothing but the seed that we gave them."""
        return json.dumps([self.config.model_dump(mode="json", exclude={"seed"}), self.overrides.get("seed")], sort_keys=True)


def trial_spec(base: TrainConfig, overrides: Mapping[str, Any], *, index: int, seed: int) -> TrialSpec:
    """The trial number ``index`` of a sweep with the experiment's ``seed``.

    Raises:
        InputError: if the overridden settings are not a valid trial.
    """
    config = trial_config(base, overrides, seed=trial_seed(seed, index=index))
    return TrialSpec(name=f"trial-{index:02d}", overrides=dict(overrides), config=config)


def default_startup_trials(space: SearchSpace) -> int:
    """Trials before a search that learns: a model of d settings says nothing from fewer than about 2 d points."""
    return max(4, 2 * len(space.domains))


def draw_trials(
    *,
    base: TrainConfig,
    space: SearchSpace,
    start_points: Sequence[Mapping[str, Any]] = (),
    num_trials: int,
    search: Search = "random",
    startup_trials: int | None = None,
    seed: int,
) -> tuple[TrialSpec, ...]:
    """The trials of a sweep: start points first, then draws (or the grid in the file's order).

    The same arguments give the same trials, and the first n trials do not depend on ``num_trials``. Each random draw of
    each setting has its own stream, so adding a searched setting leaves the draws of the others alone.
    Configurations that come up twice are skipped; fewer trials than asked for come back, with a warning, when the
    space holds no more. With ``optuna`` only the trials that are known beforehand come back: start points, then the Sobol
    draws up to ``startup_trials``. ``train.seed`` follows from (seed, trial index) unless ``base`` was given one, or it is
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
    wanted = num_trials
    if search == "optuna":
        wanted = min(num_trials, max(len(start_points), startup_trials or default_startup_trials(space)))
    draws = {"grid": _grid, "random": _random, "sobol": _sobol, "optuna": _sobol}[search]
    candidates = itertools.chain(({**space.middle(), **flatten_overrides(point)} for point in start_points), draws(space, seed=seed))
    trials: list[TrialSpec] = []
    seen: set[str] = set()
    repeats = 0
    for overrides in candidates:
        if len(trials) == wanted or repeats > _REDRAWS:
            break
        trial = trial_spec(base, overrides, index=len(trials), seed=seed)
        if trial.key in seen:
            repeats += 1
            continue
        seen.add(trial.key)
        repeats = 0
        trials.append(trial)
    if len(trials) < wanted:
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
        yield random_overrides(space, seed=seed, stream=str(index))


def _sobol(space: SearchSpace, *, seed: int) -> Iterator[dict[str, Any]]:
    """Points of one scrambled Sobol sequence, https://docs.scipy.org/doc/scipy/reference/generated/scipy.stats.qmc.Sobol.html"""
    if not space:
        yield from itertools.repeat({})
    from scipy.stats import qmc

    # One point at a time: the first n are the same however many follow.
    sequence = qmc.Sobol(d=len(space.domains), scramble=True, seed=seed)
    while True:
        parts = sequence.random(1)[0]
        yield {path: domain.at(float(part)) for (path, domain), part in zip(space.domains.items(), parts, strict=True)}


def random_overrides(space: SearchSpace, *, seed: int, stream: str) -> dict[str, Any]:
    """One random draw of every searched setting; ``stream`` names the draw."""
    return {path: domain.draw(random.Random(f"{seed}/{stream}/{path}")) for path, domain in space.domains.items()}


def _grid(space: SearchSpace, *, seed: int) -> Iterator[dict[str, Any]]:
    axes = [domain.values for domain in space.domains.values() if isinstance(domain, Choice)]
    for values in itertools.product(*axes):
        yield dict(zip(space.domains, copy.deepcopy(values), strict=True))


def possible_trials(config: ExperimentConfig, *, space: SearchSpace, known: Sequence[TrialSpec], most: int = 256) -> list[TrialSpec]:
    """The trials that a sweep may come to need prepared or checked: those that are known and, where others will be proposed, the corners
    of the space.

    Args:
        config: the experiment.
        space: what is searched.
        known: trials that will be made.
        most: corners that are looked at; a space with more has some that nobody looks at.

    Raises:
        InputError: if a corner is not a valid trial.
    """
    if config.sweep.search != "optuna":
        return list(known)
    axes = [[value for _, value in domain.ends] for domain in space.domains.values()]
    corners = (dict(zip(space.domains, values, strict=True)) for values in itertools.islice(itertools.product(*axes), most))
    return [*known, *(trial_spec(config.train, corner, index=len(known), seed=config.seed) for corner in corners)]


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

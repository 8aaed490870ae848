"""An evaluation cut into units of work whose results survive the process that computed them.

A unit's rows, and with them the batches they run in, depend on the data and the settings alone: a unit gives the same digits
whichever process computes it, and whenever.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trainers.errors import InputError
from trainers.files import append_jsonl, read_json, read_jsonl, write_json

_KEY = "key.json"


@dataclass(frozen=True)
class Shard:
    """Which of the units a process computes: every ``count``-th, from ``index`` on."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise InputError(f"shard {self.index} of {self.count}", fix="shards are numbered from 0 to one less than their count")


@dataclass(frozen=True)
class Unit:
    """Work that is done as a whole.

    Args:
        name: unique within the evaluation.
        items: the rows or questions in it, by index.
        cost: what it may take, in token positions; for showing progress.
    """

    name: str
    items: tuple[int, ...]
    cost: int


def cut_units(costs: Sequence[int], *, budget: int, prefix: str) -> list[Unit]:
    """Rows of similar cost together, the dearest first, while their costs fit the budget (at least one row each)."""
    groups: list[list[int]] = []
    used = 0
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        used += costs[index]
        if groups and used <= budget:
            groups[-1].append(index)
        else:
            groups.append([index])
            used = costs[index]
    return [Unit(f"{prefix}-{number}", tuple(group), sum(costs[index] for index in group)) for number, group in enumerate(groups)]


class UnitStore:
    """Results of finished units, in memory and, given a folder, in files that a later process reads.

    Every process appends to a file of its own; a line that a kill has torn is skipped.

    Args:
        folder: made when the store is opened; None keeps everything in memory.
        identity: of what the results depend on and cannot be read from the objects that are evaluated: the weights.
    """

    def __init__(self, folder: Path | None = None, *, identity: Mapping[str, Any] | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.identity = dict(identity or {})
        self._results: dict[str, Any] = {}
        self._file = "units-0-of-1.jsonl"

    def open(self, key: Mapping[str, Any], *, shard: Shard | None = None) -> bool:
        """Take up what earlier processes finished under the same key; whether there was something under another one, now removed.

        Raises:
            InputError: if a shard finds another key: the processes of one evaluation must agree.
        """
        if self.folder is None:
            return False
        key = {**key, "identity": self.identity}
        self._file = f"units-{shard.index}-of-{shard.count}.jsonl" if shard else self._file
        discarded = False
        if not self._has_key(key):
            if shard and (self.folder / _KEY).exists():
                raise InputError("another evaluation's unfinished results", where=str(self.folder), fix="evaluate into another file")
            discarded = any(self.folder.glob("units-*.jsonl"))
            for path in (self.folder / _KEY, *self.folder.glob("units-*.jsonl")):
                path.unlink(missing_ok=True)
            write_json(self.folder / _KEY, key)
        self.refresh()
        return discarded

    def _has_key(self, key: Mapping[str, Any]) -> bool:
        assert self.folder is not None
        path = self.folder / _KEY
        try:
            return path.exists() and read_json(path) == json.loads(json.dumps(dict(key)))
        except InputError:
            return False

    def refresh(self) -> None:
        """Read what other processes have finished since."""
        if self.folder is not None:
            for path in sorted(self.folder.glob("units-*.jsonl")):
                self._results |= {line["unit"]: line["result"] for line in read_jsonl(path) if isinstance(line, dict) and "result" in line}

    def __contains__(self, unit: Unit) -> bool:
        return unit.name in self._results

    def result(self, unit: Unit) -> Any:
        """What was added for a unit."""
        return self._results[unit.name]

    def add(self, unit: Unit, result: Any) -> None:
        """Keep a unit's result, which must be JSON; numbers that may not be finite go through ``written``."""
        self._results[unit.name] = result
        if self.folder is not None:
            append_jsonl(self.folder / self._file, {"unit": unit.name, "result": result})

    def remove(self) -> None:
        """Forget the files: the evaluation is complete."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


class Helpers(Protocol):
    """Other processes that compute shards of the same evaluation into the same store."""

    @property
    def count(self) -> int:
        """Processes, this one included; this one computes shard 0."""
        ...

    def start(self) -> None:
        """Start the others."""
        ...

    def wait(self, meanwhile: Callable[[], None]) -> None:
        """Return when the others have ended, however they did; ``meanwhile`` is called now and then."""
        ...

    def stop(self) -> None:
        """End what still runs."""
        ...


def written(value: float) -> float | str:
    """A number as JSON can hold it; ``float`` reads both."""
    return value if math.isfinite(value) else str(value)


def partial_folder(out: Path) -> Path:
    """Where the unfinished results of a report lie: ``eval.json`` has ``eval-partial`` beside it."""
    return Path(out).with_name(f"{Path(out).stem}-partial")

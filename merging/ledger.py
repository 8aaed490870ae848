"""Every measurement of a pair search: asked for once, kept under a hash of what it depends on, made by as many workers as there are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from merging.cheap import CheapScores, RecallFit, summarise
from merging.config import MergeConfig
from merging.examples import Example, Result, examples_hash
from trainers.errors import InputError, RunError
from trainers.files import sha256_json, strict_json

Scores = Mapping[str, float | None]


@dataclass(frozen=True)
class Merge:
    """Checkpoints by name, in order, and how they become one model. A single one is scaled."""

    trials: tuple[str, ...]
    config: MergeConfig


@dataclass(frozen=True)
class Task:
    """One piece of work: a merge on a stretch of the examples, or in full, with generation.

    Args:
        merge: to be measured.
        start: first example; null asks for a full evaluation.
        stop: end of the stretch.
        key: names the measurement, and what it leaves behind.
        name: of the merge in records.
    """

    merge: Merge
    start: int | None
    stop: int
    key: str
    name: str = ""


@dataclass(frozen=True)
class Failed:
    """Why something could not be measured, in words."""

    reason: str


Work = Callable[[Task], Any]
"""Does a task: a list of results, or the scores of a full evaluation."""
Map = Callable[[Work, Sequence[Task]], Iterable[Any]]
"""Runs tasks, maybe several at a time, and gives their results in order: the built-in ``map`` is one."""


class Measurements(Protocol):
    """What a search asks for."""

    @property
    def num_examples(self) -> int:
        """Examples of the whole fold."""

    @property
    def cost(self) -> dict[str, int]:
        """What was asked for so far, whether it was made now or before."""

    def cheap(self, merges: Sequence[Merge], *, stop: int) -> list[CheapScores | Failed]:
        """Scores over the first ``stop`` examples."""

    def full(self, merges: Mapping[str, Merge]) -> list[Scores | Failed]:
        """Scores of full evaluations, by name of the merge."""


class Ledger:
    """Measurements on one fold.

    What was kept is not made again, and each merge meets an example once: a later rung adds the examples that are new to it. A failure is a
    record with its reason, and is tried again by the next search.

    Args:
        examples: of the fold, in the shared order.
        hashes: content of each checkpoint by name.
        work: does a task.
        recall: how the recall of completions is estimated.
        run: runs tasks.
        kept: earlier measurements by key.
        keep: called with every new one.
    """

    def __init__(
        self,
        *,
        examples: Sequence[Example],
        hashes: Mapping[str, str],
        work: Work,
        recall: RecallFit | None = None,
        run: Map = map,
        kept: Mapping[str, Any] | None = None,
        keep: Callable[[str, Any], None] | None = None,
    ) -> None:
        self.examples, self.hashes, self.recall = examples, hashes, recall or RecallFit()
        self._work, self._run = _Attempt(work), run
        self._kept: dict[str, Any] = dict(kept or {})
        self._keep = keep or (lambda key, value: None)
        self._results: dict[str, list[Result]] = {}
        self.cost = {"examples": 0, "merges": 0, "full": 0, "rows_generated": 0, "reused": 0, "failed": 0}

    @property
    def num_examples(self) -> int:
        """Examples of the whole fold."""
        return len(self.examples)

    def know(self, merge: Merge, results: Sequence[Result]) -> None:
        """Enter results of all examples that were found elsewhere, at no cost."""
        self._results[self._key("merge", merge)] = list(results)

    def cheap(self, merges: Sequence[Merge], *, stop: int) -> list[CheapScores | Failed]:
        """Scores over the first ``stop`` examples; each merge is built once and meets the examples that are new to it."""
        tasks: dict[str, Task] = {}
        for merge in merges:
            start = len(self._results.get(self._key("merge", merge), ()))
            if start < stop:
                key = self._key("cheap", merge, examples_hash(self.examples[start:stop]))
                tasks[key] = Task(merge, start, stop, key)
        failed: dict[str, Failed] = {}
        for task, found in self._do(list(tasks.values())):
            known = self._key("merge", task.merge)
            if isinstance(found, Failed):
                failed[known] = found
            else:
                self.cost["examples"] += len(found)
                self._results[known] = [*self._results.get(known, ()), *_numbers(found)]
        keys = [self._key("merge", merge) for merge in merges]
        return [
            failed[key] if key in failed else summarise(self.examples[:stop], results=self._results[key][:stop], recall=self.recall)
            for key in keys
        ]

    def full(self, merges: Mapping[str, Merge]) -> list[Scores | Failed]:
        """Scores of full evaluations, in order of the names."""
        tasks = [Task(merge, None, 0, self._key("full", merge), name) for name, merge in merges.items()]
        found = {}
        for task, value in self._do(tasks):
            found[task.key] = value if isinstance(value, Failed) else value["scores"]
            if not isinstance(value, Failed):
                self.cost["full"] += 1
                self.cost["rows_generated"] += int(value.get("rows_generated") or 0)
        return [found[task.key] for task in tasks]

    def full_key(self, merge: Merge) -> str:
        """Under which a full evaluation is kept."""
        return self._key("full", merge)

    def _do(self, tasks: Sequence[Task]) -> Iterable[tuple[Task, Any]]:
        waiting = {task.key: task for task in tasks if task.key not in self._kept}
        made = iter(self._run(self._work, list(waiting.values())))
        failed: dict[str, Failed] = {}
        for task in tasks:
            if task.key in self._kept or task.key in failed:
                self.cost["reused"] += 1
                value = self._kept.get(task.key, failed.get(task.key))
            else:
                value = next(made)
                if isinstance(value, Failed):
                    self.cost["failed"] += 1
                    failed[task.key] = value
                else:
                    value = strict_json(value)
                    self._kept[task.key] = value
                    self._keep(task.key, value)
            self.cost["merges"] += 1
            yield task, value

    def _key(self, kind: str, merge: Merge, more: str = "") -> str:
        parents = [[name, self.hashes[name]] for name in merge.trials]
        return sha256_json({"kind": kind, "parents": parents, "merge": merge.config.model_dump(mode="json"), "examples": more})


class _Attempt:
    """Work whose expected failures are results."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def __call__(self, task: Task) -> Any:
        try:
            return self.work(task)
        except (InputError, RunError) as error:
            return Failed(f"failed: {error.what}")


def _numbers(results: Sequence[Sequence[float | None]]) -> list[Result]:
    """What JSON keeps as null was not a number."""
    return [[math.nan if value is None else float(value) for value in result] for result in results]

"""Metrics that a user's plugin adds: one number per answered row, averaged over each set, with an interval over documents."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np

from eval.bootstrap import draw_weights, limits
from eval.config import EvalConfig
from eval.report import SCORE_NAMES
from trainers.data.types import Kind
from trainers.errors import InputError
from trainers.plugins import line_of, register

Row = Mapping[str, Any]
Value = TypeVar("Value", bound=Callable[..., float | None])
SETS = ("forget", "retain")
KEY = "metrics"
"""Where a row of a report keeps its values."""


@dataclass(frozen=True)
class Metric:
    """A metric of a plugin.

    Args:
        name: its scores are ``forget_NAME`` and ``retain_NAME``.
        value: from a row of ``eval-rows.jsonl`` to a number, or None where it is not defined.
        meaning: a sentence for the report's notes.
        kind: the rows that it is defined on; None for both.
        whole_texts: whether it reads ``output``, which then must not be cut short where the official score is decided.
    """

    name: str
    value: Callable[[Row], float | None]
    meaning: str
    kind: Kind | None = None
    whole_texts: bool = True


_metrics: dict[str, Metric] = {}
METRICS: Mapping[str, Metric] = MappingProxyType(_metrics)
"""The metrics that plugins have added in this process, by name."""


def register_metric(name: str, *, meaning: str, kind: str | None = None, whole_texts: bool = True) -> Callable[[Value], Value]:
    """Decorate a new metric: a function of one scored row, whose mean over each set becomes a score of every evaluation.

    A row has, among others, ``set``, ``id``, ``task``, ``kind`` ("sc" or "qa"), ``input``, ``expected``, ``output``,
    ``score``, ``answer_log_prob``, ``num_tokens`` and ``token_accuracy``, as ``eval-rows.jsonl`` does. The scores
    ``forget_NAME`` and ``retain_NAME`` appear in ``eval.json`` with an interval over resampled documents, in
    ``results.json`` and in ``trials.csv``. They take no part in the choice of a pair.

    Args:
        name: of the metric.
        meaning: a sentence for the report's notes.
        kind: ``"sc"`` for completions only, ``"qa"`` for questions only.
        whole_texts: False if it does not read ``output``. Otherwise decoding goes on where the official score is decided
            already, which costs time.

    Raises:
        InputError: for a name that is taken, or a function that does not take one row.
    """

    def decorate(function: Value) -> Value:
        if kind is not None and kind not in set(Kind):
            raise InputError(f"metric {name}: there is no kind {kind!r}", fix='write "sc" (completions), "qa" (questions), or leave it out')
        if not callable(function) or len(inspect.signature(function).parameters) != 1:
            raise InputError(
                f"metric {name}: the function does not take one argument",
                why="it is called with one row at a time",
                fix="def my_metric(row)",
            )
        taken = [*METRICS, *(score.removeprefix(f"{side}_") for score in SCORE_NAMES for side in SETS if score.startswith(f"{side}_"))]
        register("metric", name, taken=taken, undo=lambda: _metrics.pop(name, None))
        _metrics[name] = Metric(name, function, meaning, None if kind is None else Kind(kind), whole_texts)
        return function

    return decorate


def metric_settings(config: EvalConfig) -> EvalConfig:
    """The settings of an evaluation, without early ends of decoding where a metric reads whole texts."""
    if not any(metric.whole_texts for metric in METRICS.values()):
        return config
    return config.model_copy(update={"stop_decided_questions": False, "stop_decided_completions": False})


def add_values(rows: Sequence[dict[str, Any]]) -> None:
    """Write the value of every metric into the answered rows.

    Raises:
        InputError: if a function fails, or returns something else than a finite number or None.
    """
    for row in rows:
        if row["part"] != "task" or not METRICS:
            continue
        own = {name: metric for name, metric in METRICS.items() if metric.kind in (None, Kind(row["kind"]))}
        seen = MappingProxyType({**row})
        row[KEY] = {name: _value(metric, seen) for name, metric in own.items()}


def _value(metric: Metric, row: Row) -> float | None:
    try:
        value = metric.value(row)
    except Exception as error:
        code = metric.value.__code__.co_filename
        line = line_of(error, file=code)
        raise InputError(
            f"the metric {metric.name} failed: {type(error).__name__}: {error}",
            where=f"row {row['id']!r}" + (f"; {code}, line {line}" if line else ""),
            fix="return None where it is not defined",
        ) from error
    if value is None:
        return None
    if isinstance(value, (bool, int, float, np.number)) and math.isfinite(value):
        return float(value)
    raise InputError(
        f"the metric {metric.name} returned {value!r}",
        where=f"row {row['id']!r}",
        fix="return a finite number, or None where it is not defined",
    )


def metric_scores(rows: Sequence[Row]) -> dict[str, float | None]:
    """``forget_NAME`` and ``retain_NAME`` of every metric: the mean over the rows that have a value, None where none has."""
    found: dict[str, float | None] = {}
    for name in METRICS:
        for side in SETS:
            values = [value for row in rows if row.get("set") == side and (value := row.get(KEY, {}).get(name)) is not None]
            found[f"{side}_{name}"] = math.fsum(values) / len(values) if values else None
    return found


def metric_intervals(
    rows: Sequence[Row], *, scores: Mapping[str, float | None], samples: int, seed: int, confidence: float
) -> dict[str, list[float]]:
    """An interval for each of these scores, from the same resampled documents as those of the other scores."""
    found: dict[str, list[float]] = {}
    for side in SETS:
        own = [row for row in rows if row.get("set") == side]
        tasks = {row["document"]: row["task"] for row in reversed(own)}
        units = sorted(tasks)
        weights_SU = draw_weights([(unit, tasks[unit]) for unit in units], samples=samples, seed=seed, part=side)
        place = {unit: index for index, unit in enumerate(units)}
        for name in METRICS:
            sums_U, counts_U = np.zeros(len(units)), np.zeros(len(units))
            for row in own:
                value = row.get(KEY, {}).get(name)
                if value is not None:
                    sums_U[place[row["document"]]] += value
                    counts_U[place[row["document"]]] += 1
            point = scores.get(f"{side}_{name}")
            if point is None:
                continue
            with np.errstate(divide="ignore", invalid="ignore"):
                drawn = (weights_SU @ sums_U) / (weights_SU @ counts_U)
            interval = limits(drawn, point=point, confidence=confidence)
            if interval is not None:
                found[f"{side}_{name}"] = interval
    return found


def metric_notes() -> list[str]:
    """What the scores of plugins mean, a sentence each."""
    return [f"forget_{metric.name}, retain_{metric.name} (of a plugin): {metric.meaning}" for metric in METRICS.values()]

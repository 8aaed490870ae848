"""The report of an evaluation on TOFU or MUSE as a pair of files: summary and scored rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from eval.report import rows_path
from trainers.files import strict_json, write_json, write_text

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class SuiteReport:
    """Everything one evaluation found.

    Args:
        benchmark: ``tofu`` or ``muse``.
        model: the model's name.
        retained_model: name of the model trained without the forget set, or None.
        scores: one number per score of the benchmark; None where it was not measured or is not finite, which a note explains.
        intervals: [low, high] per score that has one.
        counts: rows of every file that was found, and of what was scored.
        sets: per set its file, rows, what is resampled, and its metrics.
        deviations: how this differs from the published code, a sentence each.
        notes: what a reader of the numbers has to know, a sentence each.
        config: the ``SuiteConfig`` as a dictionary.
        seconds: wall time.
        rows: one dictionary per scored row.
    """

    benchmark: str
    model: str
    retained_model: str | None
    scores: Mapping[str, float | None]
    intervals: Mapping[str, list[float]]
    counts: Mapping[str, int]
    sets: Mapping[str, Mapping[str, Any]]
    deviations: list[str]
    notes: list[str]
    config: Mapping[str, Any]
    seconds: float
    rows: list[dict[str, Any]]


def write_suite_report(report: SuiteReport, path: Path) -> None:
    """Write the rows, then the summary, which is the sign that both are complete. Numbers that are not finite become null."""
    path = Path(path)
    # A summary of an earlier evaluation must not vouch for the rows of this one.
    path.unlink(missing_ok=True)
    lines = [json.dumps(strict_json(row), ensure_ascii=False, allow_nan=False) for row in report.rows]
    write_text(rows_path(path), "".join(line + "\n" for line in lines))
    summary = {field.name: getattr(report, field.name) for field in fields(SuiteReport) if field.name != "rows"}
    write_json(path, {"schema_version": SCHEMA_VERSION, **summary})


def report_lines(report: SuiteReport) -> list[str]:
    """The report as a table for people: scores with their intervals, then the sets."""
    lines = [f"{report.benchmark.upper()}  {report.model}"]
    in_table = {f"{name}_{metric}" for name, values in report.sets.items() for metric in values}
    for name in (name for name in report.scores if name not in in_table):
        limits = report.intervals.get(name)
        interval = f"   [{limits[0]:.3f}, {limits[1]:.3f}]" if limits else ""
        lines.append(f"  {name:<28} {_number(report.scores[name])}{interval}")
    metrics = list(dict.fromkeys(key for values in report.sets.values() for key in values if key not in _NO_METRICS))
    lines.append(f"  {'set':<16} {'rows':>5}  " + "  ".join(f"{metric:>{max(8, len(metric))}}" for metric in metrics))
    for name, values in report.sets.items():
        cells = "  ".join(f"{_number(values.get(metric)):>{max(8, len(metric))}}" for metric in metrics)
        lines.append(f"  {name:<16} {values['rows']:>5}  {cells}")
    return lines + [f"  note: {note}" for note in report.notes]


_NO_METRICS = ("source", "rows", "unit", "units")


def _number(value: Any) -> str:
    return f"{value:8.4g}" if isinstance(value, (int, float)) else f"{'-':>8}"

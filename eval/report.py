"""The evaluation report as a pair of files: summary and scored rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from trainers.errors import InputError
from trainers.files import read_json, strict_json, write_json, write_text

SCHEMA_VERSION = 1

SCORE_NAMES = (
    "task_aggregate",
    "mia_auc",
    "mia_score",
    "mmlu_average",
    "final_score",
    "forget_regurgitation",
    "forget_knowledge",
    "retain_regurgitation",
    "retain_knowledge",
    "forget_answer_log_prob",
    "retain_answer_log_prob",
    "forget_token_accuracy",
    "retain_token_accuracy",
    "forgetting",
    "retention",
    "degenerate_rate",
    "forget_extraction_strength",
    "retain_extraction_strength",
)
"""Every report has these keys under ``scores``; what was not measured is null."""


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """Everything one evaluation found.

    Args:
        fold: which rows were scored: train, validation or test.
        model: the model's name, for instance ``trials/trial-03``.
        official: the benchmark's own result dictionary. A value that is not a number is NaN here and null in the file, where the
            benchmark's script writes the bare word NaN, which is no JSON.
        scores: one number per name of ``SCORE_NAMES``; None where it was not measured or is not finite.
        intervals: [low, high] per score that has one.
        counts: rows, documents, questions, tokens.
        terms: the terms of the task aggregate, ``{"name", "value"}``.
        deviations: how this differs from the benchmark's script, a sentence each.
        notes: what a reader of the numbers has to know, a sentence each.
        config: the ``EvalConfig`` as a dictionary.
        seconds: wall time.
        rows: one dictionary per scored row, document or question.
        attack: ``auc``, its ``standard_error``, ``members``, ``nonmembers`` and ``not_finite`` (losses); empty without an attack.
        mmlu: ``average_acc``, ``subcat_acc``, ``cat_acc``, ``subject_acc`` and ``subject_questions``; empty without MMLU.
    """

    fold: str
    model: str
    official: Mapping[str, Any]
    scores: Mapping[str, float | None]
    intervals: Mapping[str, list[float]]
    counts: Mapping[str, int]
    terms: list[dict[str, Any]]
    deviations: list[str]
    notes: list[str]
    config: Mapping[str, Any]
    seconds: float
    rows: list[dict[str, Any]]
    attack: Mapping[str, Any] = field(default_factory=dict)
    mmlu: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LoadedReport(EvalReport):
    """A report read back from its files."""

    path: Path


_SUMMARY = {entry.name: entry.default_factory is MISSING for entry in fields(EvalReport) if entry.name != "rows"}
"""Name to whether a file must hold it; the others were added later."""


def rows_path(path: Path) -> Path:
    """Where the rows of a report lie: ``eval.json`` has ``eval-rows.jsonl`` beside it."""
    return Path(path).with_name(f"{Path(path).stem}-rows.jsonl")


def write_report(report: EvalReport, path: Path) -> None:
    """Write the rows, then the summary, which is the sign that both are complete. Numbers that are not finite become null."""
    path = Path(path)
    # A summary of an earlier evaluation must not vouch for the rows of this one.
    path.unlink(missing_ok=True)
    lines = [json.dumps(strict_json(row), ensure_ascii=False, allow_nan=False) for row in report.rows]
    write_text(rows_path(path), "".join(line + "\n" for line in lines))
    write_json(path, {"schema_version": SCHEMA_VERSION, **{name: getattr(report, name) for name in _SUMMARY}})


def read_report(path: Path) -> LoadedReport:
    """Read a report and its rows.

    Raises:
        InputError: if a file is missing, torn, of another version or lacks a key.
    """
    path = Path(path)
    value = read_json(path)
    version = value.get("schema_version") if isinstance(value, dict) else None
    if version != SCHEMA_VERSION:
        raise InputError(
            f"schema_version is {version!r}, but this version reads {SCHEMA_VERSION}", where=str(path), fix="run the evaluation again"
        )
    missing = [name for name, needed in _SUMMARY.items() if needed and name not in value]
    if missing:
        raise InputError(f"not an evaluation report: {', '.join(missing)} missing", where=str(path), fix="run the evaluation again")
    return LoadedReport(path=path, rows=_read_rows(rows_path(path)), **{name: value[name] for name in _SUMMARY if name in value})


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError("the rows of the report are missing", where=str(path), fix="run the evaluation again") from None
    rows = []
    # Not splitlines: a generated text may hold any of Unicode's line ends, unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if line:
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise InputError(f"not a JSON line: {error}", where=f"{path}, line {number}", fix="run the evaluation again") from None
    return rows

"""The data of every figure and table of the page, as CSV and JSON files in ``RUN/plots``."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.report_audit import audit_view
from launcher.report_data import FOLD_FILES, RunData
from launcher.report_failures import failures_view
from launcher.report_figures import figure_rows
from launcher.report_pairs import pair_view
from launcher.report_provenance import provenance_view
from launcher.report_rows import side_by_side
from launcher.report_scores import LEADERBOARD, heat_view
from launcher.report_text import without_paths
from launcher.report_verdicts import verdict_view
from trainers.files import strict_json, write_json, write_text

Rows = Sequence[Mapping[str, Any]]


def report_tables(data: RunData, *, mask: bool = True) -> dict[str, Rows]:
    """Name to rows; tables without rows are left out.

    Args:
        data: the run.
        mask: hide personal data in the generations.
    """
    pair, audit, verdicts, failures = pair_view(data), audit_view(data), verdict_view(data), failures_view(data)
    provenance = provenance_view(data)
    tables: dict[str, Rows] = {
        **figure_rows(data),
        "scores": _scores(data),
        "differences": _differences(data),
        "leaderboard": [{"test_set": "different", **row} for row in LEADERBOARD],
        "verdicts": [
            {"fold": fold, "name": row["name"], "verdict": row["verdict"], "because": "; ".join(row["reasons"])}
            for fold, rows in ((data.fold, verdicts["models"]), ("validation", verdicts["trials"]))
            for row in rows
        ],
        "terms": [{"term": term, **{column["name"]: column["values"].get(term) for column in heat["columns"]}} for term in heat["names"]]
        if (heat := heat_view(data))
        else [],
        "search": pair["trace"],
        "pairs": pair["rows"],
        "controls": _named(pair["controls"]),
        "contestants": _named(pair["contestants"]),
        "excluded": pair["excluded"],
        "trials": _trials(data),
        "failures": [
            {key: row[key] for key in ("name", "state", "cause", "error", "starts", "errors", "preemptions")} for row in failures["trials"]
        ],
        "generations": _generations(data, mask=mask),
        "provenance": [{"group": group, "key": key, "value": value} for group, rows in provenance["groups"].items() for key, value in rows],
    }
    for table in audit.get("tables") or []:
        # The head of an audit's table has a column "control" for each score.
        names = _unique(table["head"])
        tables[table["name"]] = [dict(zip(names, row, strict=True)) for row in table["rows"]]
    if "audit_attacks" in tables:
        tables["audit"] = _audit(data)
    return {name: rows for name, rows in tables.items() if rows}


def save_tables(tables: Mapping[str, Rows], folder: Path) -> None:
    """Write ``NAME.csv`` and ``NAME.json`` (a list of rows) of each table, atomically."""
    for name, rows in tables.items():
        write_text(folder / f"{name}.csv", csv_text(rows))
        write_json(folder / f"{name}.json", [strict_json(dict(row)) for row in rows])


def csv_text(rows: Rows) -> str:
    """Rows with a head of all their keys; an empty cell where a row has no such value."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        writer.writerow(["" if row.get(name) is None else row[name] for name in names])
    return out.getvalue()


def _scores(data: RunData) -> Rows:
    rows = []
    for model in data.models:
        intervals = model["intervals"] if isinstance(model["intervals"], Mapping) else {}
        row = {key: model.get(key) for key in ("name", "label", "role", "verdict")}
        row["delivered"] = data.delivered is not None and data.delivered["name"] == model["name"]
        for key, value in model["scores"].items():
            bounds = intervals.get(key)
            row[key] = value
            row[f"{key}_low"], row[f"{key}_high"] = bounds if isinstance(bounds, list) and len(bounds) == 2 else (None, None)
        rows.append(row)
    return [row for row, model in zip(rows, data.models, strict=True) if model["scores"]]


def _differences(data: RunData) -> Rows:
    return [
        {"name": model["name"], "score": key, **{part: value.get(part) for part in ("difference", "low", "high")}}
        for model in data.models
        for key, value in (model.get("difference_to_best_parent") or {}).items()
        if isinstance(value, Mapping)
    ]


def _named(rows: Rows) -> Rows:
    """Rows whose scores are a list, with a name for each."""
    names = ("task_aggregate", "mia_auc", "mmlu_average", "forgetting", "retention")
    return [
        {**{key: value for key, value in row.items() if key != "scores"}, **dict(zip(names, row["scores"], strict=True))} for row in rows
    ]


def _trials(data: RunData) -> Rows:
    rows = []
    for trial in data.trials:
        row = {key: trial.get(key) for key in ("name", "status", "verdict", "seconds", "step", "num_steps")}
        row |= {f"setting.{key}": value for key, value in trial["overrides"].items()}
        row |= {f"{fold}.{key}": value for fold in FOLD_FILES for key, value in trial[fold].items()}
        rows.append(row | {"error": without_paths(trial["error"]) if trial.get("error") else None})
    return rows


def _generations(data: RunData, *, mask: bool) -> Rows:
    shown = side_by_side(data, mask=mask)
    return [
        {
            **{
                "set": part,
                "id": row["id"],
                "task": row["task"],
                "kind": row["kind"],
                "prompt": row["prompt"],
                "expected": row["expected"],
            },
            **{f"{role}_{key}": row[role][key] for role in ("before", "after") for key in ("text", "score", "same")},
        }
        for part, rows in shown["sets"].items()
        for row in rows
    ]


def _audit(data: RunData) -> Rows:
    """The numbers of the audit's figure."""
    rows: list[dict[str, Any]] = []
    for attack, found in data.audit["attacks"].items():
        for score, one in found["scores"].items():
            row = {"attack": attack, "score": score, "clear": one.get("clear"), "mended": one.get("mended")}
            for key in ("recovered", "control_recovered", "excess"):
                estimate = one.get(key) or {}
                low, high = estimate.get("interval") or (None, None)
                row |= {key: estimate.get("value"), f"{key}_low": low, f"{key}_high": high}
            rows.append(row)
    for task, families in data.audit["membership"].items():
        keys = ("before", "unlearned", "control", "standard_error")
        rows += [{"attack": f"membership: {name}", "score": task, **{key: one.get(key) for key in keys}} for name, one in families.items()]
    return rows


def _unique(names: Sequence[str]) -> list[str]:
    found: list[str] = []
    for name in names:
        found.append(f"{found[-1]}: {name}" if found and names.count(name) > 1 else name)
    return found

"""The tables of scores: models with intervals and paired differences, the public leaderboard, and the twelve terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.report_data import RunData, is_number
from launcher.report_text import interval, number

LEADERBOARD_URL = "https://llmunlearningsemeval2025.github.io/"
# Places 1 to 3 of the 7B table of SemEval-2025 Task 4: task aggregate, MIA score, MMLU, final.
LEADERBOARD = (
    {"name": "AILS-NTUA", "task_aggregate": 0.827, "mia_score": 0.847, "mmlu_average": 0.443, "final_score": 0.706},
    {"name": "ZJUKLAB", "task_aggregate": 0.944, "mia_score": 0.048, "mmlu_average": 0.471, "final_score": 0.487},
    {"name": "YNU", "task_aggregate": 0.834, "mia_score": 0.139, "mmlu_average": 0.436, "final_score": 0.470},
)
SCORE_COLUMNS = (
    ("task_aggregate", "task aggregate", "↑"),
    ("mia_auc", "raw AUC", "→ 0.5"),
    ("mia_score", "MIA score", "↑"),
    ("mmlu_average", "MMLU", "↑"),
    ("final_score", "final", "↑"),
)
PART_COLUMNS = (
    ("forgetting", "forgetting", "↑"),
    ("retention", "retention", "↑"),
    ("forget_regurgitation", "forget regurgitation", "↓"),
    ("forget_knowledge", "forget knowledge", "↓"),
    ("retain_regurgitation", "retain regurgitation", "↑"),
    ("retain_knowledge", "retain knowledge", "↑"),
)


def score_rows(data: RunData) -> list[dict[str, Any]]:
    """One row per scored model: what the score table shows, the parts behind it, and all paired differences to the better parent."""
    return [_model_row(data, model) for model in data.models if model["scores"]]


def _model_row(data: RunData, model: Mapping[str, Any]) -> dict[str, Any]:
    differences = [
        {"key": key, "title": title, **found}
        for key, title, _ in (*SCORE_COLUMNS, *PART_COLUMNS)
        if (found := difference(model, key=key)) is not None
    ]
    headline = next((row for key in ("final_score", "task_aggregate") for row in differences if row["key"] == key), None)
    delivered = data.delivered is not None and data.delivered["name"] == model["name"]
    intervals = model["intervals"] if isinstance(model["intervals"], Mapping) else {}

    def cells(columns: tuple[tuple[str, str, str], ...]) -> list[dict[str, str]]:
        return [{"key": key, "value": number(model["scores"].get(key)), "interval": interval(intervals.get(key))} for key, _, _ in columns]

    keys = {key: model.get(key) for key in ("name", "label", "role", "verdict")}
    rows = {"cells": cells(SCORE_COLUMNS), "parts": cells(PART_COLUMNS), "differences": differences}
    return {**keys, **rows, "headline": headline, "delivered": delivered}


def difference(model: Mapping[str, Any], *, key: str) -> dict[str, Any] | None:
    """A paired difference to the better parent: ``value``, ``interval`` and whether it ``is_clear`` of 0."""
    value = (model.get("difference_to_best_parent") or {}).get(key)
    if not isinstance(value, Mapping) or not is_number(value.get("difference")):
        return None
    low, high = value.get("low"), value.get("high")
    clear = (is_number(low) and low > 0) or (is_number(high) and high < 0)
    return {"value": number(value["difference"], signed=True), "interval": interval((low, high), signed=True), "is_clear": clear}


def heat_view(data: RunData) -> dict[str, Any]:
    """The twelve terms of the untouched target, both parents, the merge and the delivered model; each column's weakest is marked."""
    roles = ("baseline", "parent_over", "parent_under", "merged")
    shown = [model for role in roles for model in data.models if model.get("role") == role and model["terms"]]
    if data.delivered is not None and data.delivered["terms"] and data.delivered not in shown:
        shown.append(data.delivered)
    shown = shown or [model for model in data.models if model["terms"]][:4]
    names: list[str] = []
    for model in shown:
        names += [term["name"] for term in model["terms"] if term["name"] not in names]
    columns = []
    for model in shown:
        values = {term["name"]: term.get("value") for term in model["terms"]}
        present = [value for value in values.values() if is_number(value)]
        lowest = min(present) if present else None
        weakest = next((name for name in names if lowest is not None and values.get(name) == lowest), None)
        delivered = data.delivered is not None and data.delivered["name"] == model["name"]
        column = {"name": model["name"], "label": model.get("label"), "values": values, "lowest": lowest, "weakest": weakest}
        columns.append(
            {
                **column,
                "aggregate": model["scores"].get("task_aggregate"),
                "ties": sum(value == lowest for value in present),
                "delivered": delivered,
            }
        )
    return {"names": names, "columns": columns, "shade": shade}


def shade(value: Any) -> str:
    """A background for a value between 0 and 1: vermillion below one half, blue above, none at one half."""
    if not is_number(value):
        return "transparent"
    strength = min(1.0, abs(value - 0.5) * 2) * 0.6
    return f"rgba({'213,94,0' if value < 0.5 else '0,114,178'},{strength:.2f})"

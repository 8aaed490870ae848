"""Why this pair: the search's record (``pairs.json``) in the form that the page shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.report_data import RunData, is_number, numbers

MAX_PAIRS = 40
MAX_CONTESTANTS = 30


def pair_view(data: RunData) -> dict[str, Any]:
    """The pair, its rivals and the measurements that decided, all of the validation fold.

    Returns:
        ``pair`` (over, under, method, density, scale, weights; empty without one), ``sentence`` and ``metric`` (text or None), ``rows``
        (a dictionary per candidate pair), ``hidden`` (how many pairs are not listed), ``excluded`` (trial and reason), ``contestants``
        (what was measured in full, best first) and ``knobs`` (``name``, ``label``, ``curves``, ``chosen``) for the figures. Empty where
        pairs.json is missing.
    """
    search = data.pairs
    pair = _chosen(data)
    rows = [_row(item, pair=pair) for item in _dicts(search.get("pairs"))]
    rows.sort(key=lambda row: not row["chosen"])
    return {
        "pair": pair,
        "sentence": search.get("sentence"),
        "metric": search.get("metric"),
        "rows": rows[:MAX_PAIRS],
        "hidden": max(0, len(rows) - MAX_PAIRS),
        "excluded": [
            {"name": item.get("name"), "reason": item["excluded"]} for item in _dicts(search.get("candidates")) if item.get("excluded")
        ],
        "contestants": [_contestant(item) for item in _dicts(search.get("contestants"))][:MAX_CONTESTANTS],
        "knobs": _knobs(search, pair=pair),
    }


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _chosen(data: RunData) -> dict[str, Any]:
    """The pair of results.json, or before that exists the best merge of the search."""
    best = _mapping(data.pairs.get("best_merge"))
    pair = _mapping(data.results.get("pair")) or {**_mapping(best.get("config")), "over": best.get("over"), "under": best.get("under")}
    names = ("over", "under", "method", "density", "scale", "weights")
    return {name: pair.get(name) for name in names} if pair.get("over") and pair.get("under") else {}


def _row(item: Mapping[str, Any], *, pair: Mapping[str, Any]) -> dict[str, Any]:
    prediction = numbers(item.get("prediction"))
    merges = [entry for entry in _dicts(item.get("full")) if entry.get("role") == "merge" and entry.get("scores")]
    measured = numbers(merges[0]["scores"]) if merges else {}
    objectives = [point["objective"] for point in _dicts(item.get("points")) if is_number(point.get("objective"))]
    return {
        "over": item.get("over"),
        "under": item.get("under"),
        "predicted_aggregate": prediction.get("task_aggregate"),
        "predicted_auc": prediction.get("mia_auc"),
        "num_points": len(objectives),
        "objective": max(objectives, default=None),
        "measured_aggregate": measured.get("task_aggregate"),
        "measured_auc": measured.get("mia_auc"),
        "outcome": str(item.get("outcome") or ""),
        "chosen": _is_pair(item, pair),
    }


def _is_pair(item: Mapping[str, Any], pair: Mapping[str, Any]) -> bool:
    return bool(pair) and (item.get("over"), item.get("under")) == (pair["over"], pair["under"])


def _contestant(item: Mapping[str, Any]) -> dict[str, Any]:
    scores = numbers(item.get("scores"))
    names = ("task_aggregate", "mia_auc", "mmlu_average", "forgetting", "retention")
    value = item.get("value") if scores else None
    return {
        "name": item.get("name"),
        "role": item.get("role"),
        "value": value,
        "gate": item.get("gate"),
        "scores": [scores.get(name) for name in names],
    }


def _knobs(search: Mapping[str, Any], *, pair: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Membership AUC of the chosen pair's merges over scale (a curve per density) and over density (at scale 1)."""
    points = [point for item in _dicts(search.get("pairs")) if _is_pair(item, pair) for point in _dicts(item.get("points"))]
    at: dict[tuple[float, float], float] = {}
    for point in points:
        auc = numbers(point.get("cheap")).get("mia_auc")
        if auc is not None and is_number(point.get("density")) and is_number(point.get("scale")):
            at[point["density"], point["scale"]] = auc
    chosen = at.get((pair.get("density"), pair.get("scale"))) if pair else None  # type: ignore[arg-type]
    by_scale: dict[str, list[tuple[float, float]]] = {}
    for (density, scale), auc in sorted(at.items()):
        by_scale.setdefault(f"density {density:g}", []).append((scale, auc))
    by_density = [(density, auc) for (density, scale), auc in sorted(at.items()) if scale == 1]
    knobs = []
    if any(len(curve) > 1 for curve in by_scale.values()):
        mark = None if chosen is None else (pair["scale"], chosen)
        knobs.append({"name": "scale", "label": "scale of the merged update", "curves": by_scale, "chosen": mark})
    if len(by_density) > 1:
        mark = (pair["density"], chosen) if chosen is not None and pair["scale"] == 1 else None
        knobs.append(
            {
                "name": "density",
                "label": "density (share of each update kept), at scale 1",
                "curves": {"scale 1": by_density},
                "chosen": mark,
            }
        )
    return knobs

"""Why this pair: the search's record (``pairs.json``) in the form that the page shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.report_data import RunData, is_number, numbers

MAX_PAIRS = 40
MAX_CONTESTANTS = 30


def pair_view(data: RunData) -> dict[str, Any]:
    """The pair, its rivals and the measurements that decided, all of the validation fold but for the controls' final scores.

    Returns:
        ``pair`` (over, under, method, density, scale, weights; empty without one), ``sentence`` and ``metric`` (text or None), ``rows``
        (a dictionary per candidate pair), ``hidden`` (how many pairs are not listed), ``excluded`` (checkpoint and reason), ``controls``
        (what a merge is compared with), ``contestants`` (what was measured in full, best first), ``cost`` (a sentence, or None) and
        ``knobs`` (``name``, ``label``, ``curves``, ``chosen``) for the figures. Empty where pairs.json is missing.
    """
    search = data.pairs
    pair = _chosen(data)
    rows = [_row(item, pair=pair) for item in _dicts(search.get("pairs"))]
    rows.sort(key=lambda row: (not row["chosen"], not row["num_points"]))
    return {
        "pair": pair,
        "sentence": search.get("sentence"),
        "metric": search.get("metric"),
        "rows": rows[:MAX_PAIRS],
        "hidden": max(0, len(rows) - MAX_PAIRS),
        "excluded": [
            {"name": item.get("name"), "reason": item["excluded"]} for item in _dicts(search.get("candidates")) if item.get("excluded")
        ],
        "controls": [_control(item, data=data) for item in _dicts(search.get("controls"))],
        "contestants": [_contestant(item) for item in _dicts(search.get("contestants"))][:MAX_CONTESTANTS],
        "cost": _cost(search),
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
    objectives = [point["objective"] for point in _last_rung(item) if is_number(point.get("objective"))]
    return {
        "over": item.get("over"),
        "under": item.get("under"),
        "predicted_aggregate": prediction.get("task_aggregate"),
        "predicted_share": prediction.get("share"),
        "num_points": len(_dicts(item.get("points"))),
        "objective": max(objectives, default=None),
        "examples": max((point.get("examples") or 0 for point in _dicts(item.get("points"))), default=0),
        "measured_aggregate": measured.get("task_aggregate"),
        "measured_auc": measured.get("mia_auc"),
        "outcome": str(item.get("outcome") or ""),
        "chosen": _is_pair(item, pair),
    }


def _last_rung(item: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A pair's measurements on the most examples that any of its merges met: others are not comparable with them."""
    points = _dicts(item.get("points"))
    most = max((point.get("examples") or 0 for point in points), default=0)
    return [point for point in points if (point.get("examples") or 0) == most]


def _control(item: Mapping[str, Any], *, data: RunData) -> dict[str, Any]:
    cheap = numbers(item.get("cheap"))
    model = next((model for model in data.models if model.get("name") == item.get("name")), None)
    return {
        "label": str(item.get("label") or item.get("name") or ""),
        "scale": item.get("scale"),
        "objective": item.get("objective"),
        "scores": [cheap.get(name) for name in ("task_aggregate", "mia_auc", "mmlu_average", "forgetting", "retention")],
        "final": numbers(model["scores"]).get("final_score") if model else None,
        "note": str(item.get("gate") or item.get("error") or ""),
    }


def _cost(search: Mapping[str, Any]) -> str | None:
    """What was measured, in a sentence."""
    cost = numbers(search.get("cost"))
    if not {"examples", "merges", "full"} <= cost.keys():
        return None
    text = f"{cost['merges']:,.0f} measurements without generation, of {cost['examples']:,.0f} examples; {cost['full']:,.0f} models in full"
    text += f" ({cost['rows_generated']:,.0f} rows generated)" if "rows_generated" in cost else ""
    if cost.get("exhaustive_examples") and cost["examples"]:
        text += f"; the same grid for every pair on the whole fold would be {cost['exhaustive_examples']:,.0f} examples"
    return text + "."


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
    """Membership AUC of the chosen pair's merges on the whole fold over their scale, a curve per density and share."""
    points = [point for item in _dicts(search.get("pairs")) if _is_pair(item, pair) for point in _last_rung(item)]
    curves: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        auc = numbers(point.get("cheap")).get("mia_auc")
        if auc is not None and is_number(point.get("scale")):
            curves.setdefault(_curve(point.get("density"), point.get("share")), []).append((point["scale"], auc))
    if not any(len(curve) > 1 for curve in curves.values()):
        return []
    weights = pair.get("weights") or []
    share = round(weights[0] / sum(weights), 2) if len(weights) == 2 and all(map(is_number, weights)) and sum(weights) else None
    chosen = next((at for at in curves.get(_curve(pair.get("density"), share), []) if at[0] == pair.get("scale")), None)
    ordered = {name: sorted(curve) for name, curve in sorted(curves.items())}
    return [{"name": "scale", "label": "scale of the merged update", "curves": ordered, "chosen": chosen}]


def _curve(density: Any, share: Any) -> str:
    words = [f"density {density:g}"] if is_number(density) else []
    words += [f"share {share:g}"] if is_number(share) and share != 0.5 else []
    return ", ".join(words) or "all"

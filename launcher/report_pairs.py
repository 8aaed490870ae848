"""Why this pair: the search's record (``pairs.json``) in the form that the page shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.report_data import RunData, is_number, numbers

MAX_PAIRS = 20
"""Pairs listed on the page; all are in ``plots/pairs.csv``."""
MAX_CONTESTANTS = 30


def pair_view(data: RunData) -> dict[str, Any]:
    """The pair, its rivals and the measurements that decided, all of the validation fold but for the controls' final scores.

    Returns:
        ``pair`` (over, under, method, density, scale, weights; empty without one), ``sentence`` and ``metric`` (text or None), ``rows``
        (a dictionary per candidate pair), ``shown`` (those that were measured, as many as a page holds), ``hidden`` (how many pairs are
        not among them), ``trace`` (the steps of the search: ``count``, ``title``, ``detail``), ``excluded`` (checkpoint and reason),
        ``controls`` (what a merge is compared with), ``contestants`` (what was measured in full, best first), ``cost`` (a sentence, or
        None) and ``knobs`` (``name``, ``label``, ``curves``, ``first_look``, ``chosen``) for the figures. Empty without pairs.json.
    """
    search = data.pairs
    pair = _chosen(data)
    rows = [_row(item, pair=pair) for item in _dicts(search.get("pairs"))]
    rows.sort(key=lambda row: (not row["chosen"], row["measured_aggregate"] is None, not row["num_points"]))
    shown = [row for row in rows if row["num_points"] or row["chosen"]][:MAX_PAIRS] or rows[:MAX_PAIRS]
    return {
        "pair": pair,
        "sentence": search.get("sentence"),
        "metric": search.get("metric"),
        "rows": rows,
        "shown": shown,
        "hidden": len(rows) - len(shown),
        "trace": _trace(search),
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


def _trace(search: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How many were considered at each step of the search, and what that took."""
    candidates, pairs = _dicts(search.get("candidates")), _dicts(search.get("pairs"))
    if not candidates and not pairs:
        return []
    excluded = sum(bool(item.get("excluded")) for item in candidates)
    steps = [
        {"count": len(candidates), "title": "checkpoints", "detail": f"{excluded} can be no parent" if excluded else "all can be parents"},
        {"count": len(pairs), "title": "candidate pairs", "detail": "one parent on each side of AUC 0.5; ranked by a prediction"},
    ]
    points = [(index, point) for index, pair in enumerate(pairs) for point in _dicts(pair.get("points"))]
    sizes = sorted({int(point["examples"]) for _, point in points if is_number(point.get("examples"))})
    if sizes:
        first = [(index, point) for index, point in points if point.get("examples") == sizes[0]]
        knobs: dict[int, set[Any]] = {}
        for index, point in first:
            knobs.setdefault(index, set()).add((point.get("density"), point.get("share")))
        calibrated = {index for index, found in knobs.items() if len(found) > 1}
        looked = [index for index, _ in first if index not in calibrated]
        detail = f"at least one merge of each on {sizes[0]} examples ({len(looked)} measurements of those that ended here)"
        steps.append({"count": len(knobs), "title": "a first look", "detail": detail})
        if calibrated:
            detail = f"density and shares varied, scale moved towards AUC 0.5 ({len(first) - len(looked)} measurements)"
            steps.append({"count": len(calibrated), "title": "calibrated", "detail": detail})
        for size in sizes[1:]:
            on_more = [index for index, point in points if point.get("examples") == size]
            detail = f"the best merges of them, on {size} examples ({len(on_more)} measurements)"
            steps.append(
                {"count": len(set(on_more)), "title": "halved and halved again" if size != sizes[1] else "halved", "detail": detail}
            )
    full = sum(any(entry.get("role") == "merge" for entry in _dicts(pair.get("full"))) for pair in pairs)
    if full:
        steps.append({"count": full, "title": "measured in full", "detail": "merged, every row generated, scored as the benchmark does"})
    return steps


def _knobs(search: Mapping[str, Any], *, pair: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Membership AUC of the chosen pair's merges over their scale and over their density."""
    points = [
        {**point, "auc": numbers(point.get("cheap"))["mia_auc"]}
        for item in _dicts(search.get("pairs"))
        if _is_pair(item, pair)
        for point in _dicts(item.get("points"))
        if "mia_auc" in numbers(point.get("cheap")) and is_number(point.get("scale"))
    ]
    most = max((point.get("examples") or 0 for point in points), default=0)
    whole = _curves([point for point in points if (point.get("examples") or 0) == most], x="scale", by=("density", "share"))
    early = _curves([point for point in points if (point.get("examples") or 0) != most], x="scale", by=("density", "share"))
    weights = pair.get("weights") or []
    share = round(weights[0] / sum(weights), 2) if len(weights) == 2 and all(map(is_number, weights)) and sum(weights) else None
    chosen = next((at for at in whole.get(_curve(pair.get("density"), share), []) if at[0] == pair.get("scale")), None)
    knobs = []
    if any(len(curve) > 1 for curve in (*whole.values(), *early.values())):
        label = "scale of the merged update"
        knobs.append({"name": "scale", "label": label, "curves": whole, "first_look": _longer(early), "chosen": chosen})
    # Densities are compared where all else is alike: the same scale, on the same examples.
    scales = [(point.get("examples") or 0, point["scale"]) for point in points]
    if scales:
        alike = max(dict.fromkeys(scales), key=lambda found: (scales.count(found), -found[0]))
        same = [point for point in points if ((point.get("examples") or 0), point["scale"]) == alike]
        curves = _longer(_curves(same, x="density", by=("share",)))
        if curves:
            label = f"density (scale {alike[1]:g}, {alike[0]} examples)"
            knobs.append({"name": "density", "label": label, "curves": curves, "first_look": {}, "chosen": None})
    return knobs


def _curves(points: list[dict[str, Any]], *, x: str, by: tuple[str, ...]) -> dict[str, list[tuple[float, float]]]:
    curves: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        if is_number(point.get(x)):
            name = _curve(point.get("density") if "density" in by else None, point.get("share"))
            curves.setdefault(name, []).append((point[x], point["auc"]))
    return {name: sorted(curve) for name, curve in sorted(curves.items())}


def _longer(curves: Mapping[str, list[tuple[float, float]]]) -> dict[str, list[tuple[float, float]]]:
    return {name: curve for name, curve in curves.items() if len({at for at, _ in curve}) > 1}


def _curve(density: Any, share: Any) -> str:
    words = [f"density {density:g}"] if is_number(density) else []
    words += [f"share {share:g}"] if is_number(share) and share != 0.5 else []
    return ", ".join(words) or ("equal shares" if share == 0.5 else "all")

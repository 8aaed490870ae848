"""What the forgetting/retention plot shows: trials, their earlier checkpoints, controls and the merge, all on one fold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from launcher.report_data import RunData, base_name, numbers, pair_names
from launcher.report_text import number
from launcher.tradeoff_plot import Point

MAX_CHECKPOINTS = 300
"""Earlier checkpoints beyond this are left out, those that no pair may contain first."""
UNFINISHED = ("failed", "stopped", "running", "pending")
_SHOWN = ("retention", "forgetting", "mia_auc", "task_aggregate", "final_score")
_WORDS = {"mia_auc": "AUC", "task_aggregate": "task aggregate", "final_score": "final"}


def plot_fold(data: RunData) -> str:
    """The fold that most can be drawn on: validation where the pair search has scored checkpoints there, else as the trials allow."""
    scored = [trial for trial in data.trials if trial["test"] or trial["validation"]]
    whole = all(_drawable(trial["test"]) for trial in scored)
    if any(_drawable(trial["validation"]) for trial in scored) and (_candidates(data) or not whole):
        return "validation"
    if scored and whole:
        return "test"
    return data.fold


def tradeoff_points(data: RunData) -> list[Point]:
    """Every model that has both scores on the plot's fold."""
    fold = plot_fold(data)
    pair = set(pair_names(data).values())
    states = {trial["name"]: trial["status"] for trial in data.trials}
    points = []
    for trial in data.trials:
        if _drawable(trial[fold]):
            kind = "parent" if trial["name"] in pair else "trial"
            verdict = str(trial.get("verdict") or trial["status"])
            hollow = trial["status"] in UNFINISHED
            points.append(_point(trial["name"], trial[fold], kind=kind, verdict=verdict, fold=fold, hollow=hollow, test=trial["test"]))
    known = {point.name for point in points}
    if fold == "validation":
        points += _checkpoints(data, known=known, pair=pair, states=states)
    known = {point.name for point in points}
    for model in data.models:
        role = str(model.get("role"))
        scores, estimated = _model_scores(data, model, fold=fold)
        if role not in ("baseline", "control", "merged") or model["name"] in known or not _drawable(scores):
            continue
        name = "before" if role == "baseline" else str(model["name"])
        words: dict[str, Any] = {
            "label": str(model.get("label") or ""),
            "verdict": str(model.get("verdict") or ""),
            "fold": fold,
            "test": model["scores"] if data.fold == "test" else {},
        }
        points.append(_point(name, scores, kind=role, estimated=estimated, **words))
    if fold == "validation" and not any(point.kind == "merged" for point in points):
        best = data.pairs.get("best_merge")
        scores = numbers(best.get("scores")) if isinstance(best, Mapping) else {}
        if _drawable(scores):
            points.append(_point("merge", scores, kind="merged", verdict="", fold=fold))
    delivered = data.delivered["name"] if data.delivered else None
    return [replace(point, delivered=True, hover=_delivered(point)) if point.name == delivered else point for point in points]


def _delivered(point: Point) -> str:
    first, _, rest = point.hover.partition("\n")
    return f"{first}, delivered\n{rest}"


def undrawn_trials(data: RunData, points: Iterable[Point]) -> list[str]:
    """Trials without scores, each with its state."""
    drawn = {point.name for point in points}
    return [f"{trial['name']} ({trial['status']})" for trial in data.trials if trial["name"] not in drawn]


def left_out(data: RunData) -> int:
    """How many scored checkpoints are too many to be drawn."""
    earlier = [item for item in _candidates(data) if "@" in str(item.get("name"))]
    return max(0, len(earlier) - MAX_CHECKPOINTS) if plot_fold(data) == "validation" else 0


def _candidates(data: RunData) -> list[dict[str, Any]]:
    found = data.pairs.get("candidates")
    return [item for item in found if isinstance(item, dict) and _drawable(numbers(item.get("scores")))] if isinstance(found, list) else []


def _drawable(scores: Mapping[str, float]) -> bool:
    return "forgetting" in scores and "retention" in scores


def _checkpoints(data: RunData, *, known: set[str], pair: set[str], states: Mapping[str, str]) -> list[Point]:
    full = _contestants(data)
    earlier = [item for item in _candidates(data) if str(item.get("name")) not in known]
    earlier.sort(key=lambda item: (str(item["name"]) not in pair, bool(item.get("excluded"))))
    points = []
    for item in earlier[:MAX_CHECKPOINTS]:
        name = str(item["name"])
        trial, step = base_name(name)
        # An earlier checkpoint is measured without generation; one that came into the last round also with it.
        scores, estimated = (full[name], False) if name in full else (numbers(item["scores"]), not item.get("complete"))
        words: dict[str, Any] = {
            "kind": "parent" if name in pair else "checkpoint",
            "verdict": str(item.get("verdict") or ""),
            "fold": "validation",
        }
        hollow = states.get(trial) in ("failed", "stopped")
        points.append(_point(name, scores, estimated=estimated, hollow=hollow, trial=trial, step=step, **words))
    return sorted(points, key=lambda point: (point.trial, point.step or 0))


def _contestants(data: RunData) -> dict[str, dict[str, float]]:
    """Models that the pair search measured in full on the validation fold, by name."""
    found = data.pairs.get("contestants")
    rows = [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []
    return {str(item.get("name")): numbers(item.get("scores")) for item in rows if _drawable(numbers(item.get("scores")))}


def _model_scores(data: RunData, model: Mapping[str, Any], *, fold: str) -> tuple[dict[str, float], bool]:
    """Scores of a model on a fold, and whether they are estimates made without generation."""
    own = model["scores"] if fold == data.fold else model["validation"]
    if _drawable(own) or fold != "validation":
        return own, False
    best, name = data.pairs.get("best_merge"), str(model["name"])
    if model.get("role") == "merged" and isinstance(best, Mapping) and _drawable(numbers(best.get("scores"))):
        return numbers(best["scores"]), False
    full = _contestants(data)
    if name in full:
        return full[name], False
    controls = data.pairs.get("controls")
    rows = [item for item in controls if isinstance(item, dict)] if isinstance(controls, list) else []
    return next((numbers(item.get("cheap")) for item in rows if item.get("name") == name), {}), True


def _point(
    name: str,
    scores: Mapping[str, float],
    *,
    kind: str,
    verdict: str,
    fold: str,
    hollow: bool = False,
    estimated: bool = False,
    label: str = "",
    test: Mapping[str, float] | None = None,
    trial: str = "",
    step: int | None = None,
) -> Point:
    head = f"{name}{f' ({verdict})' if verdict else ''}{f', {label}' if label not in ('', name) else ''}"
    hover = f"{head}\n{fold}{', estimated without generation' if estimated else ''}: {_numbers(scores)}"
    if test and fold != "test" and _drawable(test):
        hover += f"\ntest: {_numbers(test)}"
    return Point(
        name=name,
        retention=scores["retention"],
        forgetting=scores["forgetting"],
        kind=kind,
        verdict=verdict,
        hollow=hollow,
        hover=hover,
        trial=trial or base_name(name)[0],
        step=step,
        auc=scores.get("mia_auc"),
        estimated=estimated,
        short={"ties": "TIES merge", "linear": "linear mean", "unanimous": "sign-unanimous mean"}.get(name, ""),
    )


def _numbers(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{_WORDS.get(key, key)} {number(scores[key])}" for key in _SHOWN if key in scores)

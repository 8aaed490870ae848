"""One self-contained page about a run, its table of trials as CSV and its figures, all from the run's files."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from launcher.console import duration, setting, short
from launcher.masking import redact
from launcher.plots import Plot, Point, curves_plot, merge_curve_plot, tradeoff_plot
from launcher.report_data import (
    FOLD_FILES,
    RunData,
    flatten,
    is_number,
    last_log_lines,
    numbers,
    pareto_names,
    plot_fold,
    read_metrics,
    read_run,
)
from launcher.report_pairs import pair_view
from launcher.report_rows import side_by_side
from launcher.report_verdicts import verdict_view
from trainers.files import write_text

LEADERBOARD_URL = "https://llmunlearningsemeval2025.github.io/"
# Places 1 to 3 of the 7B table of SemEval-2025 Task 4: task aggregate, MIA score, MMLU, final.
LEADERBOARD = (
    {"name": "AILS-NTUA", "task_aggregate": 0.827, "mia_score": 0.847, "mmlu_average": 0.443, "final_score": 0.706},
    {"name": "ZJUKLAB", "task_aggregate": 0.944, "mia_score": 0.048, "mmlu_average": 0.471, "final_score": 0.487},
    {"name": "YNU", "task_aggregate": 0.834, "mia_score": 0.139, "mmlu_average": 0.436, "final_score": 0.470},
)
SCORE_COLUMNS = (
    ("task_aggregate", "task aggregate", "↑"),
    ("mia_auc", "membership AUC", "→ 0.5"),
    ("mia_score", "MIA score", "↑"),
    ("mmlu_average", "MMLU", "↑"),
    ("final_score", "final", "↑"),
    ("forget_regurgitation", "forget regurgitation", "↓"),
    ("forget_knowledge", "forget knowledge", "↓"),
    ("retain_regurgitation", "retain regurgitation", "↑"),
    ("retain_knowledge", "retain knowledge", "↑"),
)
TRIAL_SCORES = ("forgetting", "retention", "mia_auc", "task_aggregate", "final_score")
MAX_CURVES = 6


def build_report(run: Path, *, mask: bool = True) -> Path:
    """Write ``RUN/report.html``, ``RUN/trials.csv`` and ``RUN/plots/``, and return the page's path.

    Works during a sweep and on incomplete runs: what is missing is named on the page.

    Args:
        run: the run folder.
        mask: hide personal data in the generations that are shown.

    Raises:
        InputError: if ``run`` is not a run folder.
    """
    data = read_run(Path(run))
    plots = _plots(data)
    for plot in plots.values():
        plot.save(data.run / "plots")
    write_text(data.run / "trials.csv", trials_csv(data))
    page = data.run / "report.html"
    write_text(page, render(data, plots=plots, mask=mask))
    return page


def render(data: RunData, *, plots: Mapping[str, Plot], mask: bool = True) -> str:
    """The page as text; every value from the run is escaped."""
    import markupsafe

    css = (resources.files("launcher") / "assets" / "report.css").read_text(encoding="utf-8")
    context = {
        "css": markupsafe.Markup(css),
        "name": data.name,
        "finished": bool(data.results.get("run_finished")),
        "fold": str(data.results.get("fold") or "test"),
        "sentence": verdict_sentence(data),
        "missing": data.missing,
        "warnings": [str(text) for text in data.results.get("warnings") or []],
        "tiles": _tiles(data),
        "plots": {name: plot.inline for name, plot in plots.items()},
        "plot_fold": plot_fold(data),
        "undrawn": _undrawn(data),
        "columns": SCORE_COLUMNS,
        "models": [_model_row(model) for model in data.models if model["scores"]],
        "leaderboard": LEADERBOARD,
        "leaderboard_url": LEADERBOARD_URL,
        "verdicts": verdict_view(data),
        "heat": _heat(data),
        "pair": pair_view(data),
        "trials": [_trial_row(data, trial) for trial in data.trials],
        "trial_scores": TRIAL_SCORES,
        "examples": side_by_side(data, mask=mask),
        "masked": mask,
        "provenance": _provenance(data),
    }
    return template("report.html.j2", autoescape=True).render(**context)


def template(name: str, *, autoescape: bool) -> Any:
    """A Jinja template of ``launcher/assets``, with the filters that the templates use."""
    import jinja2

    environment = jinja2.Environment(autoescape=autoescape, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        number=number, duration=lambda value: duration(value) if is_number(value) else "–", setting=setting, short=short
    )
    text = (resources.files("launcher") / "assets" / name).read_text(encoding="utf-8")
    return environment.from_string(text)


def number(value: Any, *, signed: bool = False) -> str:
    """A score with three decimals, or ``–`` where there is none."""
    if not is_number(value):
        return "–"
    return f"{value:+.3f}" if signed else f"{value:.3f}"


def verdict_sentence(data: RunData) -> str:
    """The run's verdict, or how far it has come."""
    sentence = (data.results.get("verdict") or {}).get("sentence")
    if sentence:
        return str(sentence)
    counts = trial_counts(data)
    if not counts:
        return "No trial has begun yet: there is no verdict."
    parts = ", ".join(f"{count} {state}" for state, count in counts.items())
    return f"No verdict yet: the run is not complete ({sum(counts.values())} trials: {parts})."


def trial_counts(data: RunData) -> dict[str, int]:
    """State to number of trials."""
    counts: dict[str, int] = {}
    for trial in data.trials:
        counts[trial["status"]] = counts.get(trial["status"], 0) + 1
    return counts


def trials_csv(data: RunData) -> str:
    """One line per trial: state, settings, and the scores of both folds (empty where there is none)."""
    settings = sorted({key for trial in data.trials for key in trial["overrides"]})
    scores = {fold: sorted({key for trial in data.trials for key in trial[fold]}) for fold in FOLD_FILES}
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = ["name", "status", "verdict", "seconds", *settings]
    writer.writerow([*head, *(f"{fold}.{key}" for fold in FOLD_FILES for key in scores[fold]), "error", "checkpoint"])
    for trial in data.trials:
        row = [trial["name"], trial["status"], trial.get("verdict"), trial.get("seconds")]
        row += [trial["overrides"].get(key) for key in settings]
        row += [trial[fold].get(key) for fold in FOLD_FILES for key in scores[fold]]
        writer.writerow(["" if value is None else value for value in [*row, trial.get("error"), trial.get("checkpoint")]])
    return out.getvalue()


def _plots(data: RunData) -> dict[str, Plot]:
    points = _points(data)
    plots: list[Plot | None] = []
    if points:
        # A trial that was cut short or broke the model is no trade-off anybody would take.
        sound = [point for point in points if point.kind in ("trial", "parent") and not point.hollow and point.verdict != "dead"]
        candidates = [(point.name, point.retention, point.forgetting) for point in sound]
        plots.append(tradeoff_plot(points, front=pareto_names(candidates), fold=plot_fold(data)))
    plots.append(curves_plot({label: read_metrics(data.run, trial=name) for name, label in _curve_trials(data).items()}))
    view = pair_view(data)
    plots += [
        merge_curve_plot(knob["curves"], x_label=knob["label"], name=f"merge_{knob['name']}", chosen=knob["chosen"])
        for knob in view["knobs"]
    ]
    return {plot.name: plot for plot in plots if plot is not None}


def _points(data: RunData) -> list[Point]:
    fold = plot_fold(data)
    parents = {model["name"] for model in data.models if str(model.get("role")).startswith("parent")} | _pair_names(data)
    points = []
    for trial in data.trials:
        scores = trial[fold]
        if "forgetting" in scores and "retention" in scores:
            kind = "parent" if trial["name"] in parents else "trial"
            hollow = trial["status"] in ("failed", "stopped", "running")
            points.append(_point(trial["name"], scores, kind=kind, verdict=str(trial.get("verdict") or trial["status"]), hollow=hollow))
    kinds = {"baseline": "baseline", "control": "control", "merged": "merged"}
    for model in data.models:
        scores = model["scores"] if fold == str(data.results.get("fold") or "test") else model["validation"]
        if model.get("role") in kinds and "forgetting" in scores and "retention" in scores:
            name = "before" if model["role"] == "baseline" else str(model["name"])
            points.append(_point(name, scores, kind=kinds[model["role"]], verdict=str(model.get("verdict") or ""), hollow=False))
    return points


def _point(name: str, scores: Mapping[str, float], *, kind: str, verdict: str, hollow: bool) -> Point:
    parts = [f"retention {number(scores['retention'])}", f"forgetting {number(scores['forgetting'])}"]
    parts += [f"membership AUC {number(scores['mia_auc'])}"] if "mia_auc" in scores else []
    parts += [f"final {number(scores['final_score'])}"] if "final_score" in scores else []
    hover = f"{name}{f' ({verdict})' if verdict else ''}: {', '.join(parts)}"
    return Point(
        name=name,
        retention=scores["retention"],
        forgetting=scores["forgetting"],
        kind=kind,
        verdict=verdict,
        hollow=hollow,
        hover=hover,
    )


def _pair_names(data: RunData) -> set[str]:
    pair = data.results.get("pair") or {}
    return {str(pair[key]) for key in ("over", "under") if pair.get(key)}


def _curve_trials(data: RunData) -> dict[str, str]:
    pair = data.results.get("pair") or {}
    if pair.get("over") and pair.get("under"):
        return {
            str(pair["over"]): f"{pair['over']} (over-forgetting parent)",
            str(pair["under"]): f"{pair['under']} (under-forgetting parent)",
        }
    return {trial["name"]: trial["name"] for trial in data.trials if trial["status"] in ("finished", "running", "stopped")[:MAX_CURVES]}


def _undrawn(data: RunData) -> list[str]:
    drawn = {point.name for point in _points(data)}
    return [f"{trial['name']} ({trial['status']})" for trial in data.trials if trial["name"] not in drawn]


def _tiles(data: RunData) -> list[dict[str, str]]:
    """The four numbers a reader asks for first: before, and in the delivered model."""
    before = data.model("baseline")
    winner = (data.results.get("verdict") or {}).get("winner")
    after = next((model for model in data.models if model["name"] == winner), None) or data.model("merged")
    if before is None or after is None:
        return []
    words = {
        "forgetting": ("Forgotten", "share of the forget set that can no longer be reproduced; 1 is best"),
        "retention": ("Kept", "share of the retain set that is still reproduced; 1 is best"),
        "mia_auc": ("Membership AUC", "can an attacker tell that the texts were trained on? 0.5 is best"),
        "final_score": ("Final score", "mean of task aggregate, MIA score and MMLU; 1 is best"),
        "task_aggregate": ("Task aggregate", "harmonic mean of the twelve terms; 1 is best"),
    }
    if "final_score" in after["scores"]:
        words.pop("task_aggregate")
    else:
        words.pop("final_score")
    tiles = []
    for key, (title, meaning) in words.items():
        interval = after["intervals"].get(key) if isinstance(after["intervals"], Mapping) else None
        values = {"before": number(before["scores"].get(key)), "after": number(after["scores"].get(key)), "interval": _interval(interval)}
        tiles.append({"title": title, "meaning": meaning, "model": str(after["name"]), **values})
    return tiles


def _interval(pair: Any) -> str:
    if isinstance(pair, Sequence) and len(pair) == 2 and all(is_number(bound) for bound in pair):
        return f"[{number(pair[0])}, {number(pair[1])}]"
    return ""


def _model_row(model: Mapping[str, Any]) -> dict[str, Any]:
    differences = []
    for key, title, _ in SCORE_COLUMNS:
        value = (model.get("difference_to_best_parent") or {}).get(key)
        if isinstance(value, Mapping) and is_number(value.get("difference")):
            bounds = numbers({"low": value.get("low"), "high": value.get("high")})
            low, high = bounds.get("low"), bounds.get("high")
            interval = f"[{number(low, signed=True)}, {number(high, signed=True)}]" if low is not None and high is not None else ""
            clear = low is not None and high is not None and (low > 0 or high < 0)
            differences.append({"title": title, "value": number(value["difference"], signed=True), "interval": interval, "clear": clear})
    cells = [
        {"key": key, "value": number(model["scores"].get(key)), "interval": _interval((model["intervals"] or {}).get(key))}
        for key, _, _ in SCORE_COLUMNS
    ]
    keys = {key: model.get(key) for key in ("name", "label", "role", "verdict")}
    return {**keys, "cells": cells, "differences": differences}


def _heat(data: RunData) -> dict[str, Any]:
    """The twelve terms of the untouched target, both parents and the merge; each column's weakest is marked."""
    roles = ("baseline", "parent_over", "parent_under", "merged")
    shown = [model for role in roles for model in data.models if model.get("role") == role and model["terms"]]
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
        column = {"name": model["name"], "label": model.get("label"), "values": values, "lowest": lowest, "weakest": weakest}
        columns.append({**column, "aggregate": model["scores"].get("task_aggregate"), "ties": present.count(lowest)})
    return {"names": names, "columns": columns, "shade": shade}


def shade(value: Any) -> str:
    """A background for a value between 0 and 1: vermillion below one half, blue above, none at one half."""
    if not is_number(value):
        return "transparent"
    strength = min(1.0, abs(value - 0.5) * 2) * 0.6
    return f"rgba({'213,94,0' if value < 0.5 else '0,114,178'},{strength:.2f})"


def _trial_row(data: RunData, trial: Mapping[str, Any]) -> dict[str, Any]:
    pair = data.results.get("pair") or {}
    part = next(
        (
            word
            for key, word in (("over", "over-forgetting parent"), ("under", "under-forgetting parent"))
            if pair.get(key) == trial["name"]
        ),
        None,
    )
    keys = {key: trial.get(key) for key in ("name", "status", "verdict", "seconds", "error", "step", "num_steps", "checkpoint")}
    log = last_log_lines(data.run, trial=trial["name"]) if trial["status"] == "failed" else []
    scores = {fold: [number(trial[fold].get(key)) for key in TRIAL_SCORES] for fold in FOLD_FILES}
    return {**keys, **scores, "parent": part, "overrides": trial["overrides"], "log": log}


def command_text(data: RunData) -> str | None:
    """The command that produced the run, or None if it was not recorded."""
    command = data.provenance.get("command")
    if isinstance(command, (list, tuple)):
        import shlex

        return shlex.join(str(part) for part in command)
    return str(command) if command else None


def _provenance(data: RunData) -> dict[str, Any]:
    import yaml

    facts = {key: value for key, value in flatten(redact(data.provenance)).items() if key != "command"}
    memorised = flatten(data.target.get("memorised") or {}) if isinstance(data.target.get("memorised"), Mapping) else {}
    target = {key: value for key, value in flatten(redact(data.target)).items() if not key.startswith("memorised.")}
    timings = {str(key): value for key, value in (data.results.get("timings") or {}).items() if is_number(value)}
    reported = [model for model in data.models if model.get("deviations") or model.get("notes")]
    remarks = list(dict.fromkeys(text for model in reported for text in [*model["deviations"], *model["notes"]]))
    counts: dict[str, Any] = next((model["counts"] for model in data.models if model.get("counts")), {})
    experiment = yaml.safe_dump(redact(data.experiment), sort_keys=False, allow_unicode=True) if data.experiment else ""
    return {
        "facts": facts,
        "target": target,
        "memorised": {key: number(value) for key, value in memorised.items()},
        "timings": timings,
        "remarks": remarks,
        "counts": counts,
        "experiment": experiment[:20000],
        "command": command_text(data),
    }

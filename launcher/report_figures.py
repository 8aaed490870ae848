"""The figures of a report, from a run's data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from launcher.audit_plot import audit_panels, audit_plot
from launcher.curve_plots import curves_plot, merge_curve_plot
from launcher.plots import Plot
from launcher.report_audit import audit_of
from launcher.report_data import RunData, base_name, pair_names, pareto_names, read_metrics
from launcher.report_pairs import pair_view
from launcher.report_points import plot_fold, tradeoff_points
from launcher.report_scores import heat_view
from launcher.terms_plot import terms_plot
from launcher.tradeoff_plot import Point, tradeoff_plot

MAX_CURVES = 6
FILES_ONLY = ("terms", "audit")
"""Figures that the page shows in another form, as a table or in parts."""
PAGE_ONLY = frozenset({"audit_forget_regurgitation", "audit_forget_knowledge", "audit_forget_answer_log_prob", "audit_membership"})
"""Parts of the audit's figure: the page shows them one below the other where it is narrow."""


def report_figures(data: RunData, *, files: bool = True) -> dict[str, Plot]:
    """Every figure that the run has data for, by name.

    Args:
        data: the run.
        files: also those that are files beside the page only.
    """
    plots: list[Plot | None] = []
    points = tradeoff_points(data)
    if points:
        plots.append(tradeoff_plot(points, front=front_names(points), fold=plot_fold(data)))
    curves, steps = curve_rows(data)
    plots.append(curves_plot(curves, steps=steps))
    for knob in pair_view(data)["knobs"]:
        words = {"x_label": knob["label"], "chosen": knob["chosen"], "first_look": knob["first_look"]}
        plots.append(merge_curve_plot(knob["curves"], name=f"merge_{knob['name']}", **words))
    audit = audit_of(data)
    if audit is not None:
        plots += audit_panels(audit)
    if files:
        heat = heat_view(data)
        plots.append(terms_plot(heat["names"], heat["columns"]))
        plots.append(audit_plot(audit) if audit is not None else None)
    return {plot.name: plot for plot in plots if plot is not None}


def front_names(points: Sequence[Point]) -> list[str]:
    """The Pareto front of trials and checkpoints; one that was cut short or broke the model is no trade-off anybody would take."""
    sound = [point for point in points if point.kind in ("trial", "parent", "checkpoint") and not point.hollow and point.verdict != "dead"]
    return pareto_names([(point.name, point.retention, point.forgetting) for point in sound])


def curve_rows(data: RunData) -> tuple[dict[str, list[dict[str, Any]]], dict[str, int]]:
    """Label to training curve, of the parents if there are any, else of the first trials; and label to the step of a parent."""
    pair = pair_names(data)
    if not pair:
        begun = [trial["name"] for trial in data.trials if trial["status"] in ("finished", "running", "stopped", "failed")]
        # What runs comes first: it is what one looks for while a sweep is running.
        states = {trial["name"]: trial["status"] for trial in data.trials}
        begun.sort(key=lambda name: states[name] != "running")
        return {name: read_metrics(data.run, trial=name) for name in sorted(begun[:MAX_CURVES])}, {}
    sides: dict[str, list[tuple[str, int | None]]] = {}
    for side, name in pair.items():
        trial, step = base_name(name)
        sides.setdefault(trial, []).append((side, step))
    curves, steps = {}, {}
    for trial, found in sides.items():
        label = f"{trial} ({' and '.join(side for side, _ in found)}-forgetting parent)"
        curves[label] = read_metrics(data.run, trial=trial)
        known = [step for _, step in found if step is not None]
        if known:
            steps[label] = known[0]
    return curves, steps


def figure_rows(data: RunData) -> dict[str, list[Mapping[str, Any]]]:
    """The numbers behind each figure, one row per mark; those of the terms and of an audit are tables of the page."""
    from launcher.curve_plots import PANELS, series

    points = tradeoff_points(data)
    front = set(front_names(points))
    rows: dict[str, list[Mapping[str, Any]]] = {
        "tradeoff": [
            {
                "name": point.name,
                "kind": point.kind,
                "verdict": point.verdict,
                "fold": plot_fold(data),
                "retention": point.retention,
                "forgetting": point.forgetting,
                "mia_auc": point.auc,
                "estimated": point.estimated,
                "hollow": point.hollow,
                "on_front": point.name in front,
                "delivered": point.delivered,
            }
            for point in points
        ]
    }
    curves, _ = curve_rows(data)
    rows["curves"] = [
        {"trial": label, "quantity": ".".join(path), "step": step, "value": value}
        for label, metrics in curves.items()
        for _, path, _ in PANELS
        for step, value in series(metrics, path=path)
    ]
    for knob in pair_view(data)["knobs"]:
        rows[f"merge_{knob['name']}"] = [
            {"merge": label, "all_examples": whole, knob["name"]: at, "mia_auc": auc, "chosen": (at, auc) == knob["chosen"]}
            for whole, curves in ((True, knob["curves"]), (False, knob["first_look"]))
            for label, curve in curves.items()
            for at, auc in curve
        ]
    return {name: found for name, found in rows.items() if found}

"""Figures with curves: training over optimizer steps, and merges over what the pair search varies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from launcher.plots import (
    BLUE,
    GREEN,
    GREY,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    Plot,
    clipped,
    finish_plot,
    legend_below,
    new_figure,
)

MAX_CURVE_POINTS = 300
PANELS: tuple[tuple[str, tuple[str, ...], tuple[float, float] | None], ...] = (
    ("loss", ("loss",), None),
    ("forget token accuracy ↓", ("signals", "forget_token_accuracy"), (-0.04, 1.04)),
    ("retain token accuracy ↑", ("signals", "retain_token_accuracy"), (-0.04, 1.04)),
    ("membership AUC → 0.5", ("signals", "mia_auc"), (-0.04, 1.04)),
)
_LOOKS = ((VERMILLION, "-", "o"), (BLUE, "--", "s"), (GREEN, "-.", "^"), (PURPLE, ":", "D"), (ORANGE, "-", "v"), (SKY, "--", "P"))


def curves_plot(curves: Mapping[str, Sequence[Mapping[str, Any]]], *, steps: Mapping[str, int] | None = None) -> Plot | None:
    """Training curves of a few trials: loss, token accuracy on both sets and the attack's AUC over optimizer steps.

    Args:
        curves: trial label to the rows of its ``metrics.jsonl``.
        steps: trial label to the step of the checkpoint that was used, where that is not the last one.

    Returns:
        The plot, or None where no row holds a number.
    """
    found = {(title, name): series(rows, path=path) for title, path, _ in PANELS for name, rows in curves.items()}
    shown = [panel for panel in PANELS if any(points for (title, _), points in found.items() if title == panel[0])]
    if not shown:
        return None
    rows = (len(shown) + 1) // 2
    figure, grid = new_figure(width=4.9, height=1.95 * rows + 0.5, rows=rows, columns=2 if len(shown) > 1 else 1)
    for axes, (title, _, limits) in zip(grid, shown, strict=False):
        for index, name in enumerate(curves):
            points = found[title, name]
            if not points:
                continue
            colour, style, marker = _LOOKS[index % len(_LOOKS)]
            mark = marker if len(points) <= 12 else None
            axes.plot(
                *zip(*points, strict=True),
                color=colour,
                linestyle=style,
                linewidth=1.5,
                marker=mark,
                markersize=4,
                label=clipped(name, width=60),
            )
            if steps and name in steps:
                axes.axvline(steps[name], color=colour, linewidth=1.0, linestyle=(0, (1, 2)), zorder=1)
        if title.startswith("membership"):
            axes.axhline(0.5, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)))
        if limits:
            axes.set_ylim(*limits)
        axes.set_title(title, fontsize=9.5, color=INK, loc="left")
        axes.set_xlabel("optimizer step", fontsize=9)
    for axes in grid[len(shown) :]:
        axes.set_visible(False)
    legend_below(figure, grid[: len(shown)], columns=1 if max(map(len, curves)) > 22 else 2)
    return finish_plot("curves", figure, title="Training curves")


def series(rows: Sequence[Mapping[str, Any]], *, path: tuple[str, ...]) -> list[tuple[float, float]]:
    """(step, value) of one quantity, thinned to what a figure can show; the last one is kept."""
    points = []
    for row in rows:
        value: Any = row
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            points.append((float(row["step"]), float(value)))
    stride = -(-len(points) // MAX_CURVE_POINTS) or 1
    thinned = points[::stride]
    return thinned if not points or thinned[-1] == points[-1] else [*thinned, points[-1]]


def merge_curve_plot(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_label: str,
    name: str = "merge_search",
    chosen: tuple[float, float] | None = None,
    first_look: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> Plot | None:
    """The attack's AUC of measured merges over one knob, with the line 0.5 it should meet.

    Args:
        curves: label to (knob value, AUC) points.
        x_label: the knob's name.
        name: of the files.
        chosen: the point of the merge that was written.
        first_look: the same of merges that were measured on fewer examples: drawn thin, because they are not comparable.
    """
    thin = {label: sorted(points) for label, points in (first_look or {}).items() if points}
    thick = {label: sorted(points) for label, points in curves.items() if points}
    if not thin and not thick:
        return None
    figure, (axes,) = new_figure(width=4.4, height=3.5)
    colours = [BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY]
    for index, points in enumerate(thin.values()):
        label = "others, first look on fewer examples" if index == 0 else None
        style = {"marker": ".", "markersize": 4, "linewidth": 0.8, "linestyle": (0, (3, 2)), "color": GREY}
        axes.plot(*zip(*points, strict=True), label=label, zorder=2, **style)
    for index, (label, points) in enumerate(thick.items()):
        style = {"marker": "os^vDP"[index % 6], "markersize": 5, "linewidth": 1.5, "color": colours[index % len(colours)]}
        axes.plot(*zip(*points, strict=True), label=label, zorder=3, **style)
    axes.axhline(0.5, color=INK, linewidth=1.0, linestyle=(0, (4, 3)), label="0.5: an attacker can only guess")
    values = [y for points in (*thin.values(), *thick.values()) for _, y in points]
    axes.set_ylim(max(-0.04, min(0.4, *values) - 0.06), min(1.04, max(0.6, *values) + 0.06))
    if chosen is not None:
        style = {"marker": "*", "markersize": 16, "color": ORANGE, "markeredgecolor": INK, "markeredgewidth": 0.8, "linestyle": ""}
        axes.plot(*chosen, label="best merge", zorder=5, **style)
    axes.set_xlabel(x_label)
    axes.set_ylabel("membership AUC")
    legend_below(figure, [axes], columns=1)
    return finish_plot(name, figure, title=f"Membership AUC of the measured merges over {x_label}")

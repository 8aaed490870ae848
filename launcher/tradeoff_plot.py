"""The figure of a sweep: every model by what it kept and what it lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher.plots import BLUE, GREEN, GREY, INK, MUTED, ORANGE, PURPLE, SKY, SOFT, VERMILLION, Plot, clipped, finish_plot, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VERDICT_STYLES = {
    "over-forgetting": (VERMILLION, "^"),
    "under-forgetting": (BLUE, "v"),
    "balanced": (GREEN, "o"),
    "untouched": (PURPLE, "s"),
    "dead": (GREY, "X"),
}
_OTHER_STYLE = (GREY, "o")
_FEW = 10
"""Trials that are few enough to be named and to have their paths drawn."""

_MANY = 40
"""Trials from which on marks are drawn smaller."""
_CROWDED = 20.0
"""A trial whose name would cover a mark or another name goes without: pointing at it tells the name."""


@dataclass(frozen=True)
class Point:
    """One model in the plot.

    Args:
        name: shown beside special points and on hovering.
        retention: mean retain score, 0 to 1.
        forgetting: 1 - mean forget score, 0 to 1.
        kind: ``trial``, ``checkpoint`` (an earlier one of a trial), ``parent``, ``baseline``, ``control`` or ``merged``.
        verdict: one of the verdict words; it sets colour and marker of a trial.
        hollow: stopped early or failed: not filled.
        hover: text shown on hovering.
        trial: the trial that a checkpoint belongs to.
        step: the step of an earlier checkpoint.
        auc: membership AUC.
        estimated: whether the scores were measured without generation.
        delivered: whether this model was handed out.
        short: stands beside it in place of its name.
    """

    name: str
    retention: float
    forgetting: float
    kind: str = "trial"
    verdict: str = ""
    hollow: bool = False
    hover: str = ""
    trial: str = ""
    step: int | None = None
    auc: float | None = None
    estimated: bool = False
    delivered: bool = False
    short: str = ""

    @property
    def label(self) -> str:
        """What stands beside it."""
        if self.delivered:
            return "delivered" if self.kind == "control" else f"{self.short or self.name} (delivered)"
        return self.short or self.name


def tradeoff_plot(points: Sequence[Point], *, front: Sequence[str] = (), fold: str = "test") -> Plot:
    """Retention (x) against forgetting (y); lines join the parents to the merge.

    Args:
        points: what to draw.
        front: names of the points on the Pareto front, by rising retention.
        fold: named on the axes.
    """
    figure, (axes,) = new_figure(width=4.6, height=4.3)
    place = {point.name: point for point in points}
    hover: dict[str, str] = {}
    line = [place[name] for name in front if name in place]
    if len(line) > 1:
        xs, ys = [point.retention for point in line], [point.forgetting for point in line]
        axes.plot(xs, ys, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), zorder=5, gid="front")
    _draw_paths(axes, points)
    merged = [point for point in points if point.kind == "merged"]
    for parent in (point for point in points if point.kind == "parent"):
        for target in merged:
            axes.plot([parent.retention, target.retention], [parent.forgetting, target.forgetting], color=INK, linewidth=1.1, zorder=2)
    for index, point in enumerate(points):
        gid = f"point-{index}"
        hover[gid] = point.hover or point.name
        _draw_point(axes, point, gid=gid, crowded=sum(other.kind == "trial" for other in points) > _MANY)
    _limits(axes, points)
    axes.set_xlabel(f"retention: kept of what should stay ({fold})")
    axes.set_ylabel(f"forgetting: gone of what should go ({fold})")
    axes.text(1.0, 1.015, "better ↗", transform=axes.transAxes, ha="right", va="bottom", color=MUTED, fontsize=9)
    lines = [(line[i], line[i + 1]) for i in range(len(line) - 1)]
    lines += [(parent, target) for parent in points if parent.kind == "parent" for target in merged]
    _label_points(figure, axes, points, lines=lines)
    return finish_plot("tradeoff", figure, title="Retention against forgetting", hover=hover)


def _draw_paths(axes: Axes, points: Sequence[Point]) -> None:
    """A faint line through the checkpoints of each trial, in the order in which they were made."""
    paths: dict[str, list[Point]] = {}
    for point in points:
        if point.trial and point.kind in ("trial", "checkpoint", "parent"):
            paths.setdefault(point.trial, []).append(point)
    if len(paths) > _FEW:
        return
    for path in paths.values():
        # A trial's own point is its last checkpoint.
        ordered = sorted(path, key=lambda point: (point.step is None, point.step or 0))
        if len(ordered) > 1:
            axes.plot([point.retention for point in ordered], [point.forgetting for point in ordered], color=SOFT, linewidth=0.9, zorder=1)


def _draw_point(axes: Axes, point: Point, *, gid: str, crowded: bool) -> None:
    special = {"merged": ("*", 19, ORANGE, 6), "baseline": ("s", 9, PURPLE, 5), "control": ("D", 8, SKY, 4)}
    x, y = point.retention, point.forgetting
    if point.delivered:
        axes.plot(x, y, marker="o", markersize=21, color="none", markeredgecolor=ORANGE, markeredgewidth=1.8, linestyle="", zorder=3)
    if point.kind in special:
        marker, size, colour, order = special[point.kind]
        edge: dict[str, Any] = {"markeredgecolor": INK, "markeredgewidth": 0.9}
        axes.plot(x, y, marker=marker, markersize=size, color=colour, linestyle="", zorder=order, gid=gid, **edge)
        return
    colour, marker = VERDICT_STYLES.get(point.verdict, _OTHER_STYLE)
    if point.kind == "parent":
        axes.plot(x, y, marker="o", markersize=17, color="none", markeredgecolor=INK, markeredgewidth=1.4, linestyle="", zorder=3)
    width = (4.5 if point.kind == "checkpoint" else 8.0) * (0.6 if crowded and point.kind != "parent" else 1.0)
    face = "none" if point.hollow else colour
    axes.plot(x, y, marker=marker, markersize=width, markerfacecolor=face, markeredgecolor=colour, linestyle="", zorder=4, gid=gid)


def _limits(axes: Axes, points: Sequence[Point]) -> None:
    for setter, values in (
        (axes.set_xlim, [point.retention for point in points]),
        (axes.set_ylim, [point.forgetting for point in points]),
    ):
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        # Never zoom in so far that noise looks like a difference.
        middle, half = (low + high) / 2, max(0.15, (high - low) / 2 * 1.18)
        setter(max(-0.06, middle - half), min(1.06, middle + half))


def _label_points(figure: Figure, axes: Axes, points: Sequence[Point], *, lines: Sequence[tuple[Point, Point]]) -> None:
    """Names beside all points but the crowd of trials, each at the nearest place that covers nothing."""
    figure.canvas.draw()
    figure.set_layout_engine("none")  # names are placed within this layout and must not move it
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    frame = axes.get_window_extent(renderer)
    spots = [tuple(axes.transData.transform((point.retention, point.forgetting))) for point in points]
    steps = [index / 24 for index in range(25)]
    drawn = [
        tuple(axes.transData.transform((a.retention + (b.retention - a.retention) * t, a.forgetting + (b.forgetting - a.forgetting) * t)))
        for a, b in lines
        for t in steps
    ]
    few = sum(point.kind == "trial" for point in points) <= _FEW
    taken: list[tuple[float, float, float, float]] = []
    order = sorted(range(len(points)), key=lambda index: points[index].kind == "trial")
    for index in order:
        point = points[index]
        if point.kind == "checkpoint" or (point.kind == "trial" and not few):
            continue
        weight, size = ("bold" if point.kind == "merged" or point.delivered else "normal"), (9.0 if point.kind != "trial" else 8.5)
        text = axes.annotate(
            clipped(point.label),
            (point.retention, point.forgetting),
            textcoords="offset points",
            xytext=(0, 0),
            fontsize=size,
            weight=weight,
            color=INK if point.kind != "trial" else MUTED,
            zorder=7,
        )
        box = text.get_window_extent(renderer)
        width, height = box.width, box.height
        best, best_cost = (0.0, 0.0), float("inf")
        for distance in (1.0, 1.6, 2.3):
            for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)):
                gap = (18.0 if point.kind in ("parent", "merged") else 12.0) * distance
                left = spots[index][0] + (gap if dx > 0 else -gap - width if dx < 0 else -width / 2)
                low = spots[index][1] + (gap if dy > 0 else -gap - height if dy < 0 else -height / 2)
                cost = _label_cost((left, low, left + width, low + height), frame=frame, spots=spots, drawn=drawn, taken=taken) + distance
                if cost < best_cost:
                    best, best_cost = (left, low), cost
        if point.kind == "trial" and best_cost > _CROWDED:
            text.remove()
            continue
        taken.append((best[0], best[1], best[0] + width, best[1] + height))
        scale = 72 / figure.dpi
        text.set_position(((best[0] - spots[index][0]) * scale, (best[1] - spots[index][1]) * scale))


def _label_cost(
    box: tuple[float, float, float, float], *, frame: Any, spots: Sequence[Any], drawn: Sequence[Any], taken: Sequence[Any]
) -> float:
    left, low, right, high = box
    outside = max(0.0, frame.x0 - left) + max(0.0, right - frame.x1) + max(0.0, frame.y0 - low) + max(0.0, high - frame.y1)
    covered = sum(left - 9 < x < right + 9 and low - 9 < y < high + 9 for x, y in spots)
    crossed = sum(left < other[2] + 3 and right > other[0] - 3 and low < other[3] + 2 and high > other[1] - 2 for other in taken)
    struck = sum(left - 2 < x < right + 2 and low - 1 < y < high + 1 for x, y in drawn)
    return outside * 2 + covered * 20 + crossed * 30 + min(struck, 4) * 2

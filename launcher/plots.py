"""Figures of a report: drawn with matplotlib, readable without colour vision, on paper and on a dark page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from trainers.files import write_bytes, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, distinguishable with any common colour blindness; markers differ as well.
ORANGE, SKY, GREEN, BLUE, VERMILLION, PURPLE = "#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00", "#cc79a7"
# Placeholders that the page replaces by its own text and background colours, so that they must occur nowhere else.
INK, SOFT, PAPER = "#33383d", "#c9ced3", "#fefefe"
GREY = "#8a9199"

VERDICT_STYLES = {
    "over-forgetting": (VERMILLION, "^"),
    "under-forgetting": (BLUE, "v"),
    "balanced": (GREEN, "o"),
    "untouched": (PURPLE, "s"),
    "dead": (GREY, "X"),
}
_OTHER_STYLE = (GREY, "o")
MAX_CURVE_POINTS = 300


@dataclass(frozen=True)
class Point:
    """One model in the trade-off plot.

    Args:
        name: shown beside special points and on hovering.
        retention: mean retain score, 0 to 1.
        forgetting: 1 - mean forget score, 0 to 1.
        kind: ``trial``, ``parent``, ``baseline``, ``control`` or ``merged``.
        verdict: one of the verdict words; it sets colour and marker of a trial.
        hollow: stopped early or failed: not filled.
        hover: text shown on hovering.
    """

    name: str
    retention: float
    forgetting: float
    kind: str = "trial"
    verdict: str = ""
    hollow: bool = False
    hover: str = ""


@dataclass(frozen=True)
class Plot:
    """A figure as SVG for the page (``inline``) and for a file (``svg``), and as PNG bytes."""

    name: str
    svg: str
    inline: str
    png: bytes

    def save(self, folder: Path) -> None:
        """Write ``<name>.svg`` and ``<name>.png``, each atomically."""
        write_text(Path(folder) / f"{self.name}.svg", self.svg)
        write_bytes(Path(folder) / f"{self.name}.png", self.png)


def tradeoff_plot(points: Sequence[Point], *, front: Sequence[str] = (), fold: str = "test") -> Plot:
    """Retention (x) against forgetting (y); lines join the parents to the merge.

    Args:
        points: what to draw.
        front: names of the trials on the Pareto front, by rising retention.
        fold: named on the axes.
    """
    figure, (axes,) = new_figure(width=4.5, height=4.1)
    place = {point.name: point for point in points}
    hover: dict[str, str] = {}
    line = [place[name] for name in front if name in place]
    if len(line) > 1:
        xs, ys = [point.retention for point in line], [point.forgetting for point in line]
        axes.plot(xs, ys, color=GREY, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    merged = [point for point in points if point.kind == "merged"]
    for parent in (point for point in points if point.kind == "parent"):
        for target in merged:
            axes.plot([parent.retention, target.retention], [parent.forgetting, target.forgetting], color=INK, linewidth=1.1, zorder=2)
    for index, point in enumerate(points):
        gid = f"point-{index}"
        hover[gid] = point.hover or point.name
        _draw_point(axes, point, gid=gid)
    _limits(axes, points)
    axes.set_xlabel(f"retention: kept of what should stay ({fold})")
    axes.set_ylabel(f"forgetting: gone of what should go ({fold})")
    axes.text(0.985, 0.985, "better ↗", transform=axes.transAxes, ha="right", va="top", color=GREY, fontsize=9)
    lines = [(line[i], line[i + 1]) for i in range(len(line) - 1)]
    lines += [(parent, target) for parent in points if parent.kind == "parent" for target in merged]
    _label_points(figure, axes, points, lines=lines)
    return finish_plot("tradeoff", figure, title="Retention against forgetting", hover=hover)


def _draw_point(axes: Axes, point: Point, *, gid: str) -> None:
    x, y = point.retention, point.forgetting
    if point.kind == "merged":
        axes.plot(x, y, marker="*", markersize=19, color=ORANGE, markeredgecolor=INK, markeredgewidth=0.9, linestyle="", zorder=6, gid=gid)
        return
    if point.kind == "baseline":
        axes.plot(x, y, marker="s", markersize=9, color=PURPLE, markeredgecolor=INK, markeredgewidth=0.8, linestyle="", zorder=5, gid=gid)
        return
    if point.kind == "control":
        axes.plot(x, y, marker="D", markersize=8, color=SKY, markeredgecolor=INK, markeredgewidth=0.8, linestyle="", zorder=4, gid=gid)
        return
    colour, marker = VERDICT_STYLES.get(point.verdict, _OTHER_STYLE)
    face = "none" if point.hollow else colour
    if point.kind == "parent":
        axes.plot(x, y, marker="o", markersize=17, color="none", markeredgecolor=INK, markeredgewidth=1.4, linestyle="", zorder=3)
    axes.plot(x, y, marker=marker, markersize=8, markerfacecolor=face, markeredgecolor=colour, linestyle="", zorder=4, gid=gid)


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
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    frame = axes.get_window_extent(renderer)
    spots = [tuple(axes.transData.transform((point.retention, point.forgetting))) for point in points]
    steps = [index / 24 for index in range(25)]
    drawn = [
        tuple(axes.transData.transform((a.retention + (b.retention - a.retention) * t, a.forgetting + (b.forgetting - a.forgetting) * t)))
        for a, b in lines
        for t in steps
    ]
    few = sum(point.kind == "trial" for point in points) <= 10
    taken: list[tuple[float, float, float, float]] = []
    order = sorted(range(len(points)), key=lambda index: points[index].kind == "trial")
    for index in order:
        point = points[index]
        if point.kind == "trial" and not few:
            continue
        weight, size = ("bold", 9.0) if point.kind == "merged" else ("normal", 8.5 if point.kind != "trial" else 8.0)
        text = axes.annotate(
            point.name,
            (point.retention, point.forgetting),
            textcoords="offset points",
            xytext=(0, 0),
            fontsize=size,
            weight=weight,
            color=INK if point.kind != "trial" else GREY,
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


def curves_plot(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Plot | None:
    """Training curves of a few trials: loss, token accuracy on both sets and the attack's AUC over optimizer steps.

    Args:
        curves: trial label to the rows of its ``metrics.jsonl``.

    Returns:
        The plot, or None where no row holds a number.
    """
    panels = [
        ("loss", ("loss",), None),
        ("forget token accuracy ↓", ("signals", "forget_token_accuracy"), (-0.04, 1.04)),
        ("retain token accuracy ↑", ("signals", "retain_token_accuracy"), (-0.04, 1.04)),
        ("membership AUC → 0.5", ("signals", "mia_auc"), (-0.04, 1.04)),
    ]
    series = {
        (title, name): _series(rows, path=path) for title, path, _ in panels for name, rows in curves.items() if _series(rows, path=path)
    }
    shown = [panel for panel in panels if any(title == panel[0] for title, _ in series)]
    if not shown:
        return None
    rows = (len(shown) + 1) // 2
    figure, grid = new_figure(width=4.7, height=1.85 * rows + 0.45, rows=rows, columns=2 if len(shown) > 1 else 1)
    looks = [(VERMILLION, "-", "o"), (BLUE, "--", "s"), (GREEN, "-.", "^"), (PURPLE, ":", "D"), (ORANGE, "-", "v"), (SKY, "--", "P")]
    for axes, (title, _, limits) in zip(grid, shown, strict=False):
        for index, name in enumerate(curves):
            points = series.get((title, name))
            if points:
                colour, style, marker = looks[index % len(looks)]
                mark = marker if len(points) <= 12 else None
                axes.plot(*zip(*points, strict=True), color=colour, linestyle=style, linewidth=1.5, marker=mark, markersize=4, label=name)
        if title.startswith("membership"):
            axes.axhline(0.5, color=GREY, linewidth=0.8, linestyle=(0, (2, 3)))
        if limits:
            axes.set_ylim(*limits)
        axes.set_title(title, fontsize=9, color=INK, loc="left")
        axes.set_xlabel("optimizer step", fontsize=8.5)
    for axes in grid[len(shown) :]:
        axes.set_visible(False)
    handles: dict[str, Any] = {}
    for axes in grid[: len(shown)]:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=2, frameon=False, fontsize=8.5, labelcolor=INK)
    return finish_plot("curves", figure, title="Training curves")


def _series(rows: Sequence[Mapping[str, Any]], *, path: tuple[str, ...]) -> list[tuple[float, float]]:
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
) -> Plot | None:
    """The attack's AUC of measured merges over one knob, with the line 0.5 it should meet.

    Args:
        curves: label to (knob value, AUC) points.
        x_label: the knob's name.
        chosen: the point of the merge that was written.
    """
    curves = {label: sorted(points) for label, points in curves.items() if points}
    if not curves:
        return None
    figure, (axes,) = new_figure(width=4.3, height=3.2)
    colours = [BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY]
    for index, (label, points) in enumerate(curves.items()):
        xs, ys = zip(*points, strict=True)
        style: dict[str, Any] = {"marker": "os^vDP"[index % 6], "markersize": 5, "linewidth": 1.4, "label": label}
        axes.plot(xs, ys, color=colours[index % len(colours)], **style)
    axes.axhline(0.5, color=INK, linewidth=1.0, linestyle=(0, (4, 3)), label="0.5: an attacker can only guess")
    low = min(0.4, *(y for points in curves.values() for _, y in points))
    high = max(0.6, *(y for points in curves.values() for _, y in points))
    axes.set_ylim(low - 0.06, high + 0.06)
    if chosen is not None:
        axes.plot(*chosen, marker="*", markersize=16, color=ORANGE, markeredgecolor=INK, markeredgewidth=0.8, linestyle="", label="chosen")
    axes.set_xlabel(x_label)
    axes.set_ylabel("membership AUC (validation)")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8.5, labelcolor=INK)
    return finish_plot(name, figure, title="Membership AUC of the measured merges")


def new_figure(*, width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, list[Any]]:
    """A figure (inches) and its axes, row by row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A figure made without pyplot shares no global state with the caller and needs no closing.
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained", facecolor=PAPER)
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axes in grid:
        axes.set_facecolor("none")
        axes.grid(color=SOFT, linewidth=0.5, zorder=0)
        axes.set_axisbelow(True)
        axes.tick_params(colors=INK, labelsize=8.5)
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)
        axes.xaxis.label.set_fontsize(9.5)
        axes.yaxis.label.set_fontsize(9.5)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(GREY)
    return figure, grid


def finish_plot(name: str, figure: Any, *, title: str, hover: Mapping[str, str] | None = None) -> Plot:
    """The figure as SVG (for files and for the page) and PNG."""
    import io

    from matplotlib import rc_context

    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=160, metadata={"Software": None})
    # Text stays text (small, searchable); a fixed salt gives the same ids for the same figure.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": ["sans-serif"]}):
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    text = _with_titles(svg.getvalue(), title=title, hover=hover or {}, prefix=name)
    return Plot(name=name, svg='<?xml version="1.0" encoding="utf-8"?>\n' + text + "\n", inline=_for_page(text), png=png.getvalue())


def _with_titles(svg: str, *, title: str, hover: Mapping[str, str], prefix: str) -> str:
    """The drawing without matplotlib's metadata, with a title (hover text) per point and ids that are unique on a page."""
    namespace = "http://www.w3.org/2000/svg"
    ElementTree.register_namespace("", namespace)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(svg)
    for element in list(root):
        if element.tag.endswith("metadata"):
            root.remove(element)
    for element in root.iter():
        gid = element.get("id")
        if gid is not None and gid in hover:
            child = ElementTree.Element(f"{{{namespace}}}title")
            child.text = hover[gid]
            element.insert(0, child)
        if gid:
            element.set("id", f"{prefix}-{gid}")
        for key, value in list(element.attrib.items()):
            if key.endswith("href") and value.startswith("#"):
                element.set(key, f"#{prefix}-{value[1:]}")
            elif "url(#" in value:
                element.set(key, value.replace("url(#", f"url(#{prefix}-"))
    heading = ElementTree.Element(f"{{{namespace}}}title")
    heading.text = title
    root.insert(0, heading)
    root.set("role", "img")
    return ElementTree.tostring(root, encoding="unicode")


def _for_page(svg: str) -> str:
    """Colours that follow the page's theme, the page's own font, a width that follows the column."""
    svg = svg.replace(INK, "currentColor").replace(SOFT, "var(--line)").replace(PAPER, "none").replace(BLUE, "var(--blue)")
    svg = re.sub(r"font:(?P<rest>[^;\"]*?)(?P<size>\d+(?:\.\d+)?px)\s[^;\"]*", r"font:\g<rest>\g<size> system-ui, sans-serif", svg)
    return re.sub(r'<svg([^>]*?) width="[^"]*"', r"<svg\1", re.sub(r'<svg([^>]*?) height="[^"]*"', r"<svg\1", svg, count=1), count=1)

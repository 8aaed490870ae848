"""What all figures of a report share: palette, axes, and how a figure becomes SVG and PNG.

They are readable without colour vision, on paper and on a dark page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from trainers.files import write_bytes, write_text

# Okabe and Ito's palette, distinguishable with any common colour blindness; markers differ as well.
ORANGE, SKY, GREEN, BLUE, VERMILLION, PURPLE = "#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00", "#cc79a7"
# Placeholders that the page replaces by its own text and background colours, so that they must occur nowhere else.
INK, MUTED, SOFT, PAPER = "#33383d", "#5c666d", "#c9ced3", "#fefefe"
GREY = "#8a9199"
_SVG = "http://www.w3.org/2000/svg"


@dataclass(frozen=True)
class Plot:
    """A figure as SVG for the page (``inline``) and for a file (``svg``)."""

    name: str
    svg: str
    inline: str
    figure: Any = field(repr=False, compare=False)

    @cached_property
    def png(self) -> bytes:
        """The same as an image; drawn when it is asked for, because a page alone needs none."""
        png = io.BytesIO()
        self.figure.savefig(png, format="png", dpi=160, metadata={"Software": None})
        return png.getvalue()

    def save(self, folder: Path) -> None:
        """Write ``<name>.svg`` and ``<name>.png``, each atomically."""
        write_text(Path(folder) / f"{self.name}.svg", self.svg)
        write_bytes(Path(folder) / f"{self.name}.png", self.png)


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
        axes.tick_params(colors=INK, labelsize=9)
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)
        axes.xaxis.label.set_fontsize(9.5)
        axes.yaxis.label.set_fontsize(9.5)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(GREY)
    return figure, grid


def clipped(text: str, *, width: int = 30) -> str:
    """A name that fits into a figure: its beginning, if it is longer than ``width`` characters."""
    return text if len(text) <= width else f"{text[: width - 1]}…"


def legend_below(figure: Any, grid: list[Any], *, columns: int = 2) -> None:
    """One legend below all axes, each label once."""
    handles: dict[str, Any] = {}
    for axes in grid:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        words = {"frameon": False, "fontsize": 9, "labelcolor": INK}
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns, **words)


def finish_plot(name: str, figure: Any, *, title: str, hover: Mapping[str, str] | None = None) -> Plot:
    """The figure for files and for the page.

    Args:
        name: of the files, and prefix of all ids.
        figure: what was drawn.
        title: what the figure shows, for those who hear it.
        hover: id of a mark to its text.
    """
    from matplotlib import rc_context

    svg = io.StringIO()
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
    figure.set_layout_engine("none")  # what was laid out once is not laid out again for each format
    # Text stays text (small, searchable); a fixed salt gives the same ids for the same figure.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": ["sans-serif"]}):
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    root = _own_ids(svg.getvalue(), prefix=name)
    marks = {f"{name}-{gid}": text for gid, text in (hover or {}).items()}
    _label_marks(root, marks)
    inline = _for_page(root, title=title, interactive=bool(marks))
    heading = ElementTree.Element(f"{{{_SVG}}}title")
    heading.text = title
    root.insert(0, heading)
    text = '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"
    return Plot(name=name, svg=text, inline=inline, figure=figure)


def _own_ids(svg: str, *, prefix: str) -> ElementTree.Element:
    """The drawing without matplotlib's metadata, with ids that are unique on a page."""
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(svg)
    for element in list(root):
        if element.tag.endswith("metadata"):
            root.remove(element)
    for element in root.iter():
        if element.get("id"):
            element.set("id", f"{prefix}-{element.get('id')}")
        for key, value in list(element.attrib.items()):
            if key.endswith("href") and value.startswith("#"):
                element.set(key, f"#{prefix}-{value[1:]}")
            elif "url(#" in value:
                element.set(key, value.replace("url(#", f"url(#{prefix}-"))
    return root


def _label_marks(root: ElementTree.Element, marks: Mapping[str, str]) -> None:
    """A title per mark: shown on hovering by whatever shows the drawing."""
    for element in root.iter():
        if element.get("id") in marks:
            child = ElementTree.Element(f"{{{_SVG}}}title")
            child.text = marks[str(element.get("id"))]
            element.insert(0, child)
            element.set("class", "mark")


def _for_page(root: ElementTree.Element, *, title: str, interactive: bool) -> str:
    """A copy whose colours follow the page's theme, in the page's font, as wide as its column; its marks can be reached by keyboard."""
    page = ElementTree.fromstring(ElementTree.tostring(root))
    # What is inside an img has no names of its own for a screen reader.
    page.set("role", "group" if interactive else "img")
    page.set("aria-label", title)
    for key in ("width", "height"):
        page.attrib.pop(key, None)
    for element in page.iter():
        if element.get("class") == "mark":
            element.set("tabindex", "0")
            element.set("role", "img")
            element.set("aria-label", str(element[0].text))
    svg = ElementTree.tostring(page, encoding="unicode")
    for colour, variable in ((SOFT, "var(--line)"), (MUTED, "var(--soft)"), (BLUE, "var(--blue)"), (INK, "currentColor"), (PAPER, "none")):
        svg = svg.replace(colour, variable)
    return re.sub(r"font:(?P<rest>[^;\"]*?)(?P<size>\d+(?:\.\d+)?px)\s[^;\"]*", r"font:\g<rest>\g<size> system-ui, sans-serif", svg)

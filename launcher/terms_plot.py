"""The figure of the twelve terms: a heat map with each model's weakest one framed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from launcher.plots import BLUE, INK, PAPER, VERMILLION, Plot, clipped, finish_plot, new_figure
from launcher.report_data import is_number


def terms_plot(names: Sequence[str], columns: Sequence[Mapping[str, Any]]) -> Plot | None:
    """One row per term, one column per model.

    Args:
        names: of the terms.
        columns: ``label``, ``values`` (term to value) and ``weakest`` (a term) of each model.
    """
    if not names or not columns:
        return None
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    figure, (axes,) = new_figure(width=2.4 + 1.25 * len(columns), height=0.9 + 0.27 * len(names))
    shades = LinearSegmentedColormap.from_list("terms", [VERMILLION, PAPER, BLUE])
    for column, model in enumerate(columns):
        for row, name in enumerate(names):
            value = model["values"].get(name)
            text = f"{value:.3f}" if is_number(value) else "–"
            face = shades(value) if is_number(value) else "none"
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=face, alpha=0.6, linewidth=0))
            weakest = name == model.get("weakest")
            if weakest:
                axes.add_patch(Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, fill=False, edgecolor=INK, linewidth=1.6))
            axes.text(column, row, text, ha="center", va="center", fontsize=8.5, color=INK, weight="bold" if weakest else "normal")
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xticks(range(len(columns)), [_wrapped(str(model["label"])) for model in columns])
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(names)), names)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return finish_plot("terms", figure, title="The twelve terms")


def _wrapped(label: str, *, width: int = 16) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(clipped(label, width=3 * width), width))

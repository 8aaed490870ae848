"""The figure of an audit: what each attack brings back, and what it brings back where nothing is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.plots import BLUE, GREY, INK, MUTED, PAPER, PURPLE, SOFT, VERMILLION, Plot, finish_plot, legend_below, new_figure

_PANELS = (
    ("forget_regurgitation", "completions"),
    ("forget_knowledge", "questions"),
    ("forget_answer_log_prob", "answer log-probability"),
)
_SPAN = (-0.3, 1.3)
"""Shares beyond this are drawn at its edge, with an arrow."""


def audit_plot(result: Mapping[str, Any]) -> Plot:
    """Recovered share per attack with intervals, the control beside it, a panel per score; the last panel shows membership AUCs.

    Args:
        result: the content of an audit's file.
    """
    names, families, panels = _parts(result)
    count = len(panels) + bool(families)
    height = 1.6 + 0.34 * max(len(names), len(families), 4)
    figure, grid = new_figure(width=1.6 + 3.1 * max(1, count), height=height, columns=max(1, count))
    for axes, (score, title) in zip(grid, panels, strict=False):
        _recovered_panel(axes, result, names=names, score=score, title=title, labelled=axes is grid[0])
    if families:
        _membership_panel(grid[len(panels)], families)
    if not count:
        grid[0].text(0.5, 0.5, "no attack could be compared", transform=grid[0].transAxes, ha="center", color=INK)
        grid[0].set_axis_off()
    legend_below(figure, grid, columns=4)
    figure.suptitle(f"Verdict: {result['verdict']}", x=0.01, ha="left", fontsize=11, weight="bold", color=INK)
    return finish_plot("audit", figure, title="What attacks bring back")


def audit_panels(result: Mapping[str, Any]) -> list[Plot]:
    """The same panels as figures of their own, for a page that may be as narrow as a telephone.

    Args:
        result: the content of an audit's file.
    """
    names, families, panels = _parts(result)
    plots = []
    for score, title in panels:
        figure, (axes,) = new_figure(width=4.4, height=1.5 + 0.27 * max(len(names), 3))
        _recovered_panel(axes, result, names=names, score=score, title=title, labelled=True)
        legend_below(figure, [axes], columns=1)
        plots.append(finish_plot(f"audit_{score}", figure, title=f"What attacks bring back: {title}"))
    if families:
        figure, (axes,) = new_figure(width=4.4, height=1.5 + 0.27 * max(len(families), 3))
        _membership_panel(axes, families)
        legend_below(figure, [axes], columns=1)
        plots.append(finish_plot("audit_membership", figure, title="Membership AUCs"))
    return plots


def _parts(result: Mapping[str, Any]) -> tuple[list[str], Mapping[str, Any], list[tuple[str, str]]]:
    """Attacks, membership families on all documents, and the scores that at least one attack was compared by."""
    names = list(result["attacks"])
    families: Mapping[str, Any] = next(iter(result["membership"].values()), {})
    return names, families, [(score, title) for score, title in _PANELS if any(_has(result, name, score) for name in names)]


def _has(result: Mapping[str, Any], name: str, score: str) -> bool:
    return result["attacks"][name]["scores"][score]["recovered"] is not None


def _recovered_panel(axes: Any, result: Mapping[str, Any], *, names: list[str], score: str, title: str, labelled: bool) -> None:
    axes.axvline(0, color=INK, linewidth=1.0, zorder=1)
    axes.axvline(1, color=INK, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    for place, name in enumerate(names):
        one = result["attacks"][name]["scores"][score]
        if one["recovered"] is None:
            text = "not measured" if one["after"] is None else "nothing forgotten"
            axes.text(0.02, place, text, fontsize=8, color=MUTED, va="center", ha="left")
            continue
        control = one["control_recovered"]
        if control is not None:
            label = "control: never-seen model" if one["control_after"] is not None else "control: unseen texts"
            _point(axes, control, y=place + 0.17, colour=GREY, marker="D", size=4.5, label=label)
        clear, mended = one["clear"], one["mended"]
        _point(
            axes,
            one["recovered"],
            y=place - (0.17 if control is not None else 0.0),
            colour=VERMILLION if clear else BLUE,
            marker="o" if not clear else "s",
            size=6.5,
            label="clearly more than the control"
            if clear
            else "no more than the never-seen model has under attack"
            if mended
            else "audited model",
            hollow=mended and not clear,
        )
    axes.set_xlim(_SPAN[0] - 0.06, _SPAN[1] + 0.06)
    axes.set_xticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
    axes.set_title(title, fontsize=9.5, color=INK, loc="left")
    axes.set_xlabel("share recovered", fontsize=8.5)
    _rows(axes, names if labelled else [""] * len(names))


def _point(
    axes: Any, estimate: Mapping[str, Any], *, y: float, colour: str, marker: str, size: float, label: str, hollow: bool = False
) -> None:
    value = estimate["value"]
    low, high = estimate["interval"] or (value, value)
    shown = min(max(value, _SPAN[0]), _SPAN[1])
    axes.plot([max(low, _SPAN[0]), min(high, _SPAN[1])], [y, y], color=colour, linewidth=1.5, solid_capstyle="butt", zorder=2)
    if shown != value:
        marker = "<" if value < shown else ">"
    face = PAPER if hollow else colour
    axes.plot(
        shown,
        y,
        marker=marker,
        markersize=size,
        markerfacecolor=face,
        markeredgecolor=colour,
        markeredgewidth=1.5 if hollow else 1.0,
        linestyle="",
        label=label,
        zorder=3,
    )


def _membership_panel(axes: Any, families: Mapping[str, Any]) -> None:
    axes.axvline(0.5, color=INK, linewidth=1.0, zorder=1)
    for place, one in enumerate(families.values()):
        error = 1.96 * one["standard_error"]
        axes.plot(
            [max(0.0, one["unlearned"] - error), min(1.0, one["unlearned"] + error)],
            [place, place],
            color=BLUE,
            linewidth=1.5,
            solid_capstyle="butt",
            zorder=2,
        )
        axes.plot(one["before"], place, marker="|", markersize=11, markeredgewidth=2.2, color=PURPLE, linestyle="", zorder=4,
                  label="before unlearning (AUC)")  # fmt: skip
        if one["control"] is not None:
            axes.plot(one["control"], place + 0.2, marker="D", markersize=4.5, color=GREY, linestyle="", zorder=3,
                      label="control: never-seen model")  # fmt: skip
        axes.plot(one["unlearned"], place, marker="o", markersize=6.5, color=BLUE, linestyle="", zorder=3, label="audited model")
    axes.set_xlim(-0.05, 1.05)
    axes.set_xticks([0, 0.5, 1])
    axes.set_title("membership", fontsize=9.5, color=INK, loc="left")
    axes.set_xlabel("AUC (1: remembered)", fontsize=8.5)
    _rows(axes, [name.replace("_", " ") for name in families])


def _rows(axes: Any, labels: list[str]) -> None:
    """One row per label from the top, with a pale band behind every other one."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    for place in range(0, len(labels), 2):
        axes.axhspan(place - 0.5, place + 0.5, color=SOFT, alpha=0.25, linewidth=0, zorder=0)

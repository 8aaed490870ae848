"""Figures: every point is drawn where it belongs, text stays text, and the page's copy follows its theme."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from launcher.curve_plots import MAX_CURVE_POINTS, curves_plot, merge_curve_plot, series
from launcher.plots import GREY, INK, MUTED, Plot
from launcher.terms_plot import terms_plot
from launcher.tradeoff_plot import Point, tradeoff_plot

POINTS = [
    Point(name="before", retention=0.99, forgetting=0.03, kind="baseline", verdict="untouched"),
    Point(name="trial-03", retention=0.6, forgetting=0.9, kind="parent", verdict="over-forgetting"),
    Point(name="trial-06", retention=0.9, forgetting=0.5, kind="parent", verdict="under-forgetting"),
    Point(name="trial-07", retention=0.3, forgetting=0.4, kind="trial", verdict="stopped", hollow=True, hover="trial-07 & <others>"),
    Point(name="merged", retention=0.85, forgetting=0.88, kind="merged", verdict="balanced"),
]


@pytest.fixture(scope="module")
def plot() -> Plot:
    return tradeoff_plot(POINTS, front=["trial-03", "trial-06"], fold="validation")


def titles(svg: str) -> list[str]:
    root = ElementTree.fromstring(svg.encode())
    return [str(element.text) for element in root.iter() if element.tag.endswith("}title")]


def test_every_point_has_a_hover_text(plot: Plot) -> None:
    assert sorted(titles(plot.svg)) == ["Retention against forgetting", "before", "merged", "trial-03", "trial-06", "trial-07 & <others>"]


def test_text_is_stored_as_text(plot: Plot) -> None:
    """Glyph outlines could be neither searched nor read aloud."""
    assert "validation)" in plot.svg
    assert "merged</text>" in plot.svg


def test_the_file_has_its_own_colours_and_the_page_copy_those_of_the_page(plot: Plot) -> None:
    assert INK in plot.svg
    assert "currentColor" not in plot.svg
    assert INK not in plot.inline
    assert "currentColor" in plot.inline
    assert MUTED in plot.svg
    assert MUTED not in plot.inline
    assert not plot.inline.startswith("<?xml")
    ElementTree.fromstring(plot.inline)


def test_the_same_figure_gives_the_same_bytes(plot: Plot) -> None:
    again = tradeoff_plot(POINTS, front=["trial-03", "trial-06"], fold="validation")
    assert again.svg == plot.svg
    moved = tradeoff_plot([Point(name="before", retention=0.5, forgetting=0.5), *POINTS[1:]], fold="validation")
    assert moved.svg != plot.svg


def test_a_single_point_can_be_drawn() -> None:
    assert "before" in tradeoff_plot(POINTS[:1]).svg


def test_no_curve_without_numbers() -> None:
    assert curves_plot({}) is None
    assert curves_plot({"trial-01": [{"step": 1, "loss": None}]}) is None
    assert merge_curve_plot({"density 0.2": []}, x_label="scale") is None


def test_curves_show_only_what_was_measured() -> None:
    plot = curves_plot({"trial-01": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]})
    assert plot is not None
    assert "loss</text>" in plot.svg
    assert "membership AUC" not in plot.svg


def test_long_curves_are_thinned_but_keep_their_end() -> None:
    """1,000 steps at a limit of 300 points: every fourth step, and the last one."""
    rows = [{"step": step, "loss": float(step)} for step in range(1, 1001)]
    points = series(rows, path=("loss",))
    assert len(points) == 251
    assert len(points) <= MAX_CURVE_POINTS
    assert points[0] == (1.0, 1.0)
    assert points[-1] == (1000.0, 1000.0)


def test_the_merge_curve_marks_one_half_and_the_choice() -> None:
    plot = merge_curve_plot({"density 0.2": [(1.3, 0.4), (1.0, 0.7)]}, x_label="scale", name="merge_scale", chosen=(1.2, 0.5))
    assert plot is not None
    assert plot.name == "merge_scale"
    assert "0.5: an attacker can only guess" in plot.svg
    assert "best merge" in plot.svg


def test_every_mark_on_the_page_can_be_reached_and_has_a_name(plot: Plot) -> None:
    """A drawing that is announced as one image would hide its marks from a screen reader."""
    root = ElementTree.fromstring(plot.inline)
    marks = [element for element in root.iter() if element.get("class") == "mark"]
    assert sorted(str(mark.get("aria-label")) for mark in marks) == sorted(point.hover or point.name for point in POINTS)
    assert {mark.get("tabindex") for mark in marks} == {"0"}
    assert root.get("role") == "group"
    still = curves_plot({"trial-01": [{"step": 1, "loss": 2.0}]})
    assert still is not None
    assert ElementTree.fromstring(still.inline).get("role") == "img"


def test_text_of_a_figure_is_dark_enough_to_read(plot: Plot) -> None:
    """The grey of marks and axes has a contrast of 3.2 on white: too little for words, which need 4.5."""
    root = ElementTree.fromstring(plot.svg.split("?>", 1)[1])
    styles = [element.get("style") or "" for element in root.iter() if element.tag.endswith("}text")]
    assert styles
    assert [style for style in styles if GREY in style] == []


def test_a_delivered_control_is_named_so_and_a_stopped_trial_is_hollow() -> None:
    control = Point(name="scaled", retention=0.8, forgetting=0.8, kind="control", delivered=True)
    svg = tradeoff_plot([*POINTS, control]).svg
    assert "delivered</text>" in svg
    assert "delivered</text>" not in tradeoff_plot(POINTS).svg


def test_checkpoints_are_joined_in_the_order_of_their_steps() -> None:
    """The line through a trial goes by steps, its last checkpoint being the trial itself, in whatever order the points come."""
    path = [
        Point(name="trial-01", retention=0.9, forgetting=0.9, trial="trial-01"),
        Point(name="trial-01@20", retention=0.5, forgetting=0.6, kind="checkpoint", trial="trial-01", step=20),
        Point(name="trial-01@10", retention=0.99, forgetting=0.1, kind="checkpoint", trial="trial-01", step=10),
    ]
    lines = [_line(tradeoff_plot(points).svg) for points in (path, [path[0], path[2], path[1]], [path[0]])]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 3
    assert lines[0][0][1] > lines[0][1][1] > lines[0][2][1], "forgetting rises from step to step, and y points downwards"
    assert lines[2] == []


def _line(svg: str) -> list[tuple[float, float]]:
    """Corners of the faint line through a trial's checkpoints."""
    root = ElementTree.fromstring(svg.split("?>", 1)[1])
    for element in root.iter():
        if element.tag.endswith("}path") and "stroke: #c9ced3; stroke-width: 0.9" in (element.get("style") or ""):
            words = (element.get("d") or "").split()
            return [(float(words[i + 1]), float(words[i + 2])) for i in range(0, len(words), 3)]
    return []


def test_a_first_look_is_drawn_apart_from_what_met_all_examples() -> None:
    whole, early = {"density 1": [(1.0, 0.4), (0.9, 0.6)]}, {"density 0.5": [(1.0, 0.9), (0.9, 0.95)]}
    plot = merge_curve_plot(whole, x_label="scale", first_look=early)
    assert plot is not None
    assert "others, first look on fewer examples</text>" in plot.svg
    alone = merge_curve_plot(whole, x_label="scale")
    assert alone is not None
    assert "first look" not in alone.svg


def test_the_heat_map_has_every_value_and_frames_the_weakest() -> None:
    columns = [
        {"label": "before", "values": {"a": 0.25, "b": 0.75}, "weakest": "a"},
        {"label": "after", "values": {"a": 1.0}, "weakest": None},
    ]
    plot = terms_plot(["a", "b"], columns)
    assert plot is not None
    assert [f"{text}</text>" in plot.svg for text in ("0.250", "0.750", "1.000", "–", "before")] == [True] * 5
    assert terms_plot([], columns) is None
    unframed = terms_plot(["a", "b"], [columns[0] | {"weakest": None}, columns[1]])
    assert unframed is not None
    assert plot.svg.count("<path") == unframed.svg.count("<path") + 1

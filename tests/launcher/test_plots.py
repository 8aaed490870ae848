"""Figures: every point is drawn where it belongs, text stays text, and the page's copy follows its theme."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from launcher.plots import INK, MAX_CURVE_POINTS, Plot, Point, _series, curves_plot, merge_curve_plot, tradeoff_plot

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
    points = _series(rows, path=("loss",))
    assert len(points) == 251
    assert len(points) <= MAX_CURVE_POINTS
    assert points[0] == (1.0, 1.0)
    assert points[-1] == (1000.0, 1000.0)


def test_the_merge_curve_marks_one_half_and_the_choice() -> None:
    plot = merge_curve_plot({"density 0.2": [(1.3, 0.4), (1.0, 0.7)]}, x_label="scale", name="merge_scale", chosen=(1.2, 0.5))
    assert plot is not None
    assert plot.name == "merge_scale"
    assert "0.5: an attacker can only guess" in plot.svg
    assert "chosen" in plot.svg

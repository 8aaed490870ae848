"""The forgetting/retention plot shows every model that was scored, all on one fold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import launcher.report_points as report_points
from launcher.report_data import base_name, read_run
from launcher.report_figures import curve_rows, front_names
from launcher.report_points import plot_fold, tradeoff_points, undrawn_trials
from launcher.report_trials import trial_rows
from tests.helpers.run_folder import build_finished, scores
from trainers.files import read_json, write_json


def early(name: str, *, forgetting: float, retention: float, **changes: Any) -> dict[str, Any]:
    """An earlier checkpoint as the pair search records it."""
    found = {"name": name, "complete": False, "verdict": "under-forgetting", "excluded": None}
    return found | {"scores": scores(forgetting=forgetting, retention=retention, auc=0.8)} | changes


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose over-forgetting parent is step 20 of trial-03, and whose stopped trial left a checkpoint too; only read."""
    run = build_finished(tmp_path_factory.mktemp("points") / "run")
    pairs = read_json(run / "pairs.json")
    pairs["candidates"] += [
        early("trial-03@20", forgetting=0.6, retention=0.9),
        early("trial-03@10", forgetting=0.2, retention=0.95),
        early("trial-08@5", forgetting=0.1, retention=0.9),
    ]
    write_json(run / "pairs.json", pairs)
    results = read_json(run / "results.json")
    results["pair"]["over"] = "trial-03@20"
    write_json(run / "results.json", results)
    return run


def test_trials_checkpoints_controls_and_merge_are_drawn_on_the_validation_fold(run: Path) -> None:
    data = read_run(run)
    points = {point.name: point for point in tradeoff_points(data)}
    assert plot_fold(data) == "validation"
    assert {"trial-01", "trial-03", "trial-03@20", "trial-03@10", "trial-08@5", "before", "linear", "merged"} <= points.keys()
    assert (points["trial-03@20"].kind, points["trial-03@10"].kind, points["trial-06"].kind) == ("parent", "checkpoint", "parent")
    assert points["trial-03"].kind == "trial", "its last checkpoint is not the parent"
    assert [points[name].hollow for name in ("trial-08@5", "trial-08", "trial-03@10")] == [True, True, False]
    assert "estimated without generation" in points["trial-03@10"].hover
    assert "test: retention 0.620" in points["trial-03"].hover
    assert [point.name for point in points.values() if point.delivered] == ["merged"]
    assert undrawn_trials(data, points.values()) == ["trial-07 (failed)"]


def test_the_front_holds_no_stopped_and_no_dead_model(run: Path) -> None:
    """trial-04 forgets everything but is dead; trial-08@5 belongs to a trial that was stopped."""
    front = front_names(tradeoff_points(read_run(run)))
    assert "trial-03@20" in front
    assert not {"trial-04", "trial-08", "trial-08@5", "merged", "linear"} & set(front)


def test_a_run_without_checkpoints_is_drawn_on_the_test_fold(run: Path) -> None:
    data = replace(read_run(run), pairs={})
    assert plot_fold(data) == "test"
    unscored = tuple(trial | {"test": {}} if trial["name"] == "trial-08" else trial for trial in data.trials)
    assert plot_fold(replace(data, trials=unscored)) == "validation", "there every trial can be drawn"


def test_too_many_checkpoints_are_left_out_but_never_a_parent(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_points, "MAX_CHECKPOINTS", 1)
    data = read_run(run)
    assert [point.name for point in tradeoff_points(data) if point.step is not None] == ["trial-03@20"]
    assert report_points.left_out(data) == 2


def test_the_curve_of_a_parent_that_is_an_earlier_checkpoint_is_its_trials(run: Path) -> None:
    curves, steps = curve_rows(read_run(run))
    assert list(curves) == ["trial-03 (over-forgetting parent)", "trial-06 (under-forgetting parent)"]
    assert all(len(rows) == 40 for rows in curves.values())
    assert steps == {"trial-03 (over-forgetting parent)": 20}
    row = next(row for row in trial_rows(read_run(run)) if row["name"] == "trial-03")
    assert row["parent"] == "over-forgetting parent at step 20"


def test_a_checkpoints_name_is_its_trial_and_step() -> None:
    assert base_name("trial-03@112") == ("trial-03", 112)
    assert base_name("trial-03") == ("trial-03", None)

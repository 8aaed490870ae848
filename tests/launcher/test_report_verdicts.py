"""The page says why a model got its verdict, and by which thresholds."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.forgetting import VerdictThresholds
from launcher.report import build_report
from launcher.report_data import read_run
from launcher.report_verdicts import verdict_view
from tests.helpers.run_folder import build_finished
from trainers.files import read_json, write_json


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return build_finished(tmp_path / "run")


def test_every_verdict_of_a_trial_has_its_reasons(run: Path) -> None:
    trials = {row["name"]: row for row in verdict_view(read_run(run))["trials"]}
    assert trials["trial-03"]["verdict"] == "over-forgetting"
    assert trials["trial-03"]["reasons"] == ["AUC 0.070 < 0.450: members are less likely than strangers"]
    assert any("retention" in reason for reason in trials["trial-04"]["reasons"]), "dead"


def test_every_threshold_is_shown_with_value_and_meaning(run: Path) -> None:
    shown = {row["name"]: row for row in verdict_view(read_run(run))["thresholds"]}
    assert {name: row["value"] for name, row in shown.items()} == VerdictThresholds().model_dump()
    assert all(row["meaning"] for row in shown.values())
    page = build_report(run).read_text(encoding="utf-8")
    for name in shown:
        assert name in page
    assert "members are less likely than strangers" in page


def test_gates_of_the_search_are_shown_as_they_were_set(run: Path) -> None:
    pairs = read_json(run / "pairs.json")
    write_json(run / "pairs.json", pairs | {"config": {"max_pairs": 3, "min_mmlu_fraction": 0.81}})
    (gate,) = verdict_view(read_run(run))["gates"]
    assert (gate["name"], gate["value"]) == ("min_mmlu_fraction", 0.81)
    assert "MMLU" in gate["meaning"]


def test_a_verdict_by_other_thresholds_has_no_reasons(run: Path) -> None:
    results = read_json(run / "results.json")
    for trial in results["trials"]:
        trial["verdict"] = "balanced"
    write_json(run / "results.json", results)
    trials = {row["name"]: row for row in verdict_view(read_run(run))["trials"]}
    assert trials["trial-03"] == {"name": "trial-03", "label": "trial-03", "verdict": "balanced", "reasons": []}
    assert trials["trial-05"]["reasons"] == [] or "within" in trials["trial-05"]["reasons"][0]


def test_a_run_without_scores_still_shows_the_thresholds(tmp_path: Path) -> None:
    (tmp_path / "experiment.yaml").write_text("name: early\n")
    view = verdict_view(read_run(tmp_path))
    assert (view["models"], view["trials"], view["gates"]) == ([], [], [])
    assert view["thresholds"]

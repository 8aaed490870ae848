"""The first sentence of the page, and what it says of a run that has not come to its end."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from launcher.report import render
from launcher.report_data import read_run
from launcher.report_headline import headline, progress
from tests.helpers.run_folder import build_finished, build_running
from tests.launcher.test_audit_files import result as audit_result
from trainers.files import append_jsonl, read_json, write_json, write_text


@pytest.fixture(scope="module")
def template_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; only read and copied."""
    return build_finished(tmp_path_factory.mktemp("template") / "run")


@pytest.fixture
def run(template_run: Path, tmp_path: Path) -> Path:
    """A finished run that the test may change."""
    return Path(shutil.copytree(template_run, tmp_path / "run"))


def changed(run: Path, **results: Any) -> Path:
    """The same run with other results."""
    write_json(run / "results.json", read_json(run / "results.json") | results)
    return run


def test_it_names_the_delivered_model_its_score_and_the_paired_difference(template_run: Path) -> None:
    assert headline(read_run(template_run)) == (
        "The TIES merge of trial-03 and trial-06 is delivered: final score 0.703 [0.663, 0.743], +0.231 against its better parent "
        "(95 % interval +0.180 to +0.290)."
    )


def test_a_difference_that_may_be_chance_is_called_noise(run: Path) -> None:
    models = read_json(run / "results.json")["models"]
    models[-1]["difference_to_best_parent"]["final_score"] = {"difference": 0.05, "low": -0.046, "high": 0.101}
    assert headline(read_run(changed(run, models=models))).endswith("(95 % interval -0.046 to +0.101, so within noise).")
    models[-1]["difference_to_best_parent"]["final_score"] = {"difference": -0.05, "low": -0.1, "high": -0.01}
    assert "noise" not in headline(read_run(changed(run, models=models))), "clearly worse is no noise"
    models[-1]["difference_to_best_parent"]["final_score"] = {"difference": 0.0, "low": 0.0, "high": 0.0}
    assert headline(read_run(changed(run, models=models))).endswith("[0.663, 0.743], the same as its better parent's.")


def test_a_delivered_control_or_parent_is_called_by_what_it_is(run: Path) -> None:
    verdict = read_json(run / "results.json")["verdict"]
    assert headline(read_run(changed(run, verdict=verdict | {"winner": "linear"}))).startswith("Plain mean of both is delivered: final")
    parent = headline(read_run(changed(run, verdict=verdict | {"winner": "trial-03"})))
    assert parent.startswith("trial-03, the forgets more, is delivered: final score 0.384")
    assert "better parent" not in parent


def test_the_audit_has_the_second_clause(run: Path) -> None:
    assert ";" not in headline(read_run(run))
    write_json(run / "audit.json", audit_result())
    assert headline(read_run(run)).endswith("; the audit can bring some of it back (hidden).")
    write_json(run / "audit.json", {"verdict": "gone"})
    assert ";" not in headline(read_run(run)), "not a complete audit"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_running(tmp_path_factory.mktemp("running") / "run")


def test_progress_counts_what_was_asked_for_and_what_runs(running: Path, tmp_path: Path) -> None:
    """Three of four folders have ended; the configuration wants ten trials. The curve is further than the status."""
    run = Path(shutil.copytree(running, tmp_path / "run"))
    write_text(run / "experiment.yaml", "name: fake\nsweep: {num_trials: 10}\n")
    append_jsonl(run / "trials" / "trial-04" / "metrics.jsonl", {"step": 17, "loss": 1.0})
    state = progress(read_run(run))
    assert state is not None
    assert (state["ended"], state["total"], state["stage"]) == (3, 10, "running trials")
    assert state["running"] == [{"name": "trial-04", "step": 17, "num_steps": 40}]


def test_only_an_unfinished_page_looks_for_news(running: Path, template_run: Path) -> None:
    begun = render(read_run(running), plots={})
    assert '<noscript><meta http-equiv="refresh" content="30"></noscript>' in begun
    assert 'data-refresh="30"' in begun
    done = render(read_run(template_run), plots={})
    assert progress(read_run(template_run)) is None
    assert 'http-equiv="refresh"' not in done
    assert "data-refresh" not in done

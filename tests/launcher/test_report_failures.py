"""What went wrong is on the page with its cause, its number of starts and the end of its log; or it says that nothing did."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from launcher.report import render
from launcher.report_data import read_run
from launcher.report_failures import failures_view
from tests.helpers.run_folder import LOG_LINES, build_finished
from trainers.files import append_jsonl, read_json, write_json, write_text


@pytest.fixture(scope="module")
def template_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; only read and copied."""
    return build_finished(tmp_path_factory.mktemp("template") / "run")


@pytest.fixture
def run(template_run: Path, tmp_path: Path) -> Path:
    """A finished run that the test may change."""
    return Path(shutil.copytree(template_run, tmp_path / "run"))


def test_a_run_without_failures_says_so(run: Path) -> None:
    results = read_json(run / "results.json")
    results["trials"] = [trial | {"status": "finished", "error": None} for trial in results["trials"]]
    write_json(run / "results.json", results)
    assert failures_view(read_run(run))["none"]
    assert "None: all 8 trials finished at their first start" in render(read_run(run), plots={})


def test_failed_and_stopped_trials_have_cause_and_log(run: Path) -> None:
    view = failures_view(read_run(run))
    failed, stopped = view["trials"]
    assert (failed["name"], failed["error"], failed["log"]) == ("trial-07", "the loss is not finite at step 11", list(LOG_LINES))
    assert (stopped["name"], stopped["state"]) == ("trial-08", "stopped")
    assert view["counts"] == {"failed": 1, "stopped": 1}


def test_a_trial_that_finished_at_its_second_start_is_there_with_what_it_died_of(run: Path) -> None:
    status = read_json(run / "trials" / "trial-02" / "status.json")
    write_json(run / "trials" / "trial-02" / "status.json", status | {"errors": 1, "preemptions": 1, "micro_batch": 2})
    for kind, error in (("trial_started", None), ("trial_ended", "out of memory"), ("trial_started", None), ("trial_ended", None)):
        append_jsonl(run / "events.jsonl", {"kind": kind, "trial": "trial-02", "error": error})
    row = next(row for row in failures_view(read_run(run))["trials"] if row["name"] == "trial-02")
    assert (row["starts"], row["errors"], row["preemptions"], row["micro_batch"]) == (2, 1, 1, 2)
    assert row["earlier"] == ["out of memory"]
    assert row["cause"] == "", "it did not end that way"


def test_failed_measurements_and_stages_are_named(run: Path) -> None:
    pairs = read_json(run / "pairs.json")
    pairs["controls"][0]["error"] = "no memory at /home/someone/runs/x.safetensors"
    write_json(run / "pairs.json", pairs)
    append_jsonl(run / "events.jsonl", {"kind": "audit_failed", "iso": "2026-01-01T00:00:00+00:00", "error": "no room"})
    view = failures_view(read_run(run))
    assert [row["error"] for row in view["measurements"]] == ["no memory at …/x.safetensors"]
    assert view["events"] == ["2026-01-01T00:00:00+00:00: the audit failed (no room)"]


def test_logs_do_not_tell_the_folders_of_a_machine(run: Path) -> None:
    write_text(run / "trials" / "trial-07" / "logs" / "rank-0.log", 'File "/home/someone/code/loop.py", line 3\nratio 3/4 at 12:30\n')
    failed = failures_view(read_run(run))["trials"][0]
    assert failed["log"] == ['File "…/loop.py", line 3', "ratio 3/4 at 12:30"]

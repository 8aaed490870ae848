"""The state of a run, read from its files while it runs and after."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from launcher.console import Console
from launcher.status import print_status, status_dict
from tests.helpers.run_folder import LOG_LINES, build_finished, build_running
from trainers.errors import InputError


def printed(run: Path) -> str:
    stream = io.StringIO()
    print_status(run, console=Console(stream))
    return stream.getvalue()


def test_a_running_sweep_shows_stages_and_steps(tmp_path: Path) -> None:
    run = build_running(tmp_path / "run")
    status = status_dict(run)
    assert status["finished"] is False
    assert status["stages"] == {"memorize": "finished", "trials": "started"}
    assert status["counts"] == {"finished": 3, "running": 1}
    assert status["verdict"] is None
    text = printed(run)
    assert "fake: not finished" in text
    assert "memorize done, trials begun" in text
    assert "trial-04  running   step 12/40" in text


def test_a_finished_run_shows_verdicts_failures_and_places(tmp_path: Path) -> None:
    run = build_finished(tmp_path / "run")
    status = status_dict(run)
    assert status["finished"] is True
    assert status["counts"] == {"finished": 6, "failed": 1, "stopped": 1}
    failed = next(trial for trial in status["trials"] if trial["state"] == "failed")
    assert failed["last_lines"] == list(LOG_LINES)
    assert set(status["places"]) == {"results.json", "pairs.json", "merged/merge.json"}
    text = printed(run)
    assert "the loss is not finite at step 11" in text
    assert "verdict  The TIES merge of trial-03 and trial-06" in text
    assert text.isascii()


def test_a_trial_folder_without_status_is_pending(tmp_path: Path) -> None:
    run = build_running(tmp_path / "run")
    (run / "trials" / "trial-05").mkdir()
    assert status_dict(run)["counts"]["pending"] == 1


def test_reading_the_state_changes_nothing(tmp_path: Path) -> None:
    run = build_running(tmp_path / "run")
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    status_dict(run)
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*")) == before


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run folder"):
        status_dict(tmp_path)
    with pytest.raises(InputError, match="no such run folder"):
        print_status(tmp_path / "nowhere")

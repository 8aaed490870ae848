"""While a sweep runs another process rewrites its page; whatever happens to that process, the sweep does not notice."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import launcher.report_live as report_live
from launcher.events import EventLog
from launcher.report_live import live_report
from tests.helpers.run_folder import build_running

LIMIT_S = 60.0


@pytest.fixture(scope="module")
def template_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_running(tmp_path_factory.mktemp("template") / "run")


@pytest.fixture
def run(template_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(report_live, "LOOK_S", 0.05)
    monkeypatch.delenv(report_live.VARIABLE, raising=False)
    return Path(shutil.copytree(template_run, tmp_path / "run"))


def wait(until: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + LIMIT_S
    while not until() and time.monotonic() < deadline:
        time.sleep(0.05)
    return until()


def test_a_page_appears_while_the_sweep_runs_and_nothing_else(run: Path) -> None:
    before = {path.name for path in run.iterdir()}
    with live_report(run):
        assert wait((run / "report.html").exists)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "3 of 4 trials have ended" in page
    assert 'href="plots/' not in page
    assert {path.name for path in run.iterdir()} == before | {"report.html"}


def test_the_runs_own_report_is_left_alone(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that is still being drawn when the run begins its own report is given up."""
    started: list[list[str]] = []

    def slow(self: report_live._Watcher) -> object:
        started.append([sys.executable, "-c", f"import time; time.sleep(0.4); open({str(self.draft)!r}, 'w').write('stale')"])
        return report_live.subprocess.Popen(started[-1], start_new_session=True)

    monkeypatch.setattr(report_live._Watcher, "_start", slow)
    with live_report(run):
        assert wait(lambda: bool(started))
        EventLog(run).started("report")
        (run / "report.html").write_text("final")
        time.sleep(0.8)
    assert (run / "report.html").read_text() == "final"
    assert len(started) == 1


def test_a_page_that_cannot_be_drawn_disturbs_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def refuse(self: report_live._Watcher) -> object:
        tried.append(1)
        raise OSError("no process to be had")

    monkeypatch.setattr(report_live._Watcher, "_start", refuse)
    with live_report(run, every_s=0.01):
        EventLog(run).emit("trial_started", trial="trial-05")
        assert wait(lambda: len(tried) > 0)
    assert not (run / "report.html").exists()


def test_trials_that_end_quickly_do_not_draw_a_page_each(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten events at once and a minimum of an hour between two pages: one page."""
    drawn: list[int] = []
    monkeypatch.setattr(report_live._Watcher, "_start", lambda self: drawn.append(1))
    with live_report(run, every_s=3600.0):
        for _ in range(10):
            EventLog(run).emit("trial_ended", trial="trial-05")
        assert wait(lambda: bool(drawn))
        time.sleep(0.3)
    assert drawn == [1]


def test_the_environment_sets_the_interval_and_zero_draws_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that is no number is no reason to end a sweep."""
    monkeypatch.setattr(report_live._Watcher, "_start", lambda self: pytest.fail("a page was drawn"))
    monkeypatch.setenv(report_live.VARIABLE, "0")
    with live_report(run):
        time.sleep(0.2)
    assert not any(thread.name == "live-report" for thread in threading.enumerate())
    monkeypatch.setenv(report_live.VARIABLE, "soon")
    assert report_live._wanted() == report_live.EVERY_S
    monkeypatch.setenv(report_live.VARIABLE, "5")
    assert report_live._wanted() == 5

"""The event log decides what a resumed run still has to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.events import EventLog, stage_states


def test_an_event_carries_both_times_and_its_fields(tmp_path: Path) -> None:
    EventLog(tmp_path).emit("trial_finished", trial="trial-01", seconds=2.5)
    event = EventLog(tmp_path).events()[0]
    assert event["kind"] == "trial_finished"
    assert event["trial"] == "trial-01"
    assert event["time"] > 1.6e9
    assert event["iso"].endswith("+00:00")


def test_a_stage_is_finished_only_after_it_finished(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    assert not log.finished("memorize")
    log.started("memorize")
    assert not log.finished("memorize")
    log.finish("memorize", seconds=3.0)
    assert log.finished("memorize")
    assert not log.finished("trials")


def test_a_stage_begun_again_is_not_finished(tmp_path: Path) -> None:
    """A forced repetition that was killed must not count as done because an older one was."""
    log = EventLog(tmp_path)
    log.finish("merge")
    log.started("merge")
    assert not log.finished("merge")
    assert stage_states(log.events()) == {"merge": "started"}


def test_last_is_the_newest_that_matches(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    for seconds in (1, 2):
        log.emit("trial_finished", trial="trial-01", seconds=seconds)
    log.emit("trial_finished", trial="trial-02", seconds=3)
    found = log.last("trial_finished", trial="trial-01")
    assert found is not None
    assert found["seconds"] == 2
    assert log.last("trial_finished", trial="trial-09") is None
    assert log.last("trial_failed") is None


def test_a_torn_line_is_skipped_and_the_next_event_survives(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.finish("memorize")
    with open(log.path, "a", encoding="utf-8") as file:
        file.write('{"time": 1, "kind": "stage_fini')
    log.finish("trials")
    assert log.finished("memorize")
    assert log.finished("trials")
    assert len(log.events()) == 2


def test_no_log_means_no_events(tmp_path: Path) -> None:
    assert EventLog(tmp_path).events() == []


def test_fields_cannot_replace_the_time(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'time' is set by the log itself"):
        EventLog(tmp_path).emit("x", time=0)
    assert not EventLog(tmp_path).path.exists()

"""A log that grows is read once, whatever its writer does."""

from __future__ import annotations

from pathlib import Path

from launcher.tracking.tail import Tail
from trainers.files import append_jsonl, write_text


def test_every_line_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    append_jsonl(path, {"step": 1})
    append_jsonl(path, {"step": 2})
    assert tail.read() == [{"step": 1}, {"step": 2}]
    assert tail.read() == []
    append_jsonl(path, {"step": 3})
    assert tail.read() == [{"step": 3}]


def test_a_line_that_is_being_written_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    path.write_text('{"step": 1}\n{"st')
    assert tail.read() == [{"step": 1}]
    with open(path, "a") as file:
        file.write('ep": 2}\n')
    assert tail.read() == [{"step": 2}]


def test_a_line_torn_by_a_kill_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st')
    append_jsonl(path, {"step": 2})
    assert Tail(path).read() == [{"step": 1}, {"step": 2}]


def test_a_log_that_a_resumed_trial_rewrote_is_read_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    write_text(path, '{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    assert len(tail.read()) == 3
    write_text(path, '{"step": 1}\n')
    append_jsonl(path, {"step": 2})
    assert tail.read() == [{"step": 1}, {"step": 2}]

"""Two processes never work at the same place, and a dead one never keeps it."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from launcher.lock import hold
from trainers.errors import RunError

HOLDER = """
    import sys, time
    from pathlib import Path
    from launcher.lock import hold

    with hold(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(60)
"""


def holder(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(HOLDER), str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "run" / ".lock"
    process = holder(path)
    try:
        with pytest.raises(RunError, match="another process"), hold(path):
            raise AssertionError("two processes hold it")
    finally:
        process.kill()
        process.wait()
    with hold(path):
        pass


def test_a_holder_that_ends_in_time_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    process = holder(path)
    process.kill()
    started = time.monotonic()
    with hold(path, wait_s=30):
        assert time.monotonic() - started < 10
    process.wait()


def test_an_error_in_the_block_lets_go(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with pytest.raises(ZeroDivisionError), hold(path):
        raise ZeroDivisionError
    with hold(path):
        pass


def test_a_file_system_without_locks_is_used_unprotected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with hold(tmp_path / ".lock"), hold(tmp_path / ".lock"):
        pass

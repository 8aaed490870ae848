"""Starting and ending the process that follows a run, from the process that runs the sweep."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from launcher.console import Console
from launcher.tracking.config import TrackingConfig
from launcher.tracking.files import TrackingFiles
from launcher.tracking.mode import Mode

log = logging.getLogger(__name__)

FINISH_S = 20.0
"""Seconds that a finished sweep waits for its last rows and report to be written or uploaded."""
ABORT_S = 5.0
"""The same for a sweep that failed or was interrupted."""


@contextmanager
def following(run: Path, *, tracking: TrackingConfig, mode: Mode, console: Console) -> Iterator[None]:
    """Have another process write to the trackers what the run folder holds, while the block runs.

    Nothing that happens to that process, or to the network it talks to, reaches the block.
    """
    if mode == "off" and not tracking.tensorboard:
        yield
        return
    files = TrackingFiles(Path(run))
    process = _start(files, tracking=tracking, mode=mode)
    wait_s = ABORT_S
    try:
        yield
        wait_s = FINISH_S
    finally:
        if process is not None and not _end(process, wait_s=wait_s):
            console.warning(f"tracking has not finished (its log: {files.log}); `unlearn sync {run}` brings the rest")
        elif files.offline_folders():
            console.line(f"tracking is offline; to upload it:  unlearn sync {run}")


def catch_up(files: TrackingFiles, *, limit_s: float) -> bool:
    """Bring the trackers up to what the run folder holds; whether that worked."""
    process = spawn(files)
    return _end(process, wait_s=limit_s)


def _start(files: TrackingFiles, *, tracking: TrackingConfig, mode: Mode) -> subprocess.Popen[bytes] | None:
    try:
        files.write_settings(tracking, mode=mode)
        return spawn(files)
    except OSError as error:
        log.warning("tracking does not start: %s", error)
        return None


def spawn(files: TrackingFiles) -> subprocess.Popen[bytes]:
    """Start the following process; it ends when its standard input does."""
    with open(files.log, "ab") as output:
        # A session of its own: Ctrl-C is for the sweep, which ends its follower by closing the pipe.
        return subprocess.Popen(
            [sys.executable, "-m", "launcher.tracking.follow", str(files.run.resolve())],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _end(process: subprocess.Popen[bytes], *, wait_s: float) -> bool:
    """Whether the process ended well in time; nothing of it is left in any case."""
    assert process.stdin is not None
    process.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        return process.wait(timeout=wait_s) == 0
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return False

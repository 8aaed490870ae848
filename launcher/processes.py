"""Processes by id and time of birth, so that a number that has been given away again is never mistaken for its former owner."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

POLL_S = 0.05


@dataclass(frozen=True)
class Process:
    """A process of this machine: its id, and when it was born in the kernel's clock ticks (None where the system does not tell)."""

    pid: int
    born: int | None


def this_process() -> Process:
    """The calling process."""
    return Process(os.getpid(), _born(os.getpid()))


def is_alive(process: Process) -> bool:
    """Whether it still runs, or is stopped; one that has ended and waits for its parent does not count."""
    return process.born is not None and _born(process.pid) == process.born


def end_processes(processes: Sequence[Process], *, patience_s: float) -> int:
    """Wait until processes that were told to end are gone, then kill those that are not; how many that were."""
    deadline = time.monotonic() + patience_s
    while (left := [process for process in processes if is_alive(process)]) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    for process in left:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(process.pid, signal.SIGKILL)
    return len(left)


def _born(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat (man 5 proc), counted after the name, which may hold blanks; None for zombies and the dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])

"""Ends a process that shows no sign of life: a hung collective never returns to Python by itself."""

from __future__ import annotations

import faulthandler
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

log = logging.getLogger(__name__)
EXIT_CODE = 75
FIRST_SIGN_S = 600.0
"""Seconds that a trial has at least until its first sign of life: it loads its weights and its reference before."""


class Watchdog:
    """Within the block, ``alive`` must be called at least every ``stall_s`` seconds, or the process exits with code 75.

    The stack of every thread is printed before, so that the log tells where it hung.

    Args:
        stall_s: seconds without a sign of life.
        first_s: the same for the first one; null: no other.
        on_stall: called before the process ends, to leave a record.
    """

    def __init__(self, stall_s: float, *, first_s: float | None = None, on_stall: Callable[[], object] | None = None) -> None:
        self.stall_s, self.on_stall = stall_s, on_stall
        self._deadline = time.monotonic() + (stall_s if first_s is None else first_s)
        self._stop = threading.Event()

    def alive(self) -> None:
        """A sign of life."""
        self._deadline = time.monotonic() + self.stall_s

    def suspend(self) -> None:
        """No sign of life is expected until the next one: what follows may take long, and cannot hang."""
        self._deadline = math.inf

    def __enter__(self) -> Watchdog:
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.stall_s / 4)):
            if time.monotonic() > self._deadline:
                try:
                    log.error("no sign of life for %g s (sweep.stall_s): ending this process", self.stall_s)
                    faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr)
                    if self.on_stall is not None:
                        self.on_stall()
                finally:
                    os._exit(EXIT_CODE)

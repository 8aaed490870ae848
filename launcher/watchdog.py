"""Ends a process that shows no sign of life: a hung collective never returns to Python by itself."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from types import TracebackType

log = logging.getLogger(__name__)
EXIT_CODE = 75


class Watchdog:
    """Within the block, ``alive`` must be called at least every ``stall_s`` seconds, or the process exits with code 75.

    The stack of every thread is printed before, so that the log tells where it hung.
    """

    def __init__(self, stall_s: float) -> None:
        self.stall_s = stall_s
        self._last = time.monotonic()
        self._stop = threading.Event()

    def alive(self) -> None:
        """A sign of life."""
        self._last = time.monotonic()

    def __enter__(self) -> Watchdog:
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.stall_s / 4)):
            if time.monotonic() - self._last > self.stall_s:
                log.error("no sign of life for %g s (sweep.stall_s): ending this process", self.stall_s)
                faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr)
                os._exit(EXIT_CODE)

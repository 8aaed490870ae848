"""How far a long evaluation has come, for somebody who waits for it."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TextIO

_TERMINAL_EVERY_S = 0.5
_LOG_EVERY_S = 30.0


@dataclass
class Meter:
    """Shows rows done, rows per second and the time left: one changing line on a terminal, else a line now and then.

    Nothing is shown of an evaluation that ends before its first line would be due.

    Args:
        label: what the line begins with.
        stream: where it goes; default: standard error.
        every_s: seconds between two lines; default: half a second on a terminal, else 30.
    """

    label: str = "evaluation"
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    every_s: float | None = None
    _total: int = 0
    _total_cost: int = 0
    _done: int = 0
    _kept: int = 0
    _cost: int = 0
    _kept_cost: int = 0
    _started: float = 0.0
    _shown: float = 0.0
    _open_line: bool = False

    def start(self, *, rows: int, cost: int, rows_done: int = 0, cost_done: int = 0) -> None:
        """Begin; rows that an earlier process did count as done, but not for the speed.

        Args:
            rows: all rows.
            cost: what all of them take, in any unit.
            rows_done: rows that need not be done again.
            cost_done: what they would take.
        """
        self._total, self._total_cost = rows, cost
        self._done = self._kept = rows_done
        self._cost = self._kept_cost = cost_done
        self._started = self._shown = time.monotonic()

    def is_due(self) -> bool:
        """Whether it is time for the next line."""
        every = self.every_s if self.every_s is not None else _TERMINAL_EVERY_S if self._on_terminal else _LOG_EVERY_S
        return time.monotonic() - self._shown >= every

    def set(self, *, rows: int, cost: int) -> None:
        """So many rows are done, and cost so much; shown if it is time."""
        self._done, self._cost = rows, cost
        if self.is_due():
            self._shown = time.monotonic()
            self._write(self.text(self._shown - self._started))

    def finish(self) -> None:
        """End the line that was being rewritten, if there is one."""
        if self._open_line:
            self.stream.write("\n")
            self.stream.flush()
            self._open_line = False

    def text(self, seconds: float) -> str:
        """The line after so many seconds."""
        parts = [f"{self.label}: {self._done} of {self._total} rows"]
        if seconds > 0 and self._done > self._kept:
            parts.append(f"{(self._done - self._kept) / seconds:.1f} rows/s")
        if self._cost > self._kept_cost:
            left = seconds * (self._total_cost - self._cost) / (self._cost - self._kept_cost)
            parts.append(f"about {duration(left)} left")
        return ", ".join(parts)

    @property
    def _on_terminal(self) -> bool:
        return bool(getattr(self.stream, "isatty", lambda: False)())

    def _write(self, line: str) -> None:
        if self._on_terminal:
            self.stream.write(f"\r\x1b[K{line}")
            self._open_line = True
        else:
            self.stream.write(f"{line}\n")
        self.stream.flush()


def duration(seconds: float) -> str:
    """Seconds in words: 40 s, 3 min, 2 h 5 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"

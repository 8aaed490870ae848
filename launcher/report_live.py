"""Keeping the page of a running sweep up to date, by another process of the lowest priority.

``python -m launcher.report_live RUN FILE`` writes the page as it is now to FILE, without the files beside it.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from launcher.events import STAGE_STARTED, EventLog

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""Seconds between two looks at the run's log."""
EVERY_S = 30.0
"""Seconds between the beginnings of two pages at least, however fast trials end."""
VARIABLE = "UNLEARN_LIVE_REPORT_S"
"""Sets that number for the processes of a machine; 0 draws no page before the run's own."""
STALE_S = 300.0
"""Seconds after which a page is written anew although no trial has started or ended: curves have grown."""
_PAGE, _DRAFT = "report.html", ".report-live.html"


@contextmanager
def live_report(run: Path, *, every_s: float | None = None) -> Iterator[None]:
    """Rewrite ``RUN/report.html`` as trials start and end while the block runs; leave it alone once the run writes its own.

    Nothing that goes wrong here reaches the block, and nothing is left running after it.

    Args:
        run: the run folder.
        every_s: seconds between two pages at least, 0 for none; null: what the environment says, else half a minute.
    """
    interval = _wanted() if every_s is None else every_s
    if interval <= 0:
        yield
        return
    watcher = _Watcher(Path(run), every_s=interval)
    watcher.thread.start()
    try:
        yield
    finally:
        watcher.end()


def _wanted() -> float:
    try:
        return float(os.environ.get(VARIABLE, EVERY_S))
    except ValueError:
        log.warning("%s = %r is no number of seconds: %g are taken", VARIABLE, os.environ[VARIABLE], EVERY_S)
        return EVERY_S


class _Watcher:
    """Looks at the run's log and has a page drawn when it has grown."""

    def __init__(self, run: Path, *, every_s: float) -> None:
        self.run, self.every_s, self.log = run, every_s, EventLog(run)
        self.draft = run / _DRAFT
        self.reports = self._reports()
        self.seen: tuple[int, int] | None = None
        self.begun = float("-inf")
        self.process: subprocess.Popen[bytes] | None = None
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="live-report", daemon=True)

    def end(self) -> None:
        """Stop looking; a page that is being drawn is given up."""
        self.over.set()
        self.thread.join(timeout=10)
        self._give_up()

    def _watch(self) -> None:
        while not self.over.wait(LOOK_S):
            try:
                if self._reports() > self.reports:
                    self._give_up()
                    return
                self._look()
            except Exception as error:  # a page for people must not end a sweep
                log.debug("the live report was left out once: %s", error)

    def _look(self) -> None:
        if self.process is not None:
            state = self.process.poll()
            if state is None:
                return
            self.process = None
            # Asked again, because the run may have come to its own page while this one was drawn.
            if state == 0 and self._reports() == self.reports and not self.over.is_set():
                os.replace(self.draft, self.run / _PAGE)
        now, stamp = time.monotonic(), self._stamp()
        if stamp is not None and now - self.begun >= (self.every_s if stamp != self.seen else STALE_S):
            self.seen, self.begun = stamp, now
            self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        # A group of its own: Ctrl-C is for the sweep. No session, in which Linux would not weigh its low priority against the trials.
        return subprocess.Popen(
            [sys.executable, "-m", "launcher.report_live", str(self.run.resolve()), str(self.draft.resolve())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def _give_up(self) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None
        with suppress(OSError):
            for path in self.run.glob(f"*{_DRAFT[1:]}*"):
                path.unlink()

    def _stamp(self) -> tuple[int, int] | None:
        try:
            stat = self.log.path.stat()
        except OSError:
            return None
        return stat.st_size, stat.st_mtime_ns

    def _reports(self) -> int:
        """How often the run has begun to write its own report."""
        return sum(event["kind"] == STAGE_STARTED and event.get("stage") == "report" for event in self.log.events())


def draw(run: Path, file: Path) -> None:
    """Write the page of a run as it is now to a file; nothing beside it is written or linked."""
    from launcher.report import render
    from launcher.report_data import read_run
    from launcher.report_figures import report_figures
    from trainers.files import write_text

    data = read_run(run)
    write_text(file, render(data, plots=report_figures(data, files=False)))


if __name__ == "__main__":
    os.nice(19)
    draw(Path(sys.argv[1]), Path(sys.argv[2]))

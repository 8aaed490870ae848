"""The process that follows a run: it reads the run folder as it grows, and writes to the trackers what is new.

``python -m launcher.tracking.follow RUN`` works until its standard input ends, which it does when the sweep ends or dies. It may be killed
at any time: the run folder is the source of truth, and whatever the trackers hold already is not written again.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from launcher.lock import hold
from launcher.tracking.content import Facts, describe, facts_of, run_names, sources, step_values
from launcher.tracking.files import TrackingFiles, Written, run_identity
from launcher.tracking.tail import Tail
from launcher.tracking.tracker import OpenRun, Tracker

log = logging.getLogger(__name__)

POLL_S = 2.0
"""Seconds between two looks at the run folder."""
LAST_S = 60.0
"""Seconds after the end of the sweep in which the rest is written; then the process ends anyway."""
BEFORE_S = LAST_S + 10.0
"""Seconds to wait for an earlier process that still follows the run."""


class Follower:
    """Brings one tracker up to what the run folder holds.

    ``kept`` says what the tracker is sure to hold of each run: what it held when the run was opened, and all of it once it was closed.
    """

    def __init__(self, run: Path, *, tracker: Tracker, kept: Mapping[str, Written], tags: Sequence[str] = ()) -> None:
        self.run, self.tracker, self.kept, self.tags = run, tracker, dict(kept), tuple(tags)
        self._open: dict[str, OpenRun] = {}
        self._last_step: dict[str, int] = {}
        self._tails: dict[str, Tail] = {}
        self._stamps: dict[str, tuple[int, ...]] = {}

    def poll(self, *, over: bool = False) -> None:
        """Write what is new.

        Args:
            over: whether the sweep has ended, so that nothing more is to come and every open run is closed.
        """
        for name in run_names(self.run):
            # The facts before the rows: a trial that ends between the two has all of its rows by then.
            facts = facts_of(self.run, name, over=over) if over or self._changed(name) else None
            self._log_rows(name)
            if facts is not None and (name in self._open or self._kept(name).facts != facts.hash):
                self._close(name, facts)
            elif over and name in self._open:
                self._close(name, None)

    def _log_rows(self, name: str) -> None:
        if name not in self._tails:
            self._tails[name] = Tail(self.run / "trials" / name / "metrics.jsonl")
        rows = [step_values(line) for line in self._tails[name].read() if isinstance(line, dict)]
        rows = [row for row in rows if row.get("step", -1) > self._kept(name).last_step]
        if not rows:
            return
        run = self._opened(name)
        for row in rows:
            # A trial that is resumed repeats the steps since its last checkpoint.
            if row["step"] > self._last_step[name]:
                run.log([row])
                self._last_step[name] = int(row["step"])

    def _opened(self, name: str) -> OpenRun:
        if name not in self._open:
            run = self.tracker.open(describe(self.run, name, tags=self.tags), kept=self._kept(name))
            self._open[name], self.kept[name], self._last_step[name] = run, run.written, run.written.last_step
        return self._open[name]

    def _close(self, name: str, facts: Facts | None) -> None:
        self._opened(name).close(facts)
        del self._open[name]
        self.kept[name] = Written(last_step=self._last_step[name], facts=facts.hash if facts else self.kept[name].facts)

    def _kept(self, name: str) -> Written:
        return self.kept.get(name, Written())

    def _changed(self, name: str) -> bool:
        stamp = tuple(path.stat().st_mtime_ns if path.exists() else 0 for path in sources(self.run, name))
        if self._stamps.get(name) == stamp or not any(stamp):
            return False
        self._stamps[name] = stamp
        return True


class Following:
    """All trackers that a run's settings ask for. One that fails is given up; a later start brings it up to date."""

    def __init__(self, run: Path) -> None:
        self.files = TrackingFiles(run)
        self.kept = self.files.read_kept()
        self._followers: list[Follower] | None = None

    def poll(self, *, over: bool = False) -> None:
        """Look at the run folder once."""
        if self._followers is None:
            identity = run_identity(self.files.run)
            if identity is None:
                return
            self._followers = [
                Follower(self.files.run, tracker=tracker, kept=self.kept.get(tracker.name, {}), tags=tags)
                for tracker, tags in trackers_of(self.files, identity=identity)
            ]
        for follower in list(self._followers):
            try:
                follower.poll(over=over)
            except Exception:
                log.exception("%s is given up; `unlearn sync` or the next start of the sweep brings the rest", follower.tracker.name)
                self._followers.remove(follower)
            self._keep(follower)

    def _keep(self, follower: Follower) -> None:
        if follower.kept != self.kept.get(follower.tracker.name):
            self.kept[follower.tracker.name] = dict(follower.kept)
            self.files.write_kept(self.kept)


def trackers_of(files: TrackingFiles, *, identity: str) -> Iterator[tuple[Tracker, tuple[str, ...]]]:
    """The trackers that a run's settings ask for, each with the tags of its runs."""
    settings = files.read_settings()
    if settings is None:
        return
    tracking, mode = settings
    if mode != "off":
        from launcher.tracking.wandb_tracker import WandbTracker

        yield WandbTracker(files, tracking=tracking, mode=mode, identity=identity), tracking.tags
    if tracking.tensorboard:
        from launcher.tracking.tensorboard_tracker import TensorboardTracker

        yield TensorboardTracker(files.tensorboard), tracking.tags


def follow(run: Path) -> None:
    """Follow a run until standard input ends."""
    parent, over = os.getppid(), threading.Event()

    def wait_for_the_end() -> None:
        sys.stdin.buffer.read()
        over.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    following = Following(run)
    with hold(following.files.lock, wait_s=BEFORE_S):
        while not over.wait(POLL_S) and os.getppid() == parent:
            following.poll()
        limit = threading.Timer(LAST_S, os._exit, (1,))
        limit.daemon = True
        limit.start()
        following.poll(over=True)


def main(argv: Sequence[str]) -> None:
    """Follow the run folder that is the only argument."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    follow(Path(argv[0]))


if __name__ == "__main__":
    main(sys.argv[1:])

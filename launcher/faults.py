"""Asking a run to stop: a file in its folder that every trial looks at between its steps, and the signals that write it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from trainers.errors import UserFacingError
from trainers.files import write_text

STOP = ".stop"
INTERRUPTED = "interrupted"
SIGNALS = (signal.SIGINT, signal.SIGTERM)
FIRST_WORD = b"\nstopping: running trials write a checkpoint and end; once more to stop at once\n"


class Interrupted(UserFacingError):
    """The run was asked to stop and did (exit code 130)."""

    exit_code = 130
    label = "interrupted"


def stop_reason(run: Path | str) -> str | None:
    """Why the run is to stop, or None if it is to go on; one look at the file system."""
    try:
        return (Path(run) / STOP).read_text(encoding="utf-8").strip() or INTERRUPTED
    except OSError:
        return None


def request_stop(run: Path | str, reason: str) -> None:
    """Let every trial of the run write a checkpoint after the step it is at, and end as stopped for this reason."""
    write_text(Path(run) / STOP, f"{reason}\n")


def clear_stop(run: Path | str) -> None:
    """Take back what an earlier start of the run was asked."""
    with suppress(FileNotFoundError):
        (Path(run) / STOP).unlink()


@contextmanager
def stoppable(run: Path, *, on_stop: Callable[[], object] | None = None) -> Iterator[None]:
    """Within the block, the first Ctrl-C or SIGTERM asks the run's trials to stop, and the second interrupts at once.

    The block is expected to end by itself once no trial runs any more. Ray sets a handler of SIGTERM of its own, so it must have been
    started before. Outside of the main thread, where Python allows no handlers, signals are left alone.

    Args:
        run: the run's folder; what it was asked before is taken back.
        on_stop: called after the first signal, in a thread.

    Raises:
        Interrupted: at the end of the block, if there was a signal.
        KeyboardInterrupt: at the second signal.
    """
    clear_stop(run)
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt
        request_stop(run, INTERRUPTED)
        # Buffered output may be in the middle of a line of its own.
        os.write(2, FIRST_WORD)
        if on_stop is not None:
            threading.Thread(target=on_stop, daemon=True, name="stop").start()

    with _handled(handle):
        try:
            yield
        except Exception:
            if not received:
                raise
    if received:
        raise Interrupted(
            "the trials that ran have written checkpoints and ended", where=str(run), fix="run the same command again to go on"
        )


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)

"""What ends a trial's start, told apart by what has to follow."""

from __future__ import annotations

from trainers.errors import RunError, UserFacingError


class OutOfMemory(RunError):
    """A rank's GPU has no memory left: a smaller micro-batch may help."""


class Preempted(RunError):
    """A machine that the trial ran on was lost: the trial is not to blame."""


class TimedOut(RunError):
    """The trial took longer than it may."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU ran out of memory: torch says so by a class of its own, NCCL and DeepSpeed in words."""
    return isinstance(error, OutOfMemory) or (isinstance(error, RuntimeError) and "out of memory" in str(error).lower())


def reason_of(error: BaseException) -> str:
    """The word for an error in a trial's status."""
    if is_out_of_memory(error):
        return "out_of_memory"
    words = {Preempted: "preempted", TimedOut: "timeout"}
    return next((word for kind, word in words.items() if isinstance(error, kind)), "error")


def text_of(error: BaseException) -> str:
    """An error as a trial's status keeps it."""
    return str(error) if isinstance(error, UserFacingError) else f"{type(error).__name__}: {error}"

"""How the starts of a trial end, counted by cause in its status, and whether it is started again.

Tune starts a trial's process again whatever it died of, as often as ``restarts`` says. What counts is decided here, from the trial's
files, so that a lost machine uses up none of the starts that the trial's own errors may take.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from launcher.config import SweepConfig
from launcher.trial import TrialTask, read_status, settled, write_status
from launcher.trial_errors import Preempted, reason_of, text_of
from trainers.config import TrainConfig
from trainers.errors import RunError


def restarts(sweep: SweepConfig) -> int:
    """Starts after the first that a trial may need in one sweep at most, the one with a smaller micro-batch included."""
    return sweep.max_failures + sweep.max_preemptions + 1


def smaller_micro_batch(train: TrainConfig) -> int | None:
    """Half of the largest micro-batch that a rank meets, in pairs; None if that is a single pair already."""
    share = math.ceil(train.train_batch_size / train.engine.num_ranks)
    largest = min(train.micro_batch_size, share)
    return largest // 2 if largest > 1 else None


def begin(task: TrialTask, *, sweep: SweepConfig, session: str, nodes: Sequence[str], lost: Callable[[Sequence[str]], bool]) -> bool:
    """Record a start; whether the trial is to be computed.

    A start that left no record of its end died with its process, with its machine or alone.

    Args:
        task: the trial.
        sweep: how often it may be started.
        session: names this run of the sweep; what earlier ones used up does not count.
        nodes: ids of the machines that this start runs on.
        lost: whether one of some machines is gone.
    """
    status = read_status(task.folder)
    if status.get("session") != session:
        counts = {"errors": int(status.get("errors") or 0), "preemptions": int(status.get("preemptions") or 0)}
        write_status(task.folder, name=task.name, session=session, before=counts, **counts, retry=None, nodes=list(nodes))
        return True
    if status["state"] == "running":
        if lost(status.get("nodes") or ()):
            record(task, error=machine_lost(), sweep=sweep)
        else:
            record(task, error=RunError("the trial's process died", where=str(task.folder / "logs")), sweep=sweep)
    if settled(read_status(task.folder)):
        return False
    write_status(task.folder, nodes=list(nodes))
    return True


def machine_lost() -> Preempted:
    """The error of a start whose machine is gone."""
    return Preempted("a machine that the trial ran on was lost", fix="nothing: the trial goes on elsewhere, or when a machine is back")


def record(task: TrialTask, *, error: BaseException, sweep: SweepConfig, train: TrainConfig | None = None) -> bool:
    """Record that a start ended with an error; whether the trial is started again.

    Args:
        task: the trial.
        error: what it ended with.
        sweep: how often it may be started.
        train: the trial's configuration, if a smaller micro-batch may help.
    """
    status = read_status(task.folder)
    reason = reason_of(error)
    counts = {name: int(status.get(name) or 0) for name in ("errors", "preemptions")}
    before: dict[str, int] = status.get("before") or dict.fromkeys(counts, 0)
    changes: dict[str, Any] = {}
    counts["preemptions" if reason == "preempted" else "errors"] += 1
    if reason == "out_of_memory":
        smaller = smaller_micro_batch(train) if train is not None and status.get("micro_batch") is None else None
        again = smaller is not None
        if again:
            # The start that this costs is not one of those that other errors may take.
            changes = {"micro_batch": smaller, "before": before | {"errors": before["errors"] + 1}}
    elif reason == "preempted":
        again = counts["preemptions"] - before["preemptions"] <= sweep.max_preemptions
    else:
        again = counts["errors"] - before["errors"] <= sweep.max_failures
    retry = None if again else False
    write_status(task.folder, state="failed", reason=reason, error=text_of(error), ended=time.time(), retry=retry, **counts, **changes)
    return again

"""What a sweep's trials have taken, and whether that is all they may."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.config import BudgetConfig
from launcher.events import STAGE_FINISHED, STAGE_STARTED


@dataclass(frozen=True)
class Spent:
    """What the trials have taken over all starts of their sweep.

    Args:
        gpu_hours: hours times GPUs of all trials; hours times ranks where they run without GPUs.
        hours: wall-clock hours of the trials' stage.
    """

    gpu_hours: float
    hours: float


def used_up(budget: BudgetConfig, *, spent: Spent, unit: str = "GPU-hours") -> str | None:
    """In words which limit is reached; None if none is."""
    if budget.gpu_hours is not None and spent.gpu_hours >= budget.gpu_hours:
        return f"{spent.gpu_hours:.3g} of {budget.gpu_hours:g} {unit} (sweep.budget.gpu_hours)"
    if budget.hours is not None and spent.hours >= budget.hours:
        return f"{spent.hours:.3g} of {budget.hours:g} hours (sweep.budget.hours)"
    return None


def stage_seconds(events: Sequence[Mapping[str, Any]], *, stage: str, now: float) -> float:
    """Wall-clock seconds of a stage over all starts of a run.

    A start that was killed in it counts up to its last event; the last start, if it is in it, up to ``now``.

    Args:
        events: of the run, oldest first.
        stage: its name.
        now: unix time.
    """
    total, since, last = 0.0, None, 0.0
    for event in events:
        if since is not None and event["kind"] in (STAGE_STARTED, STAGE_FINISHED):
            ended = event["time"] if event["kind"] == STAGE_FINISHED else last
            total, since = total + max(0.0, ended - since), None
        if event["kind"] == STAGE_STARTED and event.get("stage") == stage:
            since = event["time"]
        last = event["time"]
    return total + (max(0.0, now - since) if since is not None else 0.0)


class BudgetClock:
    """Counts what is spent while trials run.

    Args:
        budget: the limits.
        share: GPUs of a trial, or its ranks where it has none.
        on_gpus: which of the two.
        seconds: what the trials that do not run have taken, by name; read anew each time.
        stage_s: wall-clock seconds of the stage so far.
    """

    def __init__(
        self,
        budget: BudgetConfig,
        *,
        share: float,
        on_gpus: bool,
        seconds: Callable[[], Mapping[str, float]],
        stage_s: Callable[[], float],
    ) -> None:
        self.budget, self.share, self.unit = budget, share, "GPU-hours" if on_gpus else "rank-hours"
        self.seconds, self.stage_s = seconds, stage_s
        self.running: dict[str, tuple[float, float]] = {}

    def started(self, name: str, *, now: float) -> None:
        """A trial begins, perhaps again."""
        self.running[name] = (now, self.seconds().get(name, 0.0))

    def ended(self, name: str) -> None:
        """A trial has ended; what it took stands in its status."""
        self.running.pop(name, None)

    def spent(self, *, now: float) -> Spent:
        """What has been taken until ``now``, unix time."""
        seconds = dict(self.seconds()) | {name: before + now - since for name, (since, before) in self.running.items()}
        return Spent(gpu_hours=sum(seconds.values()) * self.share / 3600, hours=self.stage_s() / 3600)

    def used_up(self, *, now: float) -> str | None:
        """In words which limit is reached; None if none is."""
        if self.budget.gpu_hours is None and self.budget.hours is None:
            return None
        return used_up(self.budget, spent=self.spent(now=now), unit=self.unit)

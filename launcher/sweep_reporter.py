"""Tune's events as console lines, statuses and events of the run."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.console import Console, Eta
from launcher.events import EventLog
from launcher.faults import request_stop, stop_reason
from launcher.logs import last_lines
from launcher.search.budget import BudgetClock
from launcher.search.source import TrialSource
from launcher.search_space import TrialSpec
from launcher.trial import ended, read_status, write_status
from launcher.trial_home import bring_events, bring_trial, fetch_trial
from trainers.config import TrainConfig
from trainers.errors import InputError

LOOK_EVERY_S = 2.0
"""Seconds between two looks at the budget; each reads all trials' statuses."""
WORDS = {
    "pruned": "pruned: others on its side forget and retain more",
    "budget": "the budget is used up; a larger one goes on here",
    "interrupted": "interrupted; the same command goes on here",
}


class SweepReporter:
    """Turns Tune's events into one console line, one status and one event each.

    Args:
        source: of the trials; it has been told which of them have ended.
        run: the run folder.
        console: where lines go.
        events: the run's log.
        concurrency: trials at the same time.
        cost: what a trial is expected to take.
        clock: counts what the trials take.
    """

    def __init__(
        self,
        source: TrialSource,
        *,
        run: Path,
        console: Console,
        events: EventLog,
        concurrency: int,
        cost: Callable[[TrainConfig], float],
        clock: BudgetClock,
    ) -> None:
        self.source, self.run, self.console, self.events, self.clock = source, Path(run), console, events, clock
        self.running: set[str] = set()
        self.started_at: dict[str, float] = {}
        self.seen_at, self.spent = -LOOK_EVERY_S, False
        over = [spec for spec in source.specs if ended(read_status(self.folder(spec.name)))]
        self.num_done, self.total = len(over), source.total
        # What a trial will cost is known where all trials are known beforehand.
        known = len(source.specs) == source.total
        self.cost: Callable[[TrialSpec], float] = (lambda spec: cost(spec.config)) if known else (lambda spec: 1.0)
        costs = sum(map(self.cost, source.specs)) if known else float(source.total)
        self.eta = Eta(total=costs - sum(map(self.cost, over)), concurrency=concurrency)

    def __getstate__(self) -> dict[str, Any]:
        # Tune writes its callbacks to a file that nobody reads; where the output goes to is not always something that can be written.
        return {}

    def folder(self, name: str) -> Path:
        """A trial's folder."""
        return self.run / "trials" / name

    def spec(self, name: str) -> TrialSpec:
        """A trial by its name."""
        return next(spec for spec in self.source.specs if spec.name == name)

    def start(self, name: str) -> None:
        """A trial begins, perhaps again."""
        again = name in self.started_at
        self.running.add(name)
        self.started_at[name] = time.time()
        self.clock.started(name, now=time.time())
        status = read_status(self.folder(name))
        counts = {key: int(status.get(key) or 0) for key in ("errors", "preemptions")}
        self.events.emit("trial_started", trial=name, again=again, **counts)
        if not again:
            self.console.trial_started(name, overrides=self.spec(name).overrides, running=len(self.running), total=self.total)

    def recover(self, name: str) -> None:
        """A start of a trial failed, and another one follows."""
        fetch_trial(self.run, name)
        status = read_status(self.folder(name))
        reason = str(status["error"]) if status["state"] == "failed" and status.get("error") else "its process died"
        self.clock.ended(name)
        self.console.trial_again(
            name, reason=reason, errors=int(status.get("errors") or 0), preemptions=int(status.get("preemptions") or 0)
        )

    def end(self, name: str) -> None:
        """A trial has ended by itself."""
        fetch_trial(self.run, name)
        status = read_status(self.folder(name))
        seconds = self._count(name, status=status)
        if status["state"] == "finished":
            headline = self._headline(name)
            self.console.trial_finished(
                name, headline=headline, seconds=seconds, done=self.num_done, total=self.total, eta_s=self.eta.remaining_s()
            )
        elif self._why_stopped(status) in WORDS:
            self.console.trial_stopped(
                name,
                reason=WORDS[self._why_stopped(status)],
                seconds=seconds,
                done=self.num_done,
                total=self.total,
                eta_s=self.eta.remaining_s() if stop_reason(self.run) is None else None,
            )
        else:
            self._failed(name, reason=str(status.get("error") or status["state"]))

    def error(self, name: str) -> None:
        """A trial's process has died for the last time."""
        fetch_trial(self.run, name)
        status = read_status(self.folder(name))
        if status["state"] in ("running", "pending"):
            errors = int(status.get("errors") or 0) + 1
            status = write_status(
                self.folder(name), state="failed", reason="error", error="the trial's process died", ended=time.time(), errors=errors
            )
            bring_trial(self.run, name)
        self._count(name, status=status)
        self._failed(name, reason=str(status.get("error")))

    def is_spent(self, *, patient: bool = False) -> bool:
        """Whether the budget is used up; says so once, and stops what runs if the budget wants that.

        Args:
            patient: whether an answer that is a few seconds old will do.
        """
        now = time.monotonic()
        if self.spent or (patient and now - self.seen_at < LOOK_EVERY_S):
            return self.spent
        self.seen_at = now
        reason = self.clock.used_up(now=time.time())
        if reason is None:
            return False
        self.spent = True
        self.events.emit("budget_used_up", reason=reason, running=sorted(self.running))
        what = "no other trial starts"
        if self.running and not self.clock.budget.finish_running:
            what = "the running trials stop with a checkpoint"
            if stop_reason(self.run) is None:
                request_stop(self.run, "budget")
        self.console.warning(f"the budget is used up: {reason}; {what}, and what has finished goes on to the pairs")
        return True

    def _count(self, name: str, *, status: dict[str, Any]) -> float:
        self.running.discard(name)
        self.clock.ended(name)
        seconds = float(status.get("seconds") or 0.0)
        if ended(status) or status["state"] == "failed":
            self.num_done += 1
            self.eta.finished(time.time() - self.started_at.get(name, time.time()), cost=self.cost(self.spec(name)))
        fields = {key: status.get(key) for key in ("state", "reason", "error", "errors", "preemptions")}
        self.events.emit("trial_ended", trial=name, seconds=seconds, **fields)
        bring_events(self.run)
        return seconds

    def _why_stopped(self, status: dict[str, Any]) -> str:
        """Also of a trial that was about to start when the run was asked to stop."""
        if status["state"] == "stopped":
            return str(status.get("reason"))
        return (stop_reason(self.run) or "") if status["state"] == "pending" else ""

    def _failed(self, name: str, *, reason: str) -> None:
        log = self.folder(name) / "logs" / "rank-0.log"
        self.console.trial_failed(name, reason=reason, log_path=log, last_lines=last_lines(log), done=self.num_done, total=self.total)

    def _headline(self, name: str) -> str:
        from eval.forgetting import classify
        from eval.report import read_report

        try:
            scores = read_report(self.folder(name) / "validation.json").scores
        except InputError as error:  # a line for people must not end the trial's record in Tune
            return error.what
        baseline = read_report(self.run / "baseline" / "validation.json").scores
        verdict = classify(scores=scores, baseline=baseline).verdict
        numbers = ((key, scores.get(key)) for key in ("forgetting", "retention", "mia_auc"))
        text = ", ".join(f"{'AUC' if key == 'mia_auc' else key} {value:.2f}" for key, value in numbers if value is not None)
        return f"{verdict}: {text}"

    def callback(self) -> Any:
        """A Tune callback that calls the methods above."""
        from ray.tune import Callback

        reporter = self

        class Relay(Callback):
            def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
                reporter.start(trial.config["task"]["name"])

            def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
                reporter.recover(trial.config["task"]["name"])

            def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
                reporter.end(trial.config["task"]["name"])

            def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
                reporter.error(trial.config["task"]["name"])

            def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
                reporter.is_spent(patient=True)

        return Relay()

"""Ray Tune runs the trials: one process for a trial of one rank, a gang of actors for a trial of several.

What a trial computes and how it resumes is decided by its files;
Tune decides when and where it runs.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from launcher.config import ExperimentConfig
from launcher.console import Console, Eta
from launcher.events import EventLog
from launcher.logs import capture_output, last_lines, quiet_libraries
from launcher.resources import ResourcePlan
from launcher.search_space import TrialSpec
from launcher.trial import ENDED, TrialTask, load_plan, read_status, run_trial, write_status
from trainers.errors import SetupError

REPORT_EVERY_S = 2.0
"""Seconds between two reports of a trial to Tune at least; every report costs its driver a round."""


def start_ray(*, cpus: int) -> dict[str, float]:
    """Connect to the cluster in RAY_ADDRESS, or start a private one on this machine; its resources.

    Raises:
        SetupError: if neither works.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Tune's own handler ends the trials on Ctrl-C and returns as if they had finished; the run must stop instead.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
    import logging

    import ray

    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        raise SetupError(
            f"Ray does not start: {str(error).splitlines()[0]}",
            where=f"RAY_ADDRESS={address}" if address else "this machine",
            fix="unlearn doctor tells more" + (", or unset RAY_ADDRESS to compute on this machine only" if address else ""),
        ) from error
    return dict(ray.cluster_resources())


def stop_ray() -> None:
    """Disconnect; a private cluster ends with it."""
    import ray

    if ray.is_initialized():
        ray.shutdown()


def waiting_tasks(specs: Sequence[TrialSpec], *, run: Path) -> list[TrialTask]:
    """The trials that have not ended yet, failed ones among them."""
    tasks = [TrialTask(run=str(Path(run).resolve()), name=spec.name) for spec in specs]
    return [task for task in tasks if read_status(task.folder)["state"] not in ENDED]


def run_sweep_trials(
    specs: Sequence[TrialSpec], *, run: Path, config: ExperimentConfig, plan: ResourcePlan, console: Console, events: EventLog
) -> None:
    """Run every trial that has not ended yet; one that fails is recorded and the others go on.

    Ray must have been started.
    """
    from ray import tune

    waiting = waiting_tasks(specs, run=run)
    if not waiting:
        return
    # Tune's own records are of no use later: a trial's state lies in its folder. A sweep that was killed has left them behind.
    scratch = Path(run).resolve() / ".tune"
    shutil.rmtree(scratch, ignore_errors=True)
    reporter = _Reporter(
        {spec.name: spec for spec in specs},
        run=run,
        console=console,
        events=events,
        concurrency=plan.concurrent,
        done=len(specs) - len(waiting),
        waiting=[task.name for task in waiting],
    )
    trainable = tune.with_resources(_tune_trial, tune.PlacementGroupFactory(plan.bundles, strategy="PACK"))
    try:
        tune.Tuner(
            trainable,
            param_space={
                "task": tune.grid_search([{"run": task.run, "name": task.name} for task in waiting]),
                "ranks": plan.ranks,
                "stall_s": config.sweep.stall_s,
            },
            tune_config=tune.TuneConfig(
                max_concurrent_trials=plan.concurrent,
                trial_name_creator=lambda trial: trial.config["task"]["name"],
                trial_dirname_creator=lambda trial: f"{trial.config['task']['name']}-{trial.trial_id}",
                reuse_actors=plan.ranks == 1,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(scratch),
                callbacks=[reporter.callback()],
                failure_config=tune.FailureConfig(max_failures=config.sweep.max_failures),
                verbose=0,
            ),
        ).fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for task in waiting:
        if read_status(task.folder)["state"] in ("running", "pending"):
            write_status(task.folder, state="failed", error="the trial's process ended without a result", ended=time.time())


def _tune_trial(config: dict[str, Any]) -> None:
    """One trial inside Tune's process: computes itself, or leads a gang of ranks."""
    from ray import tune

    task = TrialTask(**config["task"])
    last_report = 0.0
    metrics_stream: Iterator[dict[str, Any]]
    if config["ranks"] == 1:
        metrics_stream = _solo(task, stall_s=config["stall_s"])
    else:
        from launcher.gang import run_gang

        metrics_stream = run_gang(task, ranks=config["ranks"], stall_s=config["stall_s"])
    try:
        for metrics in metrics_stream:
            if time.monotonic() - last_report >= REPORT_EVERY_S:
                last_report = time.monotonic()
                tune.report({"step": metrics["step"], "loss": metrics["loss"]})
    except Exception as error:
        if read_status(task.folder)["state"] in ("running", "pending"):
            write_status(task.folder, state="failed", error=str(error), ended=time.time())
        raise
    tune.report({"step": read_status(task.folder).get("step") or 0, "state": read_status(task.folder)["state"]})


def _solo(task: TrialTask, *, stall_s: float) -> Iterator[dict[str, Any]]:
    from launcher.watchdog import Watchdog

    def stalled() -> None:
        write_status(task.folder, state="failed", error=f"no sign of life for {stall_s:g} s (sweep.stall_s)", ended=time.time())

    with capture_output(task.folder / "logs" / "rank-0.log"):
        quiet_libraries()
        set_threads(task)
        with Watchdog(stall_s, on_stall=stalled) as watchdog:
            for metrics in run_trial(task):
                watchdog.alive()
                yield metrics
                if metrics.get("state") == "evaluating":
                    watchdog.suspend()


def set_threads(task: TrialTask) -> None:
    """As many compute threads as each rank has cores, whatever the environment says: two trials must not fight for the same ones."""
    import torch

    torch.set_num_threads(max(1, int(load_plan(task.run)[0].sweep.cpus_per_rank)))


class _Reporter:
    """Turns Tune's events into one console line, one status and one event each."""

    def __init__(
        self, specs: dict[str, TrialSpec], *, run: Path, console: Console, events: EventLog, concurrency: int, done: int, waiting: list[str]
    ) -> None:
        self.specs, self.run, self.console, self.events = specs, run, console, events
        self.running: set[str] = set()
        self.num_done, self.total = done, len(specs)
        self.eta = Eta(total=len(waiting), concurrency=concurrency)
        self.started_at: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Tune writes its callbacks to a file that nobody reads; where the output goes to is not always something that can be written.
        return {}

    def folder(self, name: str) -> Path:
        return self.run / "trials" / name

    def start(self, name: str) -> None:
        again = name in self.started_at
        self.running.add(name)
        self.started_at[name] = time.time()
        self.events.emit("trial_started", trial=name, again=again)
        if not again:
            self.console.trial_started(name, overrides=self.specs[name].overrides, running=len(self.running), total=self.total)

    def end(self, name: str) -> None:
        self.running.discard(name)
        status = read_status(self.folder(name))
        seconds = float(status.get("seconds") or 0.0)
        self.num_done += 1
        self.eta.finished(time.time() - self.started_at.get(name, time.time()))
        self.events.emit("trial_ended", trial=name, state=status["state"], error=status.get("error"), seconds=seconds)
        if status["state"] == "finished":
            self.console.trial_finished(
                name, headline=self._headline(name), seconds=seconds, done=self.num_done, total=self.total, eta_s=self.eta.remaining_s()
            )
        else:
            self._failed(name, reason=str(status.get("error") or status["state"]))

    def error(self, name: str) -> None:
        self.running.discard(name)
        status = read_status(self.folder(name))
        if status["state"] in ("running", "pending"):
            status = write_status(self.folder(name), state="failed", error="the trial's process died", ended=time.time())
        self.num_done += 1
        self.events.emit("trial_ended", trial=name, state=status["state"], error=status.get("error"))
        self._failed(name, reason=str(status.get("error")))

    def _failed(self, name: str, *, reason: str) -> None:
        log = self.folder(name) / "logs" / "rank-0.log"
        self.console.trial_failed(name, reason=reason, log_path=log, last_lines=last_lines(log), done=self.num_done, total=self.total)

    def _headline(self, name: str) -> str:
        from eval.forgetting import classify
        from eval.report import read_report

        scores = read_report(self.folder(name) / "validation.json").scores
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

            def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
                reporter.end(trial.config["task"]["name"])

            def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
                reporter.error(trial.config["task"]["name"])

        return Relay()

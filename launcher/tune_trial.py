"""A trial inside the process that Tune gives it: computes itself, or leads a gang of ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.attempts import begin, record
from launcher.config import SweepConfig
from launcher.faults import stop_reason
from launcher.logs import capture_output, quiet_libraries
from launcher.plugins import use_run_plugins
from launcher.stop_signs import signs_read
from launcher.trial import PLAN, TrialTask, load_plan, read_status, run_trial, settled, trial_config
from launcher.trial_home import arrived, bring_trial, carried, fetch_trial
from trainers.config import TrainConfig
from trainers.errors import RunError
from trainers.files import read_json

REPORT_EVERY_S = 2.0
"""Seconds between two reports of a trial to Tune at least; every report costs its driver a round."""


def tune_trial(config: dict[str, Any]) -> None:
    """One trial inside Tune's process; raises only what starting it again may mend."""
    from ray import tune

    task = arrived(TrialTask(**config["task"]))
    sweep, train = trial_settings(task)
    try:
        if stop_reason(task.run) is None and _begin(task, sweep=sweep):
            bring_trial(task.run, task.name)
            with signs_read(task.run, trial=task.name):
                _compute(task, ranks=config["ranks"], sweep=sweep, train=train)
    finally:
        bring_trial(task.run, task.name)
    status = read_status(task.folder)
    tune.report({"step": status.get("step") or 0, "state": status["state"]})


def trial_settings(task: TrialTask) -> tuple[SweepConfig, TrainConfig]:
    """What the run's plan says about sweep and trial, without reading any data."""
    use_run_plugins(task.run)
    plan = read_json(Path(task.run) / PLAN)
    return SweepConfig.model_validate(plan["experiment"]["sweep"]), trial_config(task, plan=plan)


def _begin(task: TrialTask, *, sweep: SweepConfig) -> bool:
    import ray
    from ray import tune

    from launcher.node_loss import lost_nodes

    here = ray.get_runtime_context().get_node_id()
    session = str(tune.get_context().get_trial_id())
    return begin(task, sweep=sweep, session=session, nodes=[here], lost=lambda nodes: bool(lost_nodes(nodes)))


def _compute(task: TrialTask, *, ranks: int, sweep: SweepConfig, train: TrainConfig) -> None:
    from ray import tune

    task = replace(task, micro_batch=read_status(task.folder).get("micro_batch"))
    stream: Iterator[dict[str, Any]]
    if ranks == 1:
        stream = _solo(task, sweep=sweep, train=train)
    else:
        from launcher.gang import run_gang

        stream = run_gang(task, ranks=ranks, stall_s=sweep.stall_s)
    last_report = 0.0
    try:
        for metrics in stream:
            # Tune's scheduler has judged a report when this call returns: a trial that is to stop then sees it before its next step.
            if "signals" in metrics or time.monotonic() - last_report >= REPORT_EVERY_S:
                last_report = time.monotonic()
                names = ("step", "loss", "epoch", "num_steps", "signals")
                tune.report({name: metrics[name] for name in names if name in metrics})
        fetch_trial(task.run, task.name)
    except Exception as error:
        fetch_trial(task.run, task.name)
        if settled(read_status(task.folder)):
            return
        if record(task, error=error, sweep=sweep, train=train):
            raise


def _solo(task: TrialTask, *, sweep: SweepConfig, train: TrainConfig) -> Iterator[dict[str, Any]]:
    from launcher.watchdog import FIRST_SIGN_S, Watchdog

    patience_s = max(sweep.stall_s, FIRST_SIGN_S)

    def stalled() -> None:
        record(task, error=RunError(f"no sign of life for {patience_s:g} s (sweep.stall_s)"), sweep=sweep, train=train)

    with capture_output(task.folder / "logs" / "rank-0.log"):
        quiet_libraries()
        set_threads(task)
        with Watchdog(sweep.stall_s, first_s=patience_s, on_stall=stalled) as watchdog:
            for metrics in carried(task, run_trial(task)):
                watchdog.alive()
                patience_s = sweep.stall_s
                yield metrics
                if metrics.get("state") == "evaluating":
                    watchdog.suspend()


def set_threads(task: TrialTask) -> None:
    """As many compute threads as each rank has cores, whatever the environment says: two trials must not fight for the same ones."""
    import torch

    torch.set_num_threads(max(1, int(load_plan(task.run)[0].sweep.cpus_per_rank)))

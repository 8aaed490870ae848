"""Ray Tune runs the trials: one process for a trial of one rank, a gang of actors for a trial of several.

What a trial computes and how it resumes is decided by its files;
Tune decides when and where it runs.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.attempts import restarts
from launcher.config import ExperimentConfig
from launcher.console import Console
from launcher.events import EventLog
from launcher.faults import request_stop, stop_reason
from launcher.resources import ResourcePlan
from launcher.search.budget import BudgetClock, stage_seconds
from launcher.search.rungs import RungBook
from launcher.search.source import FixedSource, TrialSource, epochs_cost, outcome_of
from launcher.search.tune_search import tune_scheduler, tune_searcher
from launcher.search_space import SearchSpace, TrialSpec
from launcher.stop_signs import signs_sent
from launcher.sweep_reporter import SweepReporter
from launcher.trial import ended, read_status, write_status
from launcher.tune_keys import keep_keys_out_of_trials
from launcher.tune_trial import tune_trial
from trainers.config import TrainConfig
from trainers.files import read_json

BUDGET = "budget"
"""The reason for which trials are stopped when nothing is left to spend."""


def trial_source(
    specs: tuple[TrialSpec, ...],
    *,
    run: Path,
    config: ExperimentConfig,
    space: SearchSpace,
    cost: Callable[[TrainConfig], float] = epochs_cost,
) -> TrialSource:
    """Where the trials of a sweep come from.

    Args:
        specs: the trials that are known beforehand; with ``sweep.search: optuna`` the source finds them by itself.
        run: the run folder.
        config: the experiment.
        space: what is searched.
        cost: what a trial is expected to take; the dearest starts first.
    """
    if config.sweep.search == "optuna":
        from launcher.search.optuna_source import OptunaSource

        return OptunaSource(run, config=config, space=space)
    return FixedSource(specs, cost=cost)


def has_work(source: TrialSource, *, run: Path) -> bool:
    """Whether a trial has not ended yet, or may still be proposed."""
    return len(source.specs) < source.total or any(not ended(read_status(_folder(run, spec.name))) for spec in source.specs)


def run_sweep_trials(
    source: TrialSource,
    *,
    run: Path,
    config: ExperimentConfig,
    plan: ResourcePlan,
    console: Console,
    events: EventLog,
    prepare: Callable[[tuple[TrialSpec, ...]], object],
    cost: Callable[[TrainConfig], float] = epochs_cost,
) -> tuple[TrialSpec, ...]:
    """Run every trial that has not ended yet, until budget or trials are used up; one that fails is recorded and the others go on.

    Ray must have been started.

    Args:
        source: of the trials.
        run: the run folder.
        config: the experiment.
        plan: what each trial gets.
        console: where lines go.
        events: the run's log.
        prepare: writes what the processes of all these trials read; called again when there is a new one.
        cost: what a trial is expected to take.

    Returns:
        The trials that exist now.
    """
    for spec in source.specs:
        source.tell(spec.name, outcome_of(_folder(run, spec.name)))
    clock = budget_clock(source, run=run, config=config, plan=plan, events=events)
    reporter = SweepReporter(source, run=run, console=console, events=events, concurrency=plan.concurrent, cost=cost, clock=clock)
    asked: dict[str, TrialSpec] = {}

    def prepare_one(spec: TrialSpec) -> None:
        asked[spec.name] = spec
        if not (_folder(run, spec.name) / "config.yaml").exists():
            prepare(source.specs)

    def is_over() -> bool:
        return stop_reason(run) is not None or reporter.is_spent()

    searcher = tune_searcher(
        source,
        run=run,
        settings={"ranks": plan.ranks, "stall_s": config.sweep.stall_s},
        prepare=prepare_one,
        is_over=is_over,
        concurrency=plan.concurrent,
    )
    with signs_sent(run):
        _fit(searcher, run=run, config=config, plan=plan, reporter=reporter)
    for name in asked:
        folder = _folder(run, name)
        if stop_reason(run) is None and read_status(folder)["state"] in ("running", "pending"):
            write_status(folder, state="failed", reason="error", error="the trial's process ended without a result", ended=time.time())
            source.tell(name, outcome_of(folder))
    return source.specs


def budget_clock(source: TrialSource, *, run: Path, config: ExperimentConfig, plan: ResourcePlan, events: EventLog) -> BudgetClock:
    """What the trials of a run have taken over all its starts, and go on taking."""
    earlier = stage_seconds(events.events(), stage="trials", now=time.time())
    since = time.time()
    return BudgetClock(
        config.sweep.budget,
        share=plan.gpus_per_trial or plan.ranks,
        on_gpus=plan.gpus_per_trial > 0,
        seconds=lambda: {spec.name: float(read_status(_folder(run, spec.name)).get("seconds") or 0.0) for spec in source.specs},
        stage_s=lambda: earlier + time.time() - since,
    )


def _fit(searcher: Any, *, run: Path, config: ExperimentConfig, plan: ResourcePlan, reporter: SweepReporter) -> None:
    from ray import tune

    keep_keys_out_of_trials()
    # Tune's own records are of no use later: a trial's state lies in its folder. A sweep that was killed has left them behind.
    scratch = Path(run).resolve() / ".tune"
    shutil.rmtree(scratch, ignore_errors=True)
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "3600")
    try:
        tune.Tuner(
            tune.with_resources(tune_trial, tune.PlacementGroupFactory(plan.bundles, strategy=plan.strategy)),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                num_samples=-1,
                scheduler=rung_scheduler(run, config=config),
                trial_name_creator=lambda trial: trial.config["task"]["name"],
                trial_dirname_creator=lambda trial: f"{trial.config['task']['name']}-{trial.trial_id}",
                reuse_actors=plan.ranks == 1,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(scratch),
                callbacks=[reporter.callback()],
                failure_config=tune.FailureConfig(max_failures=restarts(config.sweep)),
                verbose=0,
            ),
        ).fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def rung_scheduler(run: Path, *, config: ExperimentConfig) -> Any:
    """Tune's scheduler for a run: it stops trials only if ``sweep.rungs`` says where."""
    book = None
    if config.sweep.rungs is not None:
        book = RungBook(run, rungs=config.sweep.rungs, baseline=read_json(Path(run) / "baseline" / "validation.json")["scores"])

    def may_win(name: str) -> bool:
        return read_status(_folder(run, name))["state"] in ("pending", "running", "finished")

    return tune_scheduler(book, stop=lambda name: request_stop(_folder(run, name), "pruned"), may_win=may_win)


def _folder(run: Path, name: str) -> Path:
    return Path(run) / "trials" / name

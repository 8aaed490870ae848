"""One trial of a sweep from its files to its files: train, evaluate what was saved, write the status last."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.config import ExperimentConfig
from launcher.data import PreparedData, prepare_data
from launcher.lock import hold
from trainers.config import TrainConfig
from trainers.errors import RunError, UserFacingError
from trainers.files import read_json, write_json

if TYPE_CHECKING:
    from trainers.distributed import Rank
    from trainers.loop import TrialInputs

PLAN = "sweep.json"
ENDED = ("finished", "stopped")
"""States in which a trial has nothing left to do."""
ORPHAN_S = 120.0
"""Seconds to wait for a process that still computes the trial: the ranks of a sweep that was killed end within a minute."""


@dataclass(frozen=True)
class TrialTask:
    """What one process needs to know to run a trial: it reads the rest from the run folder."""

    run: str
    name: str

    @property
    def folder(self) -> Path:
        """The trial's folder."""
        return Path(self.run) / "trials" / self.name


def write_plan(run: Path, *, config: ExperimentConfig, trials: dict[str, dict[str, Any]], target: Path, target_hash: str) -> None:
    """Write what every trial process reads: the resolved experiment, each trial's configuration, and the target."""
    write_json(
        run / PLAN,
        {
            "schema_version": 1,
            "experiment": _with_absolute_paths(config.model_dump(mode="json")),
            "trials": trials,
            "target": str(target.resolve()),
            "target_hash": target_hash,
        },
    )


def _with_absolute_paths(experiment: dict[str, Any]) -> dict[str, Any]:
    """A trial's process has a working folder of its own. What is not a path here (a hub id) stays as it is."""
    data = dict(experiment["data"])
    for key in ("path", "forget", "retain", "mia", "mmlu"):
        if data[key] is not None and Path(data[key]).exists():
            data[key] = str(Path(data[key]).resolve())
    return experiment | {"data": data}


@lru_cache(maxsize=2)
def _read_plan(run: str, stamp: float) -> tuple[ExperimentConfig, dict[str, Any], PreparedData]:
    plan = read_json(Path(run) / PLAN)
    config = ExperimentConfig.model_validate(plan["experiment"])
    return config, plan, prepare_data(config)


def load_plan(run: str) -> tuple[ExperimentConfig, dict[str, Any], PreparedData]:
    """The experiment, the plan and the prepared data; kept between trials that share a process."""
    return _read_plan(run, (Path(run) / PLAN).stat().st_mtime)


def trial_inputs(*, run: Path, data: PreparedData, target: Path, target_hash: str) -> TrialInputs:
    """What the training side reads; its signals are measured on the validation fold."""
    from trainers.loop import TrialInputs

    return TrialInputs(
        target=target,
        target_hash=target_hash,
        train=data.training,
        validation=data.folds["validation"],
        attack=data.attack_of("validation"),
        reference_root=run / "reference",
    )


def read_status(folder: Path) -> dict[str, Any]:
    """A trial's status, or that it is pending."""
    path = Path(folder) / "status.json"
    return read_json(path) if path.exists() else {"name": Path(folder).name, "state": "pending"}


def write_status(folder: Path, **changes: Any) -> dict[str, Any]:
    """Update a trial's status file."""
    status = read_status(folder) | changes
    write_json(Path(folder) / "status.json", status)
    return status


def settled(status: Mapping[str, Any]) -> bool:
    """Whether starting the trial again within the same sweep would change nothing."""
    return status["state"] in ENDED or (status["state"] == "failed" and status.get("retry") is False)


def fail_for_good(folder: Path, *, error: UserFacingError) -> None:
    """Record a failure that starting the trial again would repeat."""
    write_status(folder, state="failed", error=str(error), ended=time.time(), retry=False)


def run_trial(task: TrialTask, *, rank: Rank | None = None) -> Iterator[dict[str, Any]]:
    """Run or resume one trial on one rank, yielding its metrics; rank 0 evaluates at the end and writes the files.

    Before it evaluates, which no other rank takes part in and which may take long, rank 0 yields its last metrics once more, with
    ``"state": "evaluating"``.

    A loss that is not finite ends the trial as ``stopped``; bad input ends it as ``failed``. Neither is raised on rank 0, because starting
    the trial again would change nothing. Everything else is recorded as ``failed`` and raised; other ranks record nothing and raise all.
    """
    from trainers.distributed import Rank

    rank = rank or Rank()
    # A sweep that was killed may have left a process behind that lives on for some seconds.
    with hold(task.folder / ".lock", wait_s=ORPHAN_S) if rank.rank == 0 else nullcontext():
        if rank.rank > 0 or read_status(task.folder)["state"] not in ENDED:
            yield from _run_trial(task, rank=rank)


def _run_trial(task: TrialTask, *, rank: Rank) -> Iterator[dict[str, Any]]:
    from trainers.loop import DivergedError, train_worker

    leads = rank.rank == 0
    started = time.time()
    before = float(read_status(task.folder).get("seconds") or 0.0)

    def note(**changes: Any) -> None:
        if leads:
            write_status(task.folder, seconds=round(before + time.time() - started, 2), **changes)

    note(name=task.name, state="running", error=None, started=started, ended=None, retry=None)
    metrics: dict[str, Any] = {}
    try:
        config, plan, data = load_plan(task.run)
        train = TrainConfig.model_validate(plan["trials"][task.name]["train"])
        inputs = trial_inputs(run=Path(task.run), data=data, target=Path(plan["target"]), target_hash=plan["target_hash"])
        for metrics in train_worker(train=train, inputs=inputs, trial=task.folder, rank=rank):
            if "signals" in metrics or metrics["step"] == metrics["num_steps"]:
                note(step=metrics["step"], num_steps=metrics["num_steps"])
            yield metrics
            limit = config.sweep.trial_timeout_s
            if leads and limit is not None and time.time() - started > limit:
                raise RunError(f"the trial ran for more than {limit:g} s", where="sweep.trial_timeout_s", fix="raise it, or train less")
        if leads:
            yield {name: value for name, value in metrics.items() if name != "signals"} | {"state": "evaluating"}
            _evaluate_trial(task, config=config, data=data, target=Path(plan["target"]), device=rank.device)
            note(state="finished", ended=time.time())
    except DivergedError as error:
        note(state="stopped", error=f"{error.what}; {error.fix}" if error.fix else error.what, ended=time.time())
    except UserFacingError as error:
        if not leads:
            raise
        note()
        fail_for_good(task.folder, error=error)
    except Exception as error:
        note(state="failed", error=f"{type(error).__name__}: {error}", ended=time.time())
        raise


def _evaluate_trial(task: TrialTask, *, config: ExperimentConfig, data: PreparedData, target: Path, device: str) -> None:
    from launcher.scoring import evaluate_folds
    from trainers.checkpoint import finished_checkpoints
    from trainers.modeling import load_adapted_model, load_tokenizer

    model = load_adapted_model(target, finished_checkpoints(task.folder)[-1], dtype=config.eval.dtype, device=device)
    evaluate_folds(
        model, tokenizer=load_tokenizer(target), config=config, data=data, folder=task.folder, name=f"trials/{task.name}", device=device
    )

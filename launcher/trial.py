"""One trial of a sweep from its files to its files: train, evaluate what was saved, write the status last."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.config import ExperimentConfig
from launcher.data import PreparedData, prepare_data
from launcher.faults import INTERRUPTED, stop_reason
from launcher.lock import hold
from launcher.plugins import kept_names, use_run_plugins
from launcher.portable import carry_input, local_path, portable_path
from launcher.trial_errors import OutOfMemory, TimedOut, is_out_of_memory, reason_of, text_of
from trainers.config import TrainConfig
from trainers.errors import UserFacingError
from trainers.files import read_json, write_json

if TYPE_CHECKING:
    from trainers.distributed import Rank
    from trainers.loop import TrialInputs

PLAN = "sweep.json"
DATA_PATHS = ("path", "forget", "retain", "mia", "mmlu")
ENDED = ("finished", "stopped")
"""States in which a trial has nothing left to do in this sweep."""
GOES_ON = ("budget", INTERRUPTED)
"""Reasons for which a trial was stopped that do not keep the run's next start from going on with it."""
ORPHAN_S = 120.0
"""Seconds to wait for a process that still computes the trial: the ranks of a sweep that was killed end within a minute."""


@dataclass(frozen=True)
class TrialTask:
    """What one process needs to know to run a trial: it reads the rest from the run folder.

    Args:
        run: the run's folder.
        name: of the trial.
        micro_batch: pairs per pass, where memory turned out too small for as many as the trial's configuration says.
    """

    run: str
    name: str
    micro_batch: int | None = None

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
            "experiment": _with_portable_paths(config.model_dump(mode="json"), run=run),
            "trials": trials,
            "target": portable_path(target, run=run),
            "target_hash": target_hash,
        },
    )


def _with_portable_paths(experiment: dict[str, Any], *, run: Path) -> dict[str, Any]:
    """A trial's process has a working folder of its own. What is not a path here (a hub id) stays as it is."""
    data = dict(experiment["data"])
    for key in DATA_PATHS:
        if data[key] is not None and Path(data[key]).expanduser().exists():
            data[key] = portable_path(carry_input(Path(data[key]).expanduser(), run=run, name=key), run=run)
    return experiment | {"data": data, "plugins": kept_names(experiment["plugins"])}


def _with_local_paths(plan: dict[str, Any], *, run: Path) -> dict[str, Any]:
    experiment = plan["experiment"]
    data = experiment["data"] | {key: local_path(experiment["data"][key], run=run) for key in DATA_PATHS}
    return plan | {"target": local_path(plan["target"], run=run), "experiment": experiment | {"data": data}}


@lru_cache(maxsize=2)
def _read_plan(run: str, stamp: float) -> tuple[ExperimentConfig, dict[str, Any], PreparedData]:
    use_run_plugins(run)
    plan = _with_local_paths(read_json(Path(run) / PLAN), run=Path(run))
    config = ExperimentConfig.model_validate(plan["experiment"])
    return config, plan, prepare_data(config)


def load_plan(run: str) -> tuple[ExperimentConfig, dict[str, Any], PreparedData]:
    """The experiment, the plan and the prepared data; kept between trials that share a process."""
    return _read_plan(run, (Path(run) / PLAN).stat().st_mtime)


def trial_config(task: TrialTask, *, plan: Mapping[str, Any]) -> TrainConfig:
    """How the trial is to be computed: as its configuration says, but for a smaller micro-batch."""
    train = TrainConfig.model_validate(plan["trials"][task.name]["train"])
    return train if task.micro_batch is None else train.model_copy(update={"per_device_train_batch_size": task.micro_batch})


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


def why_stop(task: TrialTask) -> str | None:
    """Why a trial is to stop: it alone, because it was pruned, or with the whole run; None if it is to go on."""
    return stop_reason(task.folder) or stop_reason(task.run)


def ended(status: Mapping[str, Any]) -> bool:
    """Whether the run's next start leaves the trial as it is."""
    return status["state"] in ENDED and not (status["state"] == "stopped" and status.get("reason") in GOES_ON)


def settled(status: Mapping[str, Any]) -> bool:
    """Whether starting the trial again within the same sweep would change nothing."""
    return status["state"] in ENDED or (status["state"] == "failed" and status.get("retry") is False)


def fail_for_good(folder: Path, *, error: UserFacingError) -> None:
    """Record a failure that starting the trial again would repeat."""
    errors = int(read_status(folder).get("errors") or 0) + 1
    write_status(folder, state="failed", reason=reason_of(error), error=str(error), ended=time.time(), retry=False, errors=errors)


def run_trial(task: TrialTask, *, rank: Rank | None = None) -> Iterator[dict[str, Any]]:
    """Run or resume one trial on one rank, yielding its metrics; rank 0 evaluates at the end and writes the files.

    Before it evaluates, which no other rank takes part in and which may take long, rank 0 yields its last metrics once more, with
    ``"state": "evaluating"``.

    A loss that is not finite ends the trial as ``stopped``, and so does a request to stop the run, after a checkpoint; bad input ends
    it as ``failed``. None of them is raised on rank 0, because starting the trial again would change nothing. Everything else is
    recorded as ``failed`` and raised; other ranks record nothing and raise all failures.

    Raises:
        OutOfMemory: if this rank's GPU has no memory left.
    """
    from trainers.distributed import Rank

    rank = rank or Rank()
    # A sweep that was killed may have left a process behind that lives on for some seconds.
    with hold(task.folder / ".lock", wait_s=ORPHAN_S) if rank.rank == 0 else nullcontext():
        if rank.rank > 0 or not ended(read_status(task.folder)):
            yield from _run_trial(task, rank=rank)


def _run_trial(task: TrialTask, *, rank: Rank) -> Iterator[dict[str, Any]]:
    from trainers.loop import DivergedError, TrialStopped, train_worker

    leads = rank.rank == 0
    started = time.time()
    before = float(read_status(task.folder).get("seconds") or 0.0)

    def note(**changes: Any) -> None:
        if leads:
            write_status(task.folder, seconds=round(before + time.time() - started, 2), **changes)

    def asked() -> bool:
        return why_stop(task) is not None

    if rank.device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(rank.device)
    note(name=task.name, state="running", reason=None, error=None, started=started, ended=None, retry=None)
    metrics: dict[str, Any] = {}
    try:
        config, plan, data = load_plan(task.run)
        train = trial_config(task, plan=plan)
        inputs = trial_inputs(run=Path(task.run), data=data, target=Path(plan["target"]), target_hash=plan["target_hash"])
        for metrics in train_worker(train=train, inputs=inputs, trial=task.folder, rank=rank, stop=asked):
            if "signals" in metrics or metrics["step"] == metrics["num_steps"]:
                note(step=metrics["step"], num_steps=metrics["num_steps"])
            yield metrics
            limit = config.sweep.trial_timeout_s
            if leads and limit is not None and time.time() - started > limit:
                raise TimedOut(f"the trial ran for more than {limit:g} s", where="sweep.trial_timeout_s", fix="raise it, or train less")
        if leads:
            note(**_peak_memory(rank.device))
            yield {name: value for name, value in metrics.items() if name != "signals"} | {"state": "evaluating"}
            _evaluate_trial(task, config=config, data=data, target=Path(plan["target"]), device=rank.device, stop=asked)
            if read_status(task.folder)["state"] == "running":
                note(state="finished", ended=time.time())
    except TrialStopped:
        note(state="stopped", reason=why_stop(task) or INTERRUPTED, ended=time.time())
    except DivergedError as error:
        text = f"{error.what}; {error.fix}" if error.fix else error.what
        note(state="stopped", reason="diverged", error=text, ended=time.time())
    except UserFacingError as error:
        if not leads:
            raise
        note()
        fail_for_good(task.folder, error=error)
    except Exception as error:
        note(state="failed", reason=reason_of(error), error=text_of(error), ended=time.time())
        if is_out_of_memory(error):
            raise _no_memory(error) from error
        raise


def _peak_memory(device: str) -> dict[str, int]:
    """The most that training held of a GPU, bytes, to be compared with what was planned."""
    if not device.startswith("cuda"):
        return {}
    import torch

    return {"peak_gpu_bytes": int(torch.cuda.max_memory_allocated(device))}


def _no_memory(error: BaseException) -> OutOfMemory:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return OutOfMemory(
        f"the GPU has no memory left: {first}",
        where="train.per_device_train_batch_size",
        fix="lower it, or share the trial over more ranks",
    )


def _evaluate_trial(
    task: TrialTask, *, config: ExperimentConfig, data: PreparedData, target: Path, device: str, stop: Callable[[], bool]
) -> None:
    from eval.progress import Meter
    from launcher.scoring import evaluate_folds
    from trainers.checkpoint import finished_checkpoints
    from trainers.loop import TrialStopped
    from trainers.modeling import load_adapted_model, load_tokenizer

    class Attentive(Meter):
        """Ends the evaluation between two units of its work if the run is to stop: the trial's checkpoint is written already."""

        def is_due(self) -> bool:
            if stop():
                raise TrialStopped("during the evaluation")
            return super().is_due()

    if stop():
        raise TrialStopped("before the evaluation")
    model = load_adapted_model(target, finished_checkpoints(task.folder)[-1], dtype=config.eval.dtype, device=device)
    evaluate_folds(
        model,
        tokenizer=load_tokenizer(target),
        config=config,
        data=data,
        folder=task.folder,
        name=f"trials/{task.name}",
        device=device,
        meter=Attentive(f"evaluation of {task.name}"),
    )

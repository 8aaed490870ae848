"""Work that wants a GPU, done on one of the cluster where the driver's own machine has none.

A driver on a small head node plans, counts and writes. What it would compute itself (the target, its scores, the reference, the scores of
merged models) is first computed by a task on a machine with a GPU, into the run's files; the driver then finds it there, as on a resume.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launcher.config import ExperimentConfig
from launcher.data import PreparedData
from launcher.nodes import Node
from launcher.plugins import use_run_plugins
from launcher.run_folder import Run
from launcher.search_space import TrialSpec
from launcher.storage import RESUME_ONLY, run_address, run_folder, storage_of
from trainers.errors import RunError, UserFacingError

Ahead = Callable[..., None]
"""Calls a function ``f(run, **arguments)`` on a machine with a GPU; nothing where that would be no gain."""


def not_ahead(work: Callable[..., object], **arguments: Any) -> None:
    """Leave it to the caller to compute it here."""


def wants_gpu_elsewhere(nodes: Sequence[Node]) -> bool:
    """Whether the cluster has GPUs that the driver's machine has not."""
    import torch

    return bool(os.environ.get("RAY_ADDRESS")) and torch.cuda.device_count() == 0 and any(node.gpus > 0 for node in nodes)


@contextmanager
def computed_ahead(run: Run, *, nodes: Sequence[Node], cpus: float) -> Iterator[Ahead]:
    """What computes ahead for a run, for as long as the block lasts.

    Args:
        run: the run; its folder is shared by the machines, or it has a home that they fetch it from.
        nodes: of the cluster.
        cpus: cores that the work reserves beside its GPU.
    """
    if not wants_gpu_elsewhere(nodes):
        yield not_ahead
        return
    import ray

    from launcher.ray_session import start_ray, stop_ray

    start_ray(cpus=os.cpu_count() or 1)
    try:

        def ahead(work: Callable[..., object], **arguments: Any) -> None:
            started = time.time()
            run.storage.push()
            task: Any = ray.remote(num_gpus=1, num_cpus=cpus, max_retries=2)(_work_there)
            call = task.remote(run_address(run.folder), work, arguments)
            try:
                lines, node = ray.get(call)
            except ray.exceptions.RayTaskError as error:
                cause = getattr(error, "cause", None) or error
                if isinstance(cause, UserFacingError):
                    raise cause from None
                raise RunError(
                    "work on a machine with a GPU failed", where=getattr(work, "__name__", ""), why=str(cause).splitlines()[-1]
                ) from error
            except BaseException:
                ray.cancel(call, force=True)
                raise
            run.storage.pull(skip=RESUME_ONLY)
            run.events.emit("computed_elsewhere", work=work.__name__, node=node, seconds=round(time.time() - started, 2))
            for line in lines:
                run.console.line(line)

        yield ahead
    finally:
        stop_ray()


def _work_there(address: str, work: Callable[..., object], arguments: Mapping[str, Any]) -> tuple[list[str], str]:
    """Do the work in a run's folder of this machine; what it printed, and Ray's id of the machine."""
    import io

    import ray

    from launcher.console import Console
    from launcher.logs import quiet_libraries

    quiet_libraries()
    folder = run_folder(address)
    storage_of(address).pull(skip=RESUME_ONLY)
    use_run_plugins(folder)
    stream = io.StringIO()
    work(Run(folder, console=Console(stream)), **arguments)
    storage_of(folder).push()
    return stream.getvalue().splitlines(), ray.get_runtime_context().get_node_id()


def build_target_ahead(run: Run, *, config: ExperimentConfig, data: PreparedData) -> None:
    """The target, unless it was given."""
    from launcher.stages import obtain_target, use_reserved_cores

    use_reserved_cores(config)
    if config.model.model_name_or_path is None:
        obtain_target(run, config=config, data=data)


def score_baseline_ahead(run: Run, *, config: ExperimentConfig, data: PreparedData) -> None:
    """The untouched target's scores."""
    from launcher.scoring import evaluate_folder
    from launcher.stages import use_reserved_cores

    use_reserved_cores(config)
    evaluate_folder(target_of(run, config=config), config=config, data=data, folder=run.folder / "baseline", name="baseline")


def prepare_references_ahead(run: Run, *, config: ExperimentConfig, data: PreparedData, specs: Sequence[TrialSpec]) -> None:
    """The reference for every trial that exists or may be proposed."""
    from launcher.stages import prepare_references, use_reserved_cores

    use_reserved_cores(config)
    prepare_references(run, data=data, specs=specs, target=target_of(run, config=config))


def score_delivered_ahead(run: Run, *, config: ExperimentConfig, data: PreparedData, folder: str, name: str) -> None:
    """The scores of a model that was written into the run.

    Args:
        run: the run.
        config: its experiment.
        data: its documents.
        folder: of the model, below the run's.
        name: for the report.
    """
    from launcher.scoring import evaluate_folder
    from launcher.stages import use_reserved_cores

    use_reserved_cores(config)
    evaluate_folder(run.folder / folder, config=config, data=data, folder=run.folder / folder, name=name)


def score_merges_ahead(run: Run, *, scorer: Any, merges: Mapping[str, Any], folds: tuple[str, ...]) -> None:
    """The scores of merges that are not written.

    Args:
        run: the run.
        scorer: a ``MergeScorer``, which finds the run's checkpoints on this machine.
        merges: by the folder below the run's that takes the report.
        folds: to score on.
    """
    for folder, merge in merges.items():
        scorer.evaluate(merge, folder=run.folder / folder, name=folder, folds=folds)


def audit_ahead(run: Run, *, config: ExperimentConfig, data: PreparedData) -> None:
    """The audit of the delivered model."""
    from launcher.audit_stage import make_audit
    from launcher.stages import use_reserved_cores

    use_reserved_cores(config)
    make_audit(run, config=config, data=data, target=target_of(run, config=config))


def target_of(run: Run, *, config: ExperimentConfig) -> Path:
    """The target's folder on this machine: where it was given, or in the run."""
    given = config.model.model_name_or_path
    return Path(given).expanduser() if given is not None else run.folder / "target"

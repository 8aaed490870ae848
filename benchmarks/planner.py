"""The memory that this framework's planner expects a step to need, beside which a measured peak is shown."""

from __future__ import annotations

from benchmarks.models import Shape, olmo_config
from benchmarks.workload import Workload
from trainers.config import TrainConfig
from trainers.memory import GIB, estimate_memory, largest_micro_batch, shape_of, trained_of


def planned_gib(*, shape: Shape, train: TrainConfig, workload: Workload) -> float:
    """Peak of the tensors of one trial on one GPU, GiB; without the device's context, which no tensor counter sees.

    The planner reckons with the longest rows in one micro-batch, so with random batches it should lie above what is measured.
    """
    config = olmo_config(shape)
    estimate = estimate_memory(
        shape_of(config),
        train=train,
        trained=trained_of(config, train=train),
        batch=largest_micro_batch(forget=workload.forget, retain=workload.retain, train=train),
        device="cuda",
        checkpointing=False,
    )
    return (estimate.total - estimate.context) / GIB

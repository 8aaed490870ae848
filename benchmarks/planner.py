"""The memory that this framework's planner expects a step to need, beside which a measured peak is shown."""

from __future__ import annotations

from benchmarks.models import Shape, olmo_config
from benchmarks.workload import Workload
from trainers.config import TrainConfig
from trainers.memory import GIB, estimate_memory
from trainers.memory_plan import largest_micro_batch
from trainers.model_shape import shape_of, trained_of


def planned_gib(*, shape: Shape, train: TrainConfig, workload: Workload) -> float:
    """Peak of the tensors of one trial on one GPU, GiB; without the device's context, which no tensor counter sees.

    The planner's formulas, given the rows of each step as they are instead of the longest ones of the set.
    """
    config = olmo_config(shape)
    estimates = [
        estimate_memory(
            shape_of(config),
            train=train,
            trained=trained_of(config, train=train),
            batch=largest_micro_batch(
                forget=[workload.forget[pair] for pair in pairs], retain=[workload.retain[pair] for pair in pairs], train=train
            ),
            device="cuda",
            checkpointing=False,
        )
        for pairs in workload.steps(pairs_per_step=train.train_batch_size)
    ]
    return max(estimate.total - estimate.context for estimate in estimates) / GIB

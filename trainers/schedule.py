"""Learning rate as a pure function of the step's place in its cycle."""

from __future__ import annotations

import math

from trainers.config import TrainConfig


def learning_rate(train: TrainConfig, *, cycle_step: int, cycle_steps: int) -> float:
    """Learning rate of step ``cycle_step`` (1 to ``cycle_steps``) of a cycle: linear warm-up, then the configured decay to zero.

    A trial on the paired schedule is one cycle; the others start a new one with every chunk and annealing phase.
    """
    num_warmup = round(train.warmup_ratio * cycle_steps)
    if cycle_step <= num_warmup:
        return train.learning_rate * cycle_step / num_warmup
    remaining = (cycle_steps - cycle_step + 1) / max(1, cycle_steps - num_warmup)
    if train.lr_scheduler_type == "constant":
        return train.learning_rate
    if train.lr_scheduler_type == "linear":
        return train.learning_rate * remaining
    return train.learning_rate * 0.5 * (1.0 - math.cos(math.pi * remaining))

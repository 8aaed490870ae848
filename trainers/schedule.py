"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math

from trainers.config import TrainConfig


def learning_rate(train: TrainConfig, *, step: int, num_steps: int) -> float:
    """Learning rate of optimizer step ``step`` (1 to ``num_steps``): linear warm-up, then the configured decay to zero."""
    num_warmup = round(train.warmup_ratio * num_steps)
    if step <= num_warmup:
        return train.learning_rate * step / num_warmup
    remaining = (num_steps - step + 1) / max(1, num_steps - num_warmup)
    if train.lr_scheduler_type == "constant":
        return train.learning_rate
    if train.lr_scheduler_type == "linear":
        return train.learning_rate * remaining
    return train.learning_rate * 0.5 * (1.0 - math.cos(math.pi * remaining))

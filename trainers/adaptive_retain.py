"""A weight of retain cross-entropy that answers to how much of the retain set has been lost."""

from __future__ import annotations

import math
from collections.abc import Sequence

from trainers.config import AdaptiveRetainConfig

_LARGEST_EXPONENT = 700.0  # exp of it is finite in float64; no weight comes near.


def adaptive_retain_weight(config: AdaptiveRetainConfig, *, history: Sequence[float], steps_per_epoch: int) -> float:
    """Weight of retain cross-entropy in the next step.

    weight = clip(scale * base ** rise + offset, lowest, highest)

    rise is the retain cross-entropy of the last step minus its mean over the first epoch, nats per token. Until that mean is known
    rise counts as 0. With the defaults, clip(0.3 * 6 ** rise + 0.8, 1.2, 2.8), the weight leaves 1.2 at a rise of 0.16 and stops
    growing at 1.06.

    Args:
        config: the five numbers of the formula.
        history: retain cross-entropy, nats per token, of all earlier steps that had retain rows, in order.
        steps_per_epoch: how many of them make up the first epoch, > 0. Each counts alike in its mean.

    Returns:
        A finite weight in [lowest, highest]. A loss that is not finite gives ``highest``; a trial stops before it gets here.

    Raises:
        ValueError: if steps_per_epoch < 1.

    Source: SHA256, https://arxiv.org/abs/2504.12996. Differences from
    https://github.com/LAB-FLAIR/Constrained-Unlearning-for-LLM: its highest is 2.3, and it rounds to one decimal. It takes the loss
    of the current micro-batch; ours that of the step before, so that the weight does not depend on how a step is split and is the
    same on every rank. It divides a sum of micro-batch means by the number of rows, which puts the first epoch's mean too low by a
    factor of the retain rows per micro-batch, and the weight too high; ours is a mean.
    """
    if steps_per_epoch < 1:
        raise ValueError(f"steps_per_epoch = {steps_per_epoch}, must be at least 1: the first epoch's mean is taken over them")
    rise = 0.0
    if len(history) >= steps_per_epoch:
        rise = history[-1] - sum(history[:steps_per_epoch]) / steps_per_epoch
    if not math.isfinite(rise):
        return config.highest
    power = math.exp(min(rise * math.log(config.base), _LARGEST_EXPONENT))
    return min(max(config.scale * power + config.offset, config.lowest), config.highest)

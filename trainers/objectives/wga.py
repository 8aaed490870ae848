"""Weighted gradient ascent: ascent that leaves tokens alone once they are unlikely."""

from __future__ import annotations

from trainers.config import Average
from trainers.objectives.terms import LossTerm, Scored, Side, averaged


def wga_term(*, forget: Scored, beta: float, weight: float, average: Average) -> LossTerm:
    """p ** beta * log p per forget token, with the factor p ** beta held constant.

    d log p / d logits grows as p falls; the factor takes that back, so the gradient vanishes with p. beta = 0 is gradient ascent.

    Args:
        forget: scored forget tokens, nats.
        beta: exponent, >= 0, dimensionless; 1 in the paper's experiments.
        weight: dimensionless.
        average: over tokens, or over sequences' means.

    Raises:
        ValueError: if beta is negative.

    Source: Wang et al. 2025, https://arxiv.org/abs/2502.19301
    """
    if beta < 0:
        raise ValueError(f"beta = {beta}, must be >= 0")
    factor_N = (beta * forget.token_log_probs_N.detach()).exp()
    total, unit = averaged(factor_N * forget.token_log_probs_N, row_N=forget.row_N, num_rows=forget.num_rows, average=average)
    return LossTerm(name="forget_wga", total=total, unit=unit, side=Side.FORGET, weight=weight)

"""SatImp: ascent on the tokens that are neither forgotten yet (saturation) nor certain anyway (importance)."""

from __future__ import annotations

import torch

from trainers.config import Average
from trainers.objectives.terms import LossTerm, Scored, Side, averaged


def satimp_term(*, forget: Scored, beta_1: float, beta_2: float, weight: float, average: Average) -> LossTerm:
    """p ** beta_1 * (1 - p) ** beta_2 * log p per forget token, with the factors held constant.

    beta_1 = beta_2 = 0 is gradient ascent, beta_2 = 0 is weighted gradient ascent. The factor is largest at
    p = beta_1 / (beta_1 + beta_2): 5/6 with the defaults.

    Args:
        forget: scored forget tokens, nats.
        beta_1: exponent of the probability, >= 0, dimensionless; 5 in the public configuration.
        beta_2: exponent of one minus the probability, >= 0, dimensionless; 1 in the public configuration.
        weight: dimensionless. The forget term outweighs retain cross-entropy 10 to 1 (the README of
            https://github.com/locuslab/open-unlearning has it so; its YAML, by mistake, has 1 to 10).
        average: over tokens, or over sequences' means.

    Raises:
        ValueError: if an exponent is negative.

    Source: Yang et al. 2025, https://arxiv.org/abs/2505.11953
    """
    for name, value in (("beta", beta_1), ("beta_2", beta_2)):
        if value < 0:
            raise ValueError(f"{name} = {value}, must be >= 0")
    log_probs_N = forget.token_log_probs_N.detach()
    # A log-probability rounded to a little above 0 must not become a negative base.
    other_N = -torch.expm1(log_probs_N.clamp(max=0.0))
    factor_N = (beta_1 * log_probs_N).exp() * other_N**beta_2
    total, unit = averaged(factor_N * forget.token_log_probs_N, row_N=forget.row_N, num_rows=forget.num_rows, average=average)
    return LossTerm(name="forget_satimp", total=total, unit=unit, side=Side.FORGET, weight=weight)

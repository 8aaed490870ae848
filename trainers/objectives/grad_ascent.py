"""Gradient ascent: make the forget answers unlikely by ascending their cross-entropy."""

from __future__ import annotations

from trainers.config import Average
from trainers.objectives.terms import LossTerm, Scored, Side, averaged


def grad_ascent_term(*, forget: Scored, weight: float, average: Average) -> LossTerm:
    """Minus the cross-entropy on forget answers, i.e. their mean token log-probability: minimising it ascends the loss.

    Unbounded below: without a retain term it ends in a destroyed model.

    Args:
        forget: scored forget tokens, nats.
        weight: dimensionless.
        average: over tokens, or over sequences' means.

    Source: the GA baseline of Maini et al. 2024 (TOFU), https://arxiv.org/abs/2401.06121
    """
    total, unit = averaged(forget.token_log_probs_N, row_N=forget.row_N, num_rows=forget.num_rows, average=average)
    return LossTerm(name="forget_grad_ascent", total=total, unit=unit, side=Side.FORGET, weight=weight)

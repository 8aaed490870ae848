"""Gradient ascent: make the forget answers unlikely by ascending their cross-entropy."""

from __future__ import annotations

from trainers.objectives.terms import LossTerm, Scored, Side, Unit


def grad_ascent_term(*, forget: Scored, weight: float) -> LossTerm:
    """Minus the cross-entropy on forget answers, i.e. their mean token log-probability: minimising it ascends the loss.

    Unbounded below: without a retain term it ends in a destroyed model.

    Args:
        forget: scored forget tokens, nats.
        weight: dimensionless.

    Source: the GA baseline of Maini et al. 2024 (TOFU), https://arxiv.org/abs/2401.06121
    """
    return LossTerm(name="forget_grad_ascent", total=forget.token_log_probs_N.sum(), unit=Unit.TOKEN, side=Side.FORGET, weight=weight)

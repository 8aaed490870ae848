"""Cross-entropy on the retain set: rehearsal of what must be kept (GDR)."""

from __future__ import annotations

from trainers.objectives.terms import LossTerm, Scored, Side, Unit


def retain_ce_term(*, retain: Scored, weight: float) -> LossTerm:
    """Cross-entropy per scored retain token, nats.

    With gradient ascent on the forget set this is GradDiff (Liu et al. 2022, https://arxiv.org/abs/2203.12817, as used by TOFU,
    https://arxiv.org/abs/2401.06121).
    """
    return LossTerm(name="retain_ce", total=-retain.token_log_probs_N.sum(), unit=Unit.TOKEN, side=Side.RETAIN, weight=weight)

"""Cross-entropy on the retain set: rehearsal of what must be kept (GDR)."""

from __future__ import annotations

from trainers.config import Average
from trainers.objectives.terms import LossTerm, Scored, Side, averaged


def retain_ce_term(*, retain: Scored, weight: float, average: Average) -> LossTerm:
    """Cross-entropy per scored retain token, nats, over tokens or over sequences' means.

    With gradient ascent on the forget set this is GradDiff (Liu et al. 2022, https://arxiv.org/abs/2203.12817, as used by TOFU,
    https://arxiv.org/abs/2401.06121).
    """
    total, unit = averaged(-retain.token_log_probs_N, row_N=retain.row_N, num_rows=retain.num_rows, average=average)
    return LossTerm(name="retain_ce", total=total, unit=unit, side=Side.RETAIN, weight=weight)

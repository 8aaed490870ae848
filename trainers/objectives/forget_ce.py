"""Cross-entropy on the forget set, descended: what task-vector negation learns in order to subtract it."""

from __future__ import annotations

from trainers.config import Average
from trainers.objectives.terms import LossTerm, Scored, Side, averaged


def forget_ce_term(*, forget: Scored, weight: float, average: Average) -> LossTerm:
    """Cross-entropy per scored forget token, nats: minimising it makes the forget answers *likelier*.

    Forgetting happens afterwards: the exported weights are start - negation_scale * (trained - start). negation_scale is 1 in MUSE's
    code; the paper picks it on held-out data.

    Args:
        forget: scored forget tokens, nats.
        weight: dimensionless.
        average: over tokens, or over sequences' means.

    Source: Ilharco et al. 2022, https://arxiv.org/abs/2212.04089
    """
    total, unit = averaged(-forget.token_log_probs_N, row_N=forget.row_N, num_rows=forget.num_rows, average=average)
    return LossTerm(name="forget_ce", total=total, unit=unit, side=Side.FORGET, weight=weight)

"""SimNPO: negative preference optimisation without a reference, on length-normalised answers."""

from __future__ import annotations

from torch.nn.functional import logsigmoid

from trainers.config import Reduction
from trainers.objectives.log_ratio import reduced_by_row, sum_over_answers
from trainers.objectives.terms import LossTerm, Scored, Side, Unit


def simnpo_term(*, forget: Scored, beta: float, margin: float, weight: float) -> LossTerm:
    """-(2 / beta) * log sigmoid(beta * (NLL / length - margin)) per forget sequence, summed over the sequences.

    NLL / length is the cross-entropy per answer token. With margin 0 this is NPO on token means against a reference that gives every
    answer probability 1. The push fades once an answer's cross-entropy is well above the margin.

    Args:
        forget: scored forget tokens, nats.
        beta: inverse temperature, > 0, dimensionless; 2.5 in the paper's TOFU forget05 run (4.5 on forget10).
        margin: gamma, nats per token; 0 in the paper's TOFU runs.
        weight: dimensionless; 0.1375 in the TOFU forget05 run (0.125 on forget10), with retain cross-entropy at 1.

    Raises:
        ValueError: if beta is not positive.

    Source: Fan et al. 2024, https://arxiv.org/abs/2410.07163
    """
    if beta <= 0:
        raise ValueError(f"beta = {beta}, must be > 0")
    cross_entropy_B = reduced_by_row(-forget.token_log_probs_N, scored=forget, reduction=Reduction.TOKEN_MEAN)
    total = -(2.0 / beta) * sum_over_answers(logsigmoid(beta * (cross_entropy_B - margin)), scored=forget)
    return LossTerm(name="forget_simnpo", total=total, unit=Unit.SEQUENCE, side=Side.FORGET, weight=weight)

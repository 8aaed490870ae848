"""Negative preference optimisation: ascent that fades out once an answer is unlikely enough."""

from __future__ import annotations

from torch.nn.functional import logsigmoid

from trainers.config import Reduction
from trainers.objectives.log_ratio import log_ratio_by_row, sum_over_answers
from trainers.objectives.terms import LossTerm, Scored, Side, Unit


def npo_term(*, forget: Scored, beta: float, reduction: Reduction, weight: float) -> LossTerm:
    """(2 / beta) * log(1 + (p_model / p_reference) ** beta) per forget sequence, summed over the sequences.

    With ``sequence_sum`` the log-ratio of a sequence is the sum over its answer tokens, as in the paper. With ``token_mean``
    it is their mean, which hardly saturates: the variant of ZJUKLAB's public code
    (https://github.com/zjunlp/unlearn, one mean per micro-batch there, one per sequence here, so that the
    result does not depend on how a step is split; both agree at one sequence per micro-batch).
    The gradient tends to that of gradient ascent as beta goes to 0.

    Args:
        forget: scored forget tokens with ``reference_token_log_probs_N``, nats.
        beta: inverse temperature, > 0, dimensionless; 0.1 in the paper.
        reduction: how token log-ratios become one number per sequence.
        weight: dimensionless.

    Raises:
        ValueError: if beta is not positive, or reference log-probabilities are missing or mis-shaped.

    Source: Zhang et al. 2024, https://arxiv.org/abs/2404.05868
    """
    if beta <= 0:
        raise ValueError(f"beta = {beta}, must be > 0")
    log_ratio_B = log_ratio_by_row(forget, reduction=reduction, term="forget_npo", field="forget.reference_token_log_probs_N")
    # log(1 + x ** beta) = -logsigmoid(-beta * log x), without overflow for large ratios.
    total = -(2.0 / beta) * sum_over_answers(logsigmoid(-beta * log_ratio_B), scored=forget)
    return LossTerm(name="forget_npo", total=total, unit=Unit.SEQUENCE, side=Side.FORGET, weight=weight)

"""Direct preference optimisation: prefer another answer to the one that must be forgotten."""

from __future__ import annotations

from torch.nn.functional import logsigmoid

from trainers.config import Reduction
from trainers.objectives.inputs import required
from trainers.objectives.log_ratio import log_ratio_by_row, sum_over_answers
from trainers.objectives.terms import LossTerm, Scored, Side, Unit


def dpo_term(*, forget: Scored, beta: float, reduction: Reduction, weight: float) -> LossTerm:
    """-(2 / beta) * log sigmoid(beta * (alternative's log-ratio - forget answer's log-ratio)) per sequence, summed over the sequences.

    A log-ratio is log p_model - log p_reference of an answer to the same prompt. The factor 2 / beta gives the gradient the size of
    NPO's, which is this without the alternative; the code of open-unlearning has it, while DPO's paper and TOFU's code have 1, which
    is 20 times less at beta = 0.1. IdkDPO is the same function with refusals such as "I don't know" as the alternatives.

    Args:
        forget: scored forget answers and, as ``alternative``, other answers to the same prompts in the same row order; both with
            ``reference_token_log_probs_N``, nats.
        beta: inverse temperature, > 0, dimensionless; 0.1 in the paper.
        reduction: how an answer's token log-ratios become one number: their sum as in the paper, or their mean.
        weight: dimensionless.

    Raises:
        ValueError: if beta is not positive, if the alternatives are missing or are not as many, or if reference log-probabilities are
            missing or mis-shaped.

    Source: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290; with refusals: Maini et al. 2024 (TOFU),
    https://arxiv.org/abs/2401.06121; with 2 / beta: https://github.com/locuslab/open-unlearning
    """
    if beta <= 0:
        raise ValueError(f"beta = {beta}, must be > 0")
    alternative = required(forget.alternative, term="forget_dpo", field="forget.alternative")
    if alternative.num_rows != forget.num_rows:
        raise ValueError(f"forget_dpo needs one alternative per forget row, but got {alternative.num_rows} for {forget.num_rows} rows")
    answer_B, alternative_B = (
        log_ratio_by_row(scored, reduction=reduction, term="forget_dpo", field=f"{field}.reference_token_log_probs_N")
        for scored, field in ((forget, "forget"), (alternative, "forget.alternative"))
    )
    total = -(2.0 / beta) * sum_over_answers(logsigmoid(beta * (alternative_B - answer_B)), scored=forget)
    return LossTerm(name="forget_dpo", total=total, unit=Unit.SEQUENCE, side=Side.FORGET, weight=weight)

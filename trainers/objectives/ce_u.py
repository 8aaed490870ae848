"""CE-U: teach the model its own distribution with the answer's token taken out.

Shape suffixes: N scored tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainers.config import Average
from trainers.objectives.demoted_label import demoted_cross_entropy
from trainers.objectives.inputs import required_tensor
from trainers.objectives.terms import LossTerm, Scored, Side, Unit, averaged


def ce_u_term(*, forget: Scored, skip_first_token: bool, weight: float, average: Average) -> LossTerm:
    """Cross-entropy of the model against softmax(its logits with the label's at -infinity), held constant, per forget token, nats.

    With p the model's distribution and y the label the target is u_v = p_v / (1 - p_y), u_y = 0. The gradient by the logits is p - u:
    p_y at the label and -p_v p_y / (1 - p_y) elsewhere: full where the model is certain of the label, fading as the label becomes
    unlikely. In the limit p_y -> 1 the target drowns in rounding. Closer to 1 than ``SMALLEST_REMAINDER`` (3.05e-5 in float32) the
    target keeps a share of the label that grows to 1, so the gradient fades to 0 in proportion to 1 - p_y.

    Args:
        forget: scored forget tokens with ``log_normaliser_N`` and ``mean_logit_N``, nats.
        skip_first_token: leave each answer's first scored token out, as the paper does; an answer of one token then contributes
            nothing (averaged over sequences it still counts as one, with value 0).
        weight: dimensionless.
        average: over the tokens that enter, or over sequences' means of them.

    Raises:
        ValueError: if ``log_normaliser_N`` or ``mean_logit_N`` are missing or mis-shaped.

    Source: Yang 2025, https://arxiv.org/abs/2503.01224 (the first token: footnote in the training settings)
    """
    log_probs_N = forget.token_log_probs_N
    normaliser_N = required_tensor(forget.log_normaliser_N, term="forget_ce_u", field="forget.log_normaliser_N", like=log_probs_N)
    mean_logit_N = required_tensor(forget.mean_logit_N, term="forget_ce_u", field="forget.mean_logit_N", like=log_probs_N)
    values_N = demoted_cross_entropy(
        token_log_probs_N=log_probs_N,
        log_normaliser_N=normaliser_N,
        mean_logit_N=mean_logit_N,
        teacher_log_probs_N=log_probs_N,
        penalty=math.inf,
    )
    total, unit = averaged(
        values_N,
        row_N=forget.row_N,
        num_rows=forget.num_rows,
        average=average,
        token_unit=Unit.LATER_TOKEN if skip_first_token else Unit.TOKEN,
        kept_N=_later_tokens(forget.row_N) if skip_first_token else None,
    )
    return LossTerm(name="forget_ce_u", total=total, unit=unit, side=Side.FORGET, weight=weight)


def _later_tokens(row_N: Tensor) -> Tensor:
    """Which scored tokens are not the first of their row, bool; rows ascend."""
    later_N = torch.zeros_like(row_N, dtype=torch.bool)
    later_N[1:] = row_N[1:] == row_N[:-1]
    return later_N

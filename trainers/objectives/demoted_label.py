"""Cross-entropy against a distribution whose label has been made less likely: what UNDIAL and CE-U have in common.

Shape suffixes: N scored tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_REMAINDER = 256.0
"""In machine epsilons: 3.05e-5 in float32, where the rounding of logits near 20 moves a remainder by about 1e-6."""


def demoted_cross_entropy(
    *, token_log_probs_N: Tensor, log_normaliser_N: Tensor, mean_logit_N: Tensor, teacher_log_probs_N: Tensor, penalty: float
) -> Tensor:
    """-sum_v t_v log p_v per token, nats, shape (N,), with t = softmax(teacher's logits - penalty * onehot(label)) held constant.

    With the teacher's distribution q, its share q_y of the label y, and the model's logits z:

        t_v = q_v / Z for v != y,    t_y = q_y e^-penalty / Z,    Z = (1 - q_y) + q_y e^-penalty

        sum_v t_v z_v = z_y + sum_v t_v (z_v - z_y) = z_y + (sum_v q_v z_v - z_y) / Z

        -sum_v t_v log p_v = log sum_v e^z_v - sum_v t_v z_v = -log p_y - (sum_v q_v z_v - z_y) / Z

    so one average of the logits under q says all that is needed of the vocabulary. Z is what remains of q once the label is demoted.
    As q_y -> 1 under a high penalty it vanishes, and the numerator with it: t, which spreads that remainder over 1, drowns in rounding.
    Hence Z is not let below ``SMALLEST_REMAINDER``. That is the same as a lower penalty at that token, the one whose remainder is the
    smallest, and never below log(1 / smallest) = 10.4 nats in float32; t_y then is 1 - (1 - q_y) / smallest, and the loss is finite.

    Args:
        token_log_probs_N: log p(label) under the model, differentiable.
        log_normaliser_N: log sum_v exp(z_v), differentiable.
        mean_logit_N: sum_v q_v z_v with q held constant, differentiable.
        teacher_log_probs_N: log q(label); no gradient flows into it.
        penalty: taken off the label's logit, nats, >= 0; infinity takes the label out of the target.
    """
    teacher_N = teacher_log_probs_N.detach().to(token_log_probs_N.dtype)
    remainder_N = -torch.expm1(teacher_N) + torch.exp(teacher_N - penalty)
    remainder_N = remainder_N.clamp(min=SMALLEST_REMAINDER * torch.finfo(remainder_N.dtype).eps)
    label_logit_N = token_log_probs_N + log_normaliser_N
    return -token_log_probs_N - (mean_logit_N - label_logit_N) / remainder_N

"""UNDIAL: distil the reference's own distributions with the answer's tokens made less likely."""

from __future__ import annotations

from trainers.config import Average
from trainers.objectives.demoted_label import demoted_cross_entropy
from trainers.objectives.inputs import required, required_tensor
from trainers.objectives.terms import LossTerm, Scored, Side, averaged


def undial_term(*, forget: Scored, beta: float, weight: float, average: Average) -> LossTerm:
    """Cross-entropy of the model against softmax(reference's logits - beta * onehot(label)) per forget token, nats.

    The target is fixed, so forgetting has an end. As beta goes to 0 the gradient tends to that of KL(reference || model).

    Args:
        forget: scored forget tokens with ``reference_token_log_probs_N`` and, as ``distributions``, the reference's next-token
            distributions at the same tokens, nats.
        beta: taken off the label's logit, nats, > 0; 10 in the paper.
        weight: dimensionless.
        average: over tokens, or over sequences' means. Open-unlearning's code averages over prompt and padding too, where it demotes
            the token that the ignore index -100 happens to address; ours reads answers alone.

    Raises:
        ValueError: if beta is not positive, or if reference log-probabilities or distributions are missing or mis-shaped.

    Source: Dong et al. 2024, https://arxiv.org/abs/2402.10052
    """
    if beta <= 0:
        raise ValueError(f"beta = {beta}, must be > 0")
    log_probs_N = forget.token_log_probs_N
    distributions = required(forget.distributions, term="forget_undial", field="forget.distributions")
    mean_logit_N = required_tensor(
        distributions.reference_mean_logit_K, term="forget_undial", field="forget.distributions.reference_mean_logit_K", like=log_probs_N
    )
    normaliser_N = required_tensor(
        distributions.log_normaliser_K, term="forget_undial", field="forget.distributions.log_normaliser_K", like=log_probs_N
    )
    teacher_N = required_tensor(
        forget.reference_token_log_probs_N, term="forget_undial", field="forget.reference_token_log_probs_N", like=log_probs_N
    )
    values_N = demoted_cross_entropy(
        token_log_probs_N=log_probs_N,
        log_normaliser_N=normaliser_N,
        mean_logit_N=mean_logit_N,
        teacher_log_probs_N=teacher_N,
        penalty=beta,
    )
    total, unit = averaged(values_N, row_N=forget.row_N, num_rows=forget.num_rows, average=average)
    return LossTerm(name="forget_undial", total=total, unit=unit, side=Side.FORGET, weight=weight)

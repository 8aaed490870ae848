"""KL(reference || model) on the retain set: stay close to the target model where nothing must change (KLR).

Shape suffixes: K positions, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from trainers.config import Average
from trainers.objectives.inputs import required, required_tensor
from trainers.objectives.terms import Distributions, LossTerm, Scored, Side, Unit, averaged


def kl_reference_model(distributions: Distributions) -> Tensor:
    """KL(reference || model) per position, nats, shape (K,): the expectation is taken under the reference q.

    sum_v q_v (log q_v - log p_v) = sum_v q_v log q_v - sum_v q_v z_v + log sum_v exp(z_v), with z the model's logits.
    It is a small difference of large sums: where both agree rounding leaves about an epsilon times the logits, of either sign.
    """
    return distributions.log_normaliser_K - distributions.reference_mean_logit_K + distributions.reference_negative_entropy_K.detach()


def retain_kl_term(*, retain: Scored, weight: float, average: Average) -> LossTerm:
    """KL(reference || model) per position of ``kl_scope``, nats, over positions or over sequences' means.

    Args:
        retain: rows with ``distributions`` at the positions to compare, which are also those that the step counts.
        weight: dimensionless.
        average: over positions, or over sequences' means.

    Raises:
        ValueError: if the distributions are missing or mis-shaped.

    Source: the KL baseline of Maini et al. 2024 (TOFU), https://arxiv.org/abs/2401.06121, which takes it at every position of padded
    rows; which positions enter here is the loop's choice.
    """
    distributions = required(retain.distributions, term="retain_kl", field="retain.distributions")
    for field in ("reference_mean_logit_K", "reference_negative_entropy_K", "row_K"):
        required_tensor(
            getattr(distributions, field), term="retain_kl", field=f"retain.distributions.{field}", like=distributions.log_normaliser_K
        )
    total, unit = averaged(
        kl_reference_model(distributions), row_N=distributions.row_K, num_rows=retain.num_rows, average=average, token_unit=Unit.POSITION
    )
    return LossTerm(name="retain_kl", total=total, unit=unit, side=Side.RETAIN, weight=weight)

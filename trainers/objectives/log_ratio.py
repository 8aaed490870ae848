"""How much likelier an answer is under the model than under the reference: one log-ratio per row.

Shape suffixes: N scored tokens, B rows.
"""

from __future__ import annotations

from torch import Tensor

from trainers.config import Reduction
from trainers.objectives.inputs import required_tensor
from trainers.objectives.log_probs import sum_by_row, tokens_by_row
from trainers.objectives.terms import Scored


def log_ratio_by_row(scored: Scored, *, reduction: Reduction, term: str, field: str) -> Tensor:
    """log p_model(answer) - log p_reference(answer) per row, nats, shape (B,); a row without scored tokens has 0.

    Args:
        scored: rows with ``reference_token_log_probs_N``, through which no gradient flows.
        reduction: sum over the answer's tokens, or their mean.
        term: who asks, for the error.
        field: what the reference's log-probabilities are called there, for the error.

    Raises:
        ValueError: if the reference's log-probabilities are missing or mis-shaped.
    """
    reference_N = required_tensor(scored.reference_token_log_probs_N, term=term, field=field, like=scored.token_log_probs_N)
    difference_N = scored.token_log_probs_N - reference_N.detach().to(scored.token_log_probs_N.dtype)
    return reduced_by_row(difference_N, scored=scored, reduction=reduction)


def reduced_by_row(values_N: Tensor, *, scored: Scored, reduction: Reduction) -> Tensor:
    """Sum or mean of one value per scored token over each row's tokens, shape (B,); a row without scored tokens has 0."""
    total_B = sum_by_row(values_N, row_N=scored.row_N, num_rows=scored.num_rows)
    if reduction is Reduction.SEQUENCE_SUM:
        return total_B
    return total_B / tokens_by_row(scored.row_N, num_rows=scored.num_rows).clamp(min=1)


def sum_over_answers(values_B: Tensor, *, scored: Scored) -> Tensor:
    """Sum over the rows that have scored tokens, which are those that ``Unit.SEQUENCE`` counts."""
    return (values_B * (tokens_by_row(scored.row_N, num_rows=scored.num_rows) > 0)).sum()

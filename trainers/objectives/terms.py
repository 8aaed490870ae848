"""What an objective reads and returns: sums with their units, still to be divided by the counts of the whole step.

Shape suffixes: N scored tokens, K positions whose whole distribution is compared, M tokens, B rows, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

from trainers.config import Average
from trainers.objectives.log_probs import sum_by_row, tokens_by_row


class Unit(StrEnum):
    """What a term's count counts."""

    TOKEN = "tokens"
    """Scored tokens: answers and their end tokens."""
    SEQUENCE = "sequences"
    """Rows with at least one scored token."""
    POSITION = "positions"
    """Tokens at which distributions are compared (``kl_scope``)."""
    LATER_TOKEN = "later_tokens"
    """Scored tokens but the first of each row."""
    REAL_TOKEN = "real_tokens"
    """All tokens of all rows, prompts included, padding excluded."""


class Side(StrEnum):
    """The set a term belongs to; each set has denominators of its own."""

    FORGET = "forget"
    RETAIN = "retain"


@dataclass(frozen=True)
class LossTerm:
    """One summand of an objective on one micro-batch, before normalisation.

    Args:
        name: for logs, for instance ``retain_kl``.
        total: scalar sum over this micro-batch, nats (squared activations for RMU), differentiable.
        unit: what ``total`` is divided by the step's number of.
        side: the set whose tokens or sequences are counted.
        weight: dimensionless coefficient in the objective.
    """

    name: str
    total: Tensor
    unit: Unit
    side: Side
    weight: float


@dataclass(frozen=True)
class Distributions:
    """Next-token distributions of model and reference at some positions of a set, as the four numbers that losses need.

    Args:
        log_normaliser_K: log sum_v exp(z_v) of the model's logits z, nats, differentiable.
        reference_mean_logit_K: sum_v q_v z_v, the model's logits averaged under the reference's distribution q, differentiable.
        reference_negative_entropy_K: sum_v q_v log q_v, nats, no gradient.
        row_K: index of the row (0 to ``num_rows`` - 1) that each position belongs to, int64.
    """

    log_normaliser_K: Tensor
    reference_mean_logit_K: Tensor
    reference_negative_entropy_K: Tensor
    row_K: Tensor


@dataclass(frozen=True)
class Activations:
    """Outputs of one decoder layer at every token of a set, and what they are pulled to.

    Args:
        values_MD: the model's, differentiable.
        target_MD: a control vector (forget) or the reference's activations (retain), no gradient.
        row_M: index of the row that each token belongs to, int64.
    """

    values_MD: Tensor
    target_MD: Tensor
    row_M: Tensor


@dataclass(frozen=True)
class Scored:
    """One set's rows in one micro-batch, under the model and under the reference; what an objective does not need is None.

    Args:
        token_log_probs_N: log p(label | prefix) in float32 or wider, nats, differentiable.
        row_N: index of the row (0 to ``num_rows`` - 1) that each scored token belongs to, int64; ascending.
        num_rows: rows of this set in the micro-batch.
        log_normaliser_N: log sum_v exp(z_v) of the model's logits z at the scored tokens, nats, differentiable.
        mean_logit_N: sum_v p_v z_v, the logits averaged under the model's own distribution p, which counts as constant:
            differentiable through z only.
        reference_token_log_probs_N: log-probabilities of the labels under the reference model, no gradient.
        distributions: model against reference, at the positions of ``kl_scope`` (retain) or at the scored tokens (forget).
        alternative: the same rows with other answers (DPO), in the same row order.
        activations: outputs of the steered layer (RMU).
    """

    token_log_probs_N: Tensor
    row_N: Tensor
    num_rows: int
    log_normaliser_N: Tensor | None = None
    mean_logit_N: Tensor | None = None
    reference_token_log_probs_N: Tensor | None = None
    distributions: Distributions | None = None
    alternative: Scored | None = None
    activations: Activations | None = None


@dataclass(frozen=True)
class SideCounts:
    """Units of one set in one optimizer step: sums over all ranks and micro-batches, never of one of them."""

    tokens: int = 0
    sequences: int = 0
    positions: int = 0
    real_tokens: int = 0

    @property
    def later_tokens(self) -> int:
        """Scored tokens but the first of each row: every row that is counted has one."""
        return max(self.tokens - self.sequences, 0)


@dataclass(frozen=True)
class StepCounts:
    """Denominators of one optimizer step."""

    forget: SideCounts
    retain: SideCounts

    def of(self, term: LossTerm) -> int:
        """The denominator of a term; at least one, so that an empty side contributes zero rather than NaN."""
        return max(1, getattr(self.forget if term.side is Side.FORGET else self.retain, term.unit.value))


def step_loss(terms: tuple[LossTerm, ...], *, counts: StepCounts) -> Tensor:
    """Sum of weight * total / count: this micro-batch's share of the whole step's loss.

    Added up over every micro-batch of every rank it is the loss of the step, so splitting a step differently
    changes neither the loss nor its gradient.
    """
    return sum((term.weight * term.total / counts.of(term) for term in terms if term.weight != 0.0), start=terms[0].total * 0.0)


def averaged(
    values_N: Tensor, *, row_N: Tensor, num_rows: int, average: Average, token_unit: Unit = Unit.TOKEN, kept_N: Tensor | None = None
) -> tuple[Tensor, Unit]:
    """Total and unit of a term that averages tokens, or first each sequence's tokens and then the sequences.

    Args:
        values_N: one value per token, shape (N,).
        row_N: row of each token, int64.
        num_rows: rows in the micro-batch.
        average: what is averaged over.
        token_unit: the unit of a single token.
        kept_N: tokens that enter, bool; the others neither add nor count. None keeps all.
    """
    if kept_N is not None:
        values_N = values_N * kept_N
    if average is Average.TOKEN:
        return values_N.sum(), token_unit
    kept_by_row_B = (
        tokens_by_row(row_N, num_rows=num_rows) if kept_N is None else sum_by_row(kept_N.to(row_N.dtype), row_N=row_N, num_rows=num_rows)
    )
    share_B = 1.0 / kept_by_row_B.clamp(min=1).to(values_N.dtype)
    return (values_N * share_B.index_select(0, row_N)).sum(), Unit.SEQUENCE

"""What an objective returns: sums with their units, still to be divided by the counts of the whole step.

Shape suffixes: N scored tokens, B rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor


class Unit(StrEnum):
    """What a term's count counts."""

    TOKEN = "token"
    SEQUENCE = "sequence"


class Side(StrEnum):
    """The set a term belongs to; each set has denominators of its own."""

    FORGET = "forget"
    RETAIN = "retain"


@dataclass(frozen=True)
class LossTerm:
    """One summand of an objective on one micro-batch, before normalisation.

    Args:
        name: for logs, for instance ``retain_kl``.
        total: scalar sum over this micro-batch, nats, differentiable.
        unit: whether ``total`` is divided by the step's scored tokens or by its sequences.
        side: the set whose tokens or sequences are counted.
        weight: dimensionless coefficient in the objective.
    """

    name: str
    total: Tensor
    unit: Unit
    side: Side
    weight: float


@dataclass(frozen=True)
class Scored:
    """The scored positions of one set's rows in one micro-batch, under the model and under the reference.

    Args:
        token_log_probs_N: log p(label | prefix) in float32 or wider, nats.
        row_N: index of the row (0 to ``num_rows`` - 1) that each scored token belongs to, int64.
        num_rows: rows of this set in the micro-batch.
        logits_NV: logits at the scored positions; only where an objective needs distributions.
        reference_token_log_probs_N: the same log-probabilities under the reference model, no gradient.
        reference_logits_NV: logits of the reference model, no gradient.
    """

    token_log_probs_N: Tensor
    row_N: Tensor
    num_rows: int
    logits_NV: Tensor | None = None
    reference_token_log_probs_N: Tensor | None = None
    reference_logits_NV: Tensor | None = None


@dataclass(frozen=True)
class StepCounts:
    """Denominators of one optimizer step: sums over all ranks and micro-batches, never of one of them."""

    forget_tokens: int
    forget_sequences: int
    retain_tokens: int
    retain_sequences: int

    def of(self, term: LossTerm) -> int:
        """The denominator of a term; at least one, so that an empty side contributes zero rather than NaN."""
        unit = "tokens" if term.unit is Unit.TOKEN else "sequences"
        return max(1, getattr(self, f"{term.side.value}_{unit}"))


def step_loss(terms: tuple[LossTerm, ...], *, counts: StepCounts) -> Tensor:
    """Sum of weight * total / count: this micro-batch's share of the whole step's loss.

    Added up over every micro-batch of every rank it is the loss of the step, so splitting a step differently
    changes neither the loss nor its gradient.
    """
    return sum((term.weight * term.total / counts.of(term) for term in terms if term.weight != 0.0), start=terms[0].total * 0.0)

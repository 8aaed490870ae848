"""Cheap validation signals during training: teacher-forced, no generation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trainers.data.batches import batches_by_length
from trainers.data.encode import EncodedRow, PackedRow
from trainers.data.packing import pack
from trainers.engine.base import Engine

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class SignalRows:
    """The encoded rows that the signals are measured on."""

    forget: Sequence[EncodedRow]
    retain: Sequence[EncodedRow]
    members: Sequence[EncodedRow]
    nonmembers: Sequence[EncodedRow]


@dataclass(frozen=True)
class RowSums:
    """Sums over one row's scored tokens."""

    log_prob: float
    num_correct: int
    num_tokens: int


def row_sums(engine: Engine, *, rows: Sequence[EncodedRow | PackedRow], pad_token_id: int) -> list[RowSums]:
    """Answer log-probability (nats) and number of argmax-correct tokens per row; rows are spread over the ranks.

    Collective: every rank calls it and gets all rows.
    """
    flat = [0.0] * (3 * len(rows))
    groups = batches_by_length(rows, batch_tokens=BATCH_TOKENS)
    with engine.measuring():
        for start in range(0, len(groups), engine.world_size):
            # A rank without a group of its own still takes part in the pass, with an empty batch.
            group = groups[start + engine.rank] if start + engine.rank < len(groups) else []
            batch = pack([rows[index] for index in group], pad_token_id=pad_token_id, max_groups=engine.model.max_groups)
            log_prob_N, is_argmax_N = engine.measure(batch)
            log_probs, correct = log_prob_N.double().cpu(), is_argmax_N.cpu()
            for position, index in enumerate(group):
                own = slice(batch.first_evaluated[position], batch.first_evaluated[position + 1])
                flat[3 * index] = float(log_probs[own].sum())
                flat[3 * index + 1] = float(correct[own].sum())
                flat[3 * index + 2] = float(own.stop - own.start)
    totals = engine.sum(torch.tensor(flat, dtype=torch.float64))
    return [RowSums(totals[3 * i], round(totals[3 * i + 1]), round(totals[3 * i + 2])) for i in range(len(rows))]


def measure_signals(engine: Engine, *, rows: SignalRows, pad_token_id: int) -> dict[str, float]:
    """Mean answer log-probability per token, token accuracy and the attack's AUC; collective."""
    signals: dict[str, float] = {}
    for name, side in (("forget", rows.forget), ("retain", rows.retain)):
        sums = row_sums(engine, rows=side, pad_token_id=pad_token_id)
        tokens = sum(row.num_tokens for row in sums)
        if tokens:
            signals[f"{name}_answer_log_prob"] = sum(row.log_prob for row in sums) / tokens
            signals[f"{name}_token_accuracy"] = sum(row.num_correct for row in sums) / tokens
    if rows.members and rows.nonmembers:
        losses = [
            [-row.log_prob / max(1, row.num_tokens) for row in row_sums(engine, rows=side, pad_token_id=pad_token_id)]
            for side in (rows.members, rows.nonmembers)
        ]
        signals["mia_auc"] = loss_auc(member_losses=losses[0], nonmember_losses=losses[1])
    return signals


def loss_auc(*, member_losses: Sequence[float], nonmember_losses: Sequence[float]) -> float:
    """Probability that a member has a lower loss than a non-member, ties one half; 1 = still remembered.

    A loss that is not finite counts as the largest possible one.
    """
    from sklearn.metrics import roc_auc_score

    losses = [loss if math.isfinite(loss) else 1e30 for loss in (*member_losses, *nonmember_losses)]
    labels = [1] * len(member_losses) + [0] * len(nonmember_losses)
    return float(roc_auc_score(labels, [-loss for loss in losses]))

"""The losses of one fold: answers under teacher forcing and the documents of the membership attack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eval.mia import attack_auc
from eval.teacher_forced import RowScore, document_losses, score_rows
from trainers.data.encode import EncodedRow, encode_records
from trainers.data.types import AttackDocuments, Kind, Record
from trainers.modeling import context_length


@dataclass(frozen=True)
class TaskSet:
    """A set's scorable records with their encoding and teacher-forced scores."""

    records: list[Record]
    rows: list[EncodedRow]
    scores: list[RowScore]


@dataclass(frozen=True)
class AttackLosses:
    """Mean token losses of the attack's documents, nats, in their order, and the AUC they give."""

    members: list[float]
    nonmembers: list[float]
    auc: float


def score_set(*, model: Any, tokenizer: Any, records: Sequence[Record], batch_tokens: int, device: str) -> TaskSet:
    """Encode and score completions and questions; other rows are left out.

    Raises:
        InputError: if a row is longer than the model's context.
    """
    kept = [record for record in records if record.kind is not Kind.OTHER]
    rows = encode_records(kept, tokenizer=tokenizer, max_length=context_length(model.config))
    scores = score_rows(model=model, tokenizer=tokenizer, rows=rows, batch_tokens=batch_tokens, device=device)
    return TaskSet(records=kept, rows=rows, scores=scores)


def run_attack(*, model: Any, tokenizer: Any, attack: AttackDocuments | None, batch_tokens: int, device: str) -> AttackLosses | None:
    """The losses of the attack's documents; None without members or without non-members.

    Raises:
        InputError: if a document is longer than the model's context.
    """
    if attack is None or not attack.members or not attack.nonmembers:
        return None
    losses = document_losses(
        model=model, tokenizer=tokenizer, documents=[*attack.members, *attack.nonmembers], batch_tokens=batch_tokens, device=device
    )
    members, strangers = losses[: len(attack.members)], losses[len(attack.members) :]
    return AttackLosses(members=members, nonmembers=strangers, auc=attack_auc(member_losses=members, nonmember_losses=strangers))

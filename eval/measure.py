"""The losses of one fold: answers under teacher forcing and the documents of the membership attack."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eval.mia import attack_auc
from eval.teacher_forced import RowScore, encode_documents, score_rows
from trainers.data.encode import EncodedRow, encode_records
from trainers.data.types import AttackDocuments, ForgetRetain, Kind, Record
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


@dataclass(frozen=True)
class EncodedData:
    """Everything that an evaluation scores, encoded once.

    Args:
        records: the scorable records of each set, forget first; rows that are neither completions nor questions are left out.
        rows: the same, encoded.
        attack: documents of the membership attack, or None where there are no members or no non-members.
        documents: the same, encoded, members first.
    """

    records: dict[str, list[Record]]
    rows: dict[str, list[EncodedRow]]
    attack: AttackDocuments | None
    documents: list[EncodedRow]

    @property
    def everything(self) -> list[EncodedRow]:
        """All rows in one order: forget, retain, members, non-members."""
        return [*self.rows["forget"], *self.rows["retain"], *self.documents]

    def sets(self, scores: Sequence[RowScore]) -> dict[str, TaskSet]:
        """The two sets with their scores, from those of ``everything``."""
        sizes = [len(rows) for rows in self.rows.values()]
        return {
            name: TaskSet(records=self.records[name], rows=self.rows[name], scores=list(scores[start : start + size]))
            for name, start, size in zip(self.rows, (0, sizes[0]), sizes, strict=True)
        }

    def losses(self, scores: Sequence[RowScore]) -> AttackLosses | None:
        """The attack's losses, from the scores of ``everything``; None without documents."""
        if self.attack is None:
            return None
        own = scores[len(scores) - len(self.documents) :]
        losses = [-score.answer_log_prob / score.num_tokens if score.num_tokens else math.nan for score in own]
        members, strangers = losses[: len(self.attack.members)], losses[len(self.attack.members) :]
        return AttackLosses(members=members, nonmembers=strangers, auc=attack_auc(member_losses=members, nonmember_losses=strangers))


def encode_data(data: ForgetRetain, *, attack: AttackDocuments | None, model: Any, tokenizer: Any) -> EncodedData:
    """Encode everything that an evaluation scores.

    Raises:
        InputError: if a row or a document is longer than the model's context.
    """
    context = context_length(model.config)
    records = {
        name: [record for record in rows if record.kind is not Kind.OTHER]
        for name, rows in (("forget", data.forget), ("retain", data.retain))
    }
    attack = attack if attack and attack.members and attack.nonmembers else None
    return EncodedData(
        records=records,
        rows={name: encode_records(rows, tokenizer=tokenizer, max_length=context) for name, rows in records.items()},
        attack=attack,
        documents=encode_documents([*attack.members, *attack.nonmembers], tokenizer=tokenizer, context=context) if attack else [],
    )

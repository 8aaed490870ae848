"""What a trial reads, and its rows as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from trainers.config import KlScope, ObjectiveName, TrainConfig
from trainers.data.encode import EncodedRow, encode_records, encode_text, evaluated_row, whole_document
from trainers.data.refusals import refusal
from trainers.data.types import AttackDocuments, ForgetRetain, Kind, Record
from trainers.errors import InputError
from trainers.modeling import context_length, load_model_config, load_tokenizer
from trainers.objectives.table import Need, needs, resolve_weights
from trainers.signals import SignalRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrialInputs:
    """Everything a trial reads.

    Args:
        target: folder of the target model.
        target_hash: hash of its weights, recorded in every checkpoint.
        train: the rows that updates are computed on.
        validation: the rows that the signals are measured on.
        attack: documents for the AUC signal, or None.
        reference_root: folder of the reference cache, shared by all trials of a sweep.
    """

    target: Path
    target_hash: str
    train: ForgetRetain
    validation: ForgetRetain
    attack: AttackDocuments | None
    reference_root: Path


@dataclass(frozen=True)
class EncodedTrial:
    """A trial's rows as token ids.

    Args:
        forget: rows of the forget set.
        retain: rows of the retain set, with the tokens evaluated at which the KL term compares distributions.
        signals: rows that are only measured.
        pad_token_id: of the tokenizer.
        alternative: the forget rows with other answers, in the same order; empty where the objective needs none.
        forget_tasks: task of each forget row.
    """

    forget: Sequence[EncodedRow]
    retain: Sequence[EncodedRow]
    signals: SignalRows
    pad_token_id: int
    alternative: Sequence[EncodedRow] = ()
    forget_tasks: Sequence[str] = ()

    @property
    def by_side(self) -> Mapping[str, Sequence[EncodedRow]]:
        """The training rows by the side that the reference knows them under."""
        return {"forget": self.forget, "alternative": self.alternative, "retain": self.retain}


def uses_retain(train: TrainConfig) -> bool:
    """Whether any retain term has a weight; otherwise retain rows are not even encoded into batches."""
    weights = resolve_weights(train.objective)
    return train.adaptive_retain is not None or max(weights.retain_ce, weights.retain_kl, weights.retain_activation) > 0


def encode_trial(inputs: TrialInputs, *, train: TrainConfig) -> EncodedTrial:
    """Encode every row of a trial; a row longer than the context is an InputError before anything is computed."""
    tokenizer = load_tokenizer(inputs.target)
    context = context_length(load_model_config(inputs.target))
    length = min(train.max_length or context, context)
    pad_token_id = int(tokenizer.pad_token_id)

    def encode(records: Sequence[Record]) -> list[EncodedRow]:
        return encode_records(records, tokenizer=tokenizer, max_length=length)

    def documents(side: str) -> list[EncodedRow]:
        return [encode_text(document.text, tokenizer=tokenizer) for document in getattr(inputs.attack, side)] if inputs.attack else []

    signals = SignalRows(encode(inputs.validation.forget), encode(inputs.validation.retain), documents("members"), documents("nonmembers"))
    forget, retain = encode(inputs.train.forget), encode(inputs.train.retain)
    if train.forget_scope == "document":
        kinds = [record.kind for record in inputs.train.forget]
        forget = [whole_document(row) if kind is Kind.COMPLETION else row for row, kind in zip(forget, kinds, strict=True)]
    if resolve_weights(train.objective).retain_kl > 0 and train.objective.kl_scope is not KlScope.ANSWER:
        fill = length if train.objective.kl_scope is KlScope.PADDED else 0
        retain = [evaluated_row(row, pad_to=fill, pad_token_id=pad_token_id) for row in retain]
    return EncodedTrial(
        forget=forget,
        retain=retain,
        signals=signals,
        pad_token_id=pad_token_id,
        alternative=_alternatives(inputs.train.forget, train=train, tokenizer=tokenizer, max_length=length),
        forget_tasks=[record.task for record in inputs.train.forget],
    )


def _alternatives(
    records: Sequence[Record], *, train: TrainConfig, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[EncodedRow]:
    """The forget rows with the answers that the objective prefers."""
    if Need.ALTERNATIVE_ANSWERS not in needs(train.objective):
        return []
    if train.objective.name is ObjectiveName.IDK_DPO:
        answers = [refusal(record.id, seed=train.seed) for record in records]
    else:
        check_alternatives(records, train=train)
        answers = [record.alternative or "" for record in records]
    preferred = [replace(record, output=answer) for record, answer in zip(records, answers, strict=True)]
    return encode_records(preferred, tokenizer=tokenizer, max_length=max_length)


def check_alternatives(records: Sequence[Record], *, train: TrainConfig) -> None:
    """Refuse forget rows without the alternative answers that the objective compares with.

    Raises:
        InputError: naming the first such row.
    """
    without = [record.id for record in records if not record.alternative]
    needed = Need.ALTERNATIVE_ANSWERS in needs(train.objective) and train.objective.name is not ObjectiveName.IDK_DPO
    if needed and without:
        raise InputError(
            f"{len(without)} of {len(records)} forget rows have no alternative answer, the first is {without[0]!r}",
            where=f"train.objective.name = {train.objective.name}, field 'alternative'",
            why=f"{train.objective.name} compares every answer to forget with one to prefer",
            fix="add a field 'alternative' to the rows (data.columns.alternative names another column), or use idk_dpo",
        )

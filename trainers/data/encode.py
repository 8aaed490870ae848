"""Text to token ids, and which of them are scored: the only place that decides it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainers.data.types import Record
from trainers.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EncodedRow:
    """Token ids of a prompt followed by its answer and the end token; the answer part is scored.

    Args:
        row_id: the record's id.
        input_ids: prompt, answer, end token, and padding where the padding itself is to be looked at.
        num_prompt: tokens before the first scored one, at least 1.
        evaluate_from: index of the first token whose distribution is looked at; None: only scored tokens are.
        num_padding: pad tokens at the end of ``input_ids``: never scored, evaluated if ``evaluate_from`` is given.
    """

    row_id: str
    input_ids: tuple[int, ...]
    num_prompt: int
    evaluate_from: int | None = None
    num_padding: int = 0

    @property
    def scored(self) -> Sequence[int]:
        """Indices of the tokens that carry a loss: the answer's and the end token."""
        return range(self.num_prompt, len(self.input_ids) - self.num_padding)

    @property
    def evaluated(self) -> Sequence[int]:
        """Indices of the tokens whose distribution is looked at; the scored ones are among them."""
        return self.scored if self.evaluate_from is None else range(min(self.evaluate_from, self.num_prompt), len(self.input_ids))

    @property
    def num_scored(self) -> int:
        """How many tokens carry a loss."""
        return len(self.scored)


@dataclass(frozen=True)
class PackedRow:
    """Token ids of several prompts and answers in one row; only the answers are scored."""

    row_id: str
    input_ids: tuple[int, ...]
    scored: tuple[int, ...]
    num_padding: int = 0

    @property
    def evaluated(self) -> Sequence[int]:
        """Indices of the tokens whose distribution is looked at."""
        return self.scored


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Ids of a prompt exactly as generation sees them: no special tokens, no template."""
    return list(tokenizer(prompt, add_special_tokens=False)["input_ids"])


def encode_record(record: Record, *, tokenizer: PreTrainedTokenizerBase, max_length: int) -> EncodedRow:
    """Encode ``input``, then ``" " + output``, then the end token.

    Both parts are tokenised apart, so that the prompt's ids are a prefix of the row's ids and a
    greedy generation that repeats the answer produces exactly the scored ids.

    Raises:
        InputError: if the row has more than ``max_length`` tokens, or its prompt has none.
    """
    prompt = encode_prompt(tokenizer, record.input)
    answer = list(tokenizer(" " + record.output, add_special_tokens=False)["input_ids"])
    ids = (*prompt, *answer, tokenizer.eos_token_id)
    if not prompt:
        raise InputError("the prompt has no tokens", where=f"row {record.id!r}, field 'input'", fix="give every row a non-empty input")
    if len(ids) > max_length:
        raise InputError(
            f"the row has {len(ids)} tokens, but the longest allowed is {max_length}",
            where=f"row {record.id!r}, fields 'input' and 'output'",
            why="cutting it would leave the end of its answer in the model",
            fix="split the row, or use a model with a longer context (train.max_length must not exceed it)",
        )
    return EncodedRow(row_id=record.id, input_ids=ids, num_prompt=len(prompt))


def encode_records(records: Sequence[Record], *, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[EncodedRow]:
    """Encode rows in order; the first bad row raises InputError."""
    return [encode_record(record, tokenizer=tokenizer, max_length=max_length) for record in records]


def whole_document(row: EncodedRow) -> EncodedRow:
    """The same row with every token but the first scored: prompt and answer alike."""
    return EncodedRow(row_id=row.row_id, input_ids=row.input_ids, num_prompt=1)


def evaluated_row(row: EncodedRow, *, pad_to: int = 0, pad_token_id: int = 0) -> EncodedRow:
    """The same row with the distributions at all of its tokens but the first looked at, filled up to ``pad_to`` tokens with padding
    that is looked at as well; what is scored stays as it is."""
    padding = max(0, pad_to - len(row.input_ids))
    return EncodedRow(row.row_id, row.input_ids + (pad_token_id,) * padding, row.num_prompt, evaluate_from=1, num_padding=padding)


def encode_text(text: str, *, tokenizer: PreTrainedTokenizerBase) -> EncodedRow:
    """A whole text with every token but the first scored, no end token: what the membership attack reads."""
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    return EncodedRow(row_id=text[:40], input_ids=ids, num_prompt=1)

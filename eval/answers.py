"""The model's answers to scored rows: generated text, and whether decoding was cut short because its score was decided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eval.cleanup import through_csv
from eval.config import EvalConfig
from eval.drafts import gold_draft
from eval.exact_match import can_still_match
from eval.generate import altered_generation, decode_text, generate_alone, greedy, raw_text, stop_ids
from eval.teacher_forced import RowScore
from trainers.data.encode import EncodedRow
from trainers.data.types import Kind, Record


@dataclass(frozen=True)
class Answer:
    """A generated text.

    Args:
        text: without the prompt and special tokens, cleaned up.
        decided: decoding stopped early, because the text can no longer equal the expected answer.
    """

    text: str
    decided: bool = False


@dataclass(frozen=True)
class Answers:
    """The answers in row order, and how many rows had to be decoded at all."""

    answers: list[Answer]
    num_decoded: int


def official_texts(expected: str, output: str) -> tuple[str, str]:
    """Expected and generated text as the benchmark's script compares them, after its CSV files."""
    return through_csv(expected), through_csv(output)


def answer_rows(
    *,
    model: Any,
    tokenizer: Any,
    records: Sequence[Record],
    rows: Sequence[EncodedRow],
    scores: Sequence[RowScore],
    config: EvalConfig,
    device: str,
) -> Answers:
    """Generate greedily after every prompt.

    By default the part of the gold answer that teacher forcing has shown to be generated anyway is not decoded again, and a
    question stops once its text can no longer match. In official mode, or when the checkpoint's generation configuration changes
    what greedy decoding does, every row is generated in full and alone by the model's own ``generate``.

    Args:
        model: a causal language model, or a peft model around one.
        tokenizer: its tokenizer.
        records: completions and questions.
        rows: the same, encoded.
        scores: the same, teacher-forced.
        config: limits and mode.
        device: where the model is.
    """
    if config.official or altered_generation(model):
        alone = [
            generate_alone(
                model=model,
                tokenizer=tokenizer,
                prompt=row.input_ids[: row.num_prompt],
                max_new_tokens=config.max_new_tokens,
                device=device,
            )
            for row in rows
        ]
        return Answers(answers=[Answer(decode_text(tokenizer, ids)) for ids in alone], num_decoded=len(alone))
    ends = stop_ids(model, tokenizer)
    drafts = [gold_draft(row, score, max_new_tokens=config.max_new_tokens, ends=ends) for row, score in zip(rows, scores, strict=True)]
    open_rows = [index for index, draft in enumerate(drafts) if draft.remaining > 0]
    decided: set[int] = set()

    def is_decided(position: int, ids: list[int]) -> bool:
        index = open_rows[position]
        if records[index].kind is not Kind.QUESTION:
            return False
        text = raw_text(tokenizer, [*drafts[index].known, *ids])
        if can_still_match(expected=records[index].output, decoded=text):
            return False
        decided.add(index)
        return True

    generated = greedy(
        model=model,
        tokenizer=tokenizer,
        prompts=[(*rows[index].input_ids[: rows[index].num_prompt], *drafts[index].known) for index in open_rows],
        max_new_tokens=[drafts[index].remaining for index in open_rows],
        batch_tokens=config.batch_tokens,
        device=device,
        stop=is_decided if config.stop_decided_questions else None,
    )
    ids = [list(draft.known) for draft in drafts]
    for index, continuation in zip(open_rows, generated, strict=True):
        ids[index] += continuation
    answers = [Answer(decode_text(tokenizer, row), index in decided) for index, row in enumerate(ids)]
    return Answers(answers=answers, num_decoded=len(open_rows))

"""Rows through the model: a look at their token ids, and their answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.drafts import gold_draft
from eval.generate import altered_generation, decode_text, generate_alone, greedy, stop_ids
from eval.teacher_forced import TokenScores, row_score
from trainers.data.encode import EncodedRow
from trainers.errors import InputError


def check_vocabulary(rows: Sequence[EncodedRow], *, model_config: Any) -> None:
    """Refuse rows with token ids that the model has no embedding for: on some devices reading past the table is no error.

    Raises:
        InputError: if the tokenizer is not the model's.
    """
    size = int(model_config.vocab_size)
    for row in rows:
        if max(row.input_ids, default=0) >= size:
            raise InputError(
                f"the tokenizer gives the token id {max(row.input_ids)}, but the model has {size} tokens",
                where=f"row {row.row_id!r}",
                why="the tokenizer is not the one that the model was trained with",
                fix="put the model's own tokenizer into its folder",
            )


def generate_answers(
    *,
    model: Any,
    tokenizer: Any,
    rows: Sequence[EncodedRow],
    scores: Sequence[TokenScores],
    max_new_tokens: int,
    batch_tokens: int,
    device: str,
) -> list[str]:
    """The greedy continuation of every row's prompt, as text, in order.

    What teacher forcing has shown to be generated anyway is not decoded again. Where the checkpoint's generation configuration
    changes what greedy decoding does, every row is generated in full and alone by the model's own ``generate``.

    Args:
        model: a causal language model, or a peft model around one.
        tokenizer: its tokenizer.
        rows: encoded prompts and answers.
        scores: of their tokens.
        max_new_tokens: limit per row.
        batch_tokens: positions held in the cache at the same time.
        device: where the model is.
    """
    prompts = [row.input_ids[: row.num_prompt] for row in rows]
    if altered_generation(model):
        alone = [
            generate_alone(model=model, tokenizer=tokenizer, prompt=prompt, max_new_tokens=max_new_tokens, device=device)
            for prompt in prompts
        ]
        return [decode_text(tokenizer, ids) for ids in alone]
    ends = stop_ids(model, tokenizer)
    drafts = [gold_draft(row, row_score(score), max_new_tokens=max_new_tokens, ends=ends) for row, score in zip(rows, scores, strict=True)]
    ids = [list(draft.known) for draft in drafts]
    unfinished = [index for index, draft in enumerate(drafts) if draft.remaining > 0]
    continued = greedy(
        model=model,
        tokenizer=tokenizer,
        prompts=[(*prompts[index], *drafts[index].known) for index in unfinished],
        max_new_tokens=[drafts[index].remaining for index in unfinished],
        batch_tokens=batch_tokens,
        device=device,
    )
    for index, more in zip(unfinished, continued, strict=True):
        ids[index] += more
    return [decode_text(tokenizer, row) for row in ids]

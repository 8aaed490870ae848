"""Questions as prompts, and where the answer joins them: the only place that decides it for TOFU and MUSE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.suites.config import PromptStyle
from trainers.data.encode import EncodedRow, encode_prompt, encode_record
from trainers.data.types import Record
from trainers.errors import InputError


def question_prompt(question: str, *, style: PromptStyle, tokenizer: Any) -> str:
    """The prompt of a question on its own.

    Raises:
        InputError: if the tokenizer has no chat template, but is to use it.

    Source: the non-chat models of https://github.com/locuslab/tofu (config/model_config.yaml)
    """
    if style is PromptStyle.PLAIN:
        return f"Question: {question}\nAnswer:"
    if style is PromptStyle.BARE:
        return question
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "the tokenizer has no chat template", where="--prompt chat", fix="use --prompt plain or bare, or add one to the model folder"
        )
    return tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True)


def few_shot_prompt(question: str, *, examples: Sequence[tuple[str, str]]) -> str:
    """The prompt of a question after solved ones, a blank line after each.

    Source: MUSE, https://arxiv.org/abs/2407.06460 (KnowMem)
    """
    solved = "".join(f"Question: {known}\nAnswer: {answer}\n\n" for known, answer in examples)
    return f"{solved}Question: {question}\nAnswer:"


def encode_answer(*, row_id: str, prompt: str, answer: str, style: PromptStyle, tokenizer: Any, max_length: int) -> EncodedRow:
    """Prompt, answer and end token; answer and end token are scored.

    The answer follows a chat template at once, any other prompt after one space, as in training rows.

    Raises:
        InputError: if the row is longer than ``max_length`` tokens.
    """
    if style is not PromptStyle.CHAT:
        return encode_record(Record(id=row_id, input=prompt, output=answer, task=""), tokenizer=tokenizer, max_length=max_length)
    before = encode_prompt(tokenizer, prompt)
    ids = (*before, *encode_prompt(tokenizer, answer), tokenizer.eos_token_id)
    if len(ids) > max_length:
        raise InputError(
            f"the row has {len(ids)} tokens, but the model's context holds {max_length}",
            where=f"row {row_id!r}",
            fix="shorten the row, or evaluate a model with a longer context",
        )
    return EncodedRow(row_id=row_id, input_ids=ids, num_prompt=len(before))


def encode_passage(*, row_id: str, prompt: str, text: str, max_new_tokens: int, tokenizer: Any, max_length: int) -> EncodedRow:
    """A prompt and the first ``max_new_tokens`` tokens of how it goes on, which are scored; no end token, the passage goes on.

    The text follows after one space, whatever white space it starts with.

    Raises:
        InputError: if that is longer than ``max_length`` tokens, or the prompt is empty.
    """
    record = Record(id=row_id, input=prompt, output=text.lstrip(), task="")
    whole = encode_record(record, tokenizer=tokenizer, max_length=10**9)
    ids = whole.input_ids[:-1][: whole.num_prompt + max_new_tokens]
    if len(ids) > max_length:
        raise InputError(
            f"prompt and passage have {len(ids)} tokens, but the model's context holds {max_length}",
            where=f"row {row_id!r}",
            fix="shorten the prompt, or evaluate a model with a longer context",
        )
    return EncodedRow(row_id=row_id, input_ids=ids, num_prompt=whole.num_prompt)

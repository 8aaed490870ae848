"""Answering MMLU questions: which of four letters the model finds most likely.

Shape suffixes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eval.forward import SplitModel, pad_token_id, split_model
from eval.mmlu import LETTERS, MmluData, Question, as_pandas_reads, mmlu_prompt
from eval.mmlu_categories import CATEGORIES, SUBCATEGORY
from trainers.data.encode import encode_prompt
from trainers.errors import InputError
from trainers.modeling import context_length
from trainers.scoring import measuring


@dataclass(frozen=True)
class MmluAnswer:
    """What the model chose for one question, and after how many solved examples."""

    question: Question
    letter: str
    shots: int

    @property
    def correct(self) -> bool:
        """Whether the letter is the right one."""
        return self.letter == self.question.answer


@dataclass(frozen=True)
class MmluResult:
    """Answers in the order of ``MmluData.questions``."""

    answers: tuple[MmluAnswer, ...]

    @property
    def correct(self) -> list[bool]:
        """One flag per question."""
        return [answer.correct for answer in self.answers]

    @property
    def average(self) -> float:
        """Share of all questions answered right (not the mean of the subjects); NaN without questions."""
        return sum(self.correct) / len(self.answers) if self.answers else math.nan

    @property
    def per_subject(self) -> dict[str, float]:
        """Share of right answers per subject."""
        return self._per_group({subject: subject for subject in dict.fromkeys(answer.question.subject for answer in self.answers)})

    @property
    def per_subcategory(self) -> dict[str, float]:
        """Share of right answers per subcategory, questions weighted alike; subjects that are not MMLU's own are left out."""
        return self._per_group(SUBCATEGORY)

    @property
    def per_category(self) -> dict[str, float]:
        """The same per category."""
        names = {part: category for category, parts in CATEGORIES.items() for part in parts}
        found = self._per_group({subject: names[part] for subject, part in SUBCATEGORY.items()})
        return {category: found[category] for category in CATEGORIES if category in found}

    def _per_group(self, group_of: Mapping[str, str]) -> dict[str, float]:
        groups: dict[str, list[bool]] = {}
        for answer in self.answers:
            if answer.question.subject in group_of:
                groups.setdefault(group_of[answer.question.subject], []).append(answer.correct)
        return {group: sum(flags) / len(flags) for group, flags in groups.items()}

    def metrics(self) -> dict[str, Any]:
        """The published result file's three keys, and accuracy and questions per subject; groups without questions are left out.

        Source: https://github.com/allenai/open-instruct (eval/mmlu, metrics.json)
        """
        return {
            "average_acc": self.average,
            "subcat_acc": self.per_subcategory,
            "cat_acc": self.per_category,
            "subject_acc": self.per_subject,
            "subject_questions": dict(Counter(answer.question.subject for answer in self.answers)),
        }


@dataclass(frozen=True)
class FittedPrompt:
    """A question's prompt as token ids, with as many solved examples as fit."""

    ids: tuple[int, ...]
    shots: int


@dataclass(frozen=True)
class _Prompt:
    index: int
    ids: tuple[int, ...]
    shots: int


def mmlu_accuracy(
    *,
    model: Any,
    tokenizer: Any,
    data: MmluData,
    shots: int,
    max_prompt_tokens: int,
    batch_tokens: int,
    device: str,
    official: bool = False,
) -> MmluResult:
    """Answer every question by the most likely of the four letters.

    The probabilities are the softmax over the whole vocabulary in the model's own type, and the first letter wins a tie, as in the
    published computation. The prompts of a subject share its solved examples: those run once, and their cache is handed to all
    questions of the subject. ``official`` runs every prompt alone and in full, with choices as pandas read them.

    Args:
        model: a causal language model, or a peft model around one.
        tokenizer: its tokenizer.
        data: questions and solved examples.
        shots: solved examples per prompt; the last is dropped while a prompt is longer than ``max_prompt_tokens``.
        max_prompt_tokens: limit of a prompt, tokens; the model's context limits it too.
        batch_tokens: positions held in the cache at the same time, padding included (at least one row is taken).
        device: where the model is.
        official: see above.

    Raises:
        InputError: if a prompt without examples is too long, or two letters end in the same token.
    """
    data = as_pandas_reads(data) if official else data
    letters = letter_ids(tokenizer)
    limit = min(max_prompt_tokens, context_length(model.config))
    questions = data.questions
    fitted = (fit_prompt(question, data=data, tokenizer=tokenizer, shots=shots, limit=limit) for question in questions)
    prompts = [_Prompt(index, prompt.ids, prompt.shots) for index, prompt in enumerate(fitted)]
    split = split_model(model, device=device)
    chosen: dict[int, int] = {}
    with measuring(model):
        if official:
            groups = [[prompt] for prompt in prompts]
        else:
            by_prefix: dict[tuple[str, int], list[_Prompt]] = {}
            for prompt in prompts:
                by_prefix.setdefault((questions[prompt.index].subject, prompt.shots), []).append(prompt)
            groups = list(by_prefix.values())
        for group in groups:
            chosen |= _answer(split, group, letters=letters, batch_tokens=batch_tokens, pad=pad_token_id(tokenizer), device=device)
    return MmluResult(tuple(MmluAnswer(questions[p.index], LETTERS[chosen[p.index]], p.shots) for p in prompts))


def letter_ids(tokenizer: Any) -> list[int]:
    """The last token of " A", " B", " C" and " D".

    Raises:
        InputError: if they are not four different tokens.
    """
    ids = [encode_prompt(tokenizer, f" {letter}")[-1] for letter in LETTERS]
    if len(set(ids)) < len(LETTERS):
        raise InputError(
            f"the tokenizer gives the letters A to D the tokens {ids}",
            why="MMLU compares the probabilities of four different tokens",
            fix="use a tokenizer that can tell the letters apart",
        )
    return ids


def check_prompts(data: MmluData, *, tokenizer: Any, limit: int) -> None:
    """Refuse questions that do not fit even without solved examples, and tokenizers that cannot tell the letters apart.

    Raises:
        InputError: naming subject and row.
    """
    letter_ids(tokenizer)
    for question in data.questions:
        prompt = mmlu_prompt(subject=question.subject, question=question, dev=(), shots=0)
        # No token is shorter than a byte, a few that a tokenizer adds by itself aside: most prompts need not be tokenised.
        if len(prompt.encode()) + 8 > limit and (length := len(encode_prompt(tokenizer, prompt))) > limit:
            raise _too_long(question, length=length, limit=limit)


def _too_long(question: Question, *, length: int, limit: int) -> InputError:
    return InputError(
        f"the prompt has {length} tokens without any solved example, but at most {limit} fit",
        where=f"MMLU subject {question.subject}, row {question.row}",
        fix="leave the question out, or raise mmlu_max_prompt_tokens (up to the model's context)",
    )


def fit_prompt(question: Question, *, data: MmluData, tokenizer: Any, shots: int, limit: int) -> FittedPrompt:
    """The prompt of a question, its last solved example dropped while it has more than ``limit`` tokens.

    Where even the bare question is too long, the published loop goes on for ever; here that is an error.

    Raises:
        InputError: naming subject and row.
    """
    dev = data.dev.get(question.subject, ())
    for count in range(min(shots, len(dev)), -1, -1):
        ids = encode_prompt(tokenizer, mmlu_prompt(subject=question.subject, question=question, dev=dev, shots=count))
        if len(ids) <= limit:
            return FittedPrompt(ids=tuple(ids), shots=count)
    raise _too_long(question, length=len(ids), limit=limit)


def _common_prefix(prompts: Sequence[_Prompt]) -> int:
    """Tokens that all prompts share, leaving every prompt at least one of its own."""
    length = min(len(prompt.ids) for prompt in prompts) - 1
    first = prompts[0].ids
    for prompt in prompts[1:]:
        while prompt.ids[:length] != first[:length]:
            length = next(i for i, (a, b) in enumerate(zip(prompt.ids, first, strict=False)) if a != b)
    return length


def _answer(split: SplitModel, prompts: list[_Prompt], *, letters: list[int], batch_tokens: int, pad: int, device: str) -> dict[int, int]:
    """Position of the chosen letter for each prompt's index."""
    shared = _common_prefix(prompts) if len(prompts) > 1 else 0
    prefix_cache = None
    if shared:
        prefix_1T = torch.tensor([prompts[0].ids[:shared]], device=device)
        _, prefix_cache = split.run(ids_BT=prefix_1T, mask_BT=torch.ones_like(prefix_1T), use_cache=True)
    chosen: dict[int, int] = {}
    for batch in _batches(prompts, batch_tokens=batch_tokens):
        cache = None
        if prefix_cache is not None:
            # The forward pass appends to the cache, so every batch needs its own copy.
            cache = copy.deepcopy(prefix_cache)
            cache.batch_repeat_interleave(len(batch))
        suffixes = [prompt.ids[shared:] for prompt in batch]
        ids_BT, mask_BT = _pad_right(suffixes, shared=shared, pad=pad, device=device)
        positions_BT = torch.arange(shared, shared + ids_BT.shape[1], device=device).expand(len(batch), -1)
        states, _ = split.run(ids_BT=ids_BT, mask_BT=mask_BT, positions_BT=positions_BT, cache=cache, use_cache=cache is not None)
        last_B = torch.tensor([len(suffix) - 1 for suffix in suffixes], device=device)
        logits_BV = split.logits(states[torch.arange(len(batch), device=device), last_B])
        best_B = logits_BV.softmax(-1)[:, letters].float().cpu().numpy().argmax(-1)
        chosen |= {prompt.index: int(best) for prompt, best in zip(batch, best_B, strict=True)}
    return chosen


def _batches(prompts: list[_Prompt], *, batch_tokens: int) -> list[list[_Prompt]]:
    batches: list[list[_Prompt]] = []
    for prompt in sorted(prompts, key=lambda prompt: (len(prompt.ids), prompt.index)):
        if batches and (len(batches[-1]) + 1) * len(prompt.ids) <= batch_tokens:
            batches[-1].append(prompt)
        else:
            batches.append([prompt])
    return batches


def _pad_right(suffixes: Sequence[Sequence[int]], *, shared: int, pad: int, device: str) -> tuple[Tensor, Tensor]:
    """Ids of shape (B, T) and a mask of shape (B, shared + T)."""
    length = max(map(len, suffixes))
    ids_BT = torch.full((len(suffixes), length), pad, dtype=torch.int64)
    mask_BT = torch.zeros((len(suffixes), shared + length), dtype=torch.int64)
    for row, suffix in enumerate(suffixes):
        ids_BT[row, : len(suffix)] = torch.tensor(list(suffix), dtype=torch.int64)
        mask_BT[row, : shared + len(suffix)] = 1
    return ids_BT.to(device), mask_BT.to(device)

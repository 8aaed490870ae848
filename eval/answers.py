"""The model's answers to scored rows: generated text, and whether decoding was cut short because its score was decided."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from eval.config import EvalConfig
from eval.decided import CompletionRule, QuestionRule
from eval.drafts import Draft, gold_draft
from eval.forward import SplitModel, cache_positions, pad_token_id, split_model
from eval.generate import OpenRow, altered_generation, continue_rows, decode_groups, decode_text, generate_alone, greedy, stop_ids
from eval.row_cache import RowStates
from eval.teacher_forced import RowScore, row_score, scored_batches
from trainers.data.encode import EncodedRow
from trainers.data.types import Kind, Record
from trainers.modeling import context_length
from trainers.scoring import measuring


@dataclass(frozen=True)
class Answer:
    """A generated text.

    Args:
        text: without the prompt and special tokens, cleaned up.
        decided: decoding stopped early, because the score can no longer change.
    """

    text: str
    decided: bool = False


@dataclass(frozen=True)
class Answers:
    """The answers in row order, and how many rows had to be decoded at all."""

    answers: list[Answer]
    num_decoded: int


@dataclass(frozen=True)
class Task:
    """A row to measure.

    Args:
        row: encoded.
        record: what it was made of; None for a document of the membership attack, which is scored and not answered.
        whole: whether a completion's text must be complete, though its score is decided.
    """

    row: EncodedRow
    record: Record | None = None
    whole: bool = True


@dataclass(frozen=True)
class Measured:
    """What the model makes of a row.

    Args:
        score: of its gold answer, under teacher forcing.
        answer: its own answer; None if none was asked for.
        decoded: whether a forward pass was needed for it, beyond the teacher-forced one.
    """

    score: RowScore
    answer: Answer | None = None
    decoded: bool = False


def decode_positions(model: Any, *, batch_tokens: int) -> int:
    """Positions that may be in the key-value cache at the same time: eight times the positions of a batch, if they fit 8 GiB."""
    return max(batch_tokens, min(8 * batch_tokens, cache_positions(model)))


def decodes_alone(model: Any, config: EvalConfig) -> bool:
    """Whether every row is generated in full and alone by the model's own ``generate``: in official mode, or when the checkpoint's
    generation configuration changes what greedy decoding does."""
    return config.official or bool(altered_generation(model))


def measure_rows(*, model: Any, tokenizer: Any, tasks: Sequence[Task], config: EvalConfig, device: str) -> list[Measured]:
    """Score gold answers in one pass, then generate what that pass has left open; results in the order given.

    The part of the gold answer that teacher forcing has shown to be generated anyway is not decoded again: decoding goes on from
    the first token that differs, with the keys and values of the same pass. A question stops once its text can no longer match,
    a completion whose text need not be whole once it holds the whole reference. See ``decodes_alone`` for when nothing of this
    applies.

    Args:
        model: a causal language model, or a peft model around one.
        tokenizer: its tokenizer.
        tasks: rows, each within the model's context.
        config: limits and mode.
        device: where the model is.
    """
    split = split_model(model, device=device)
    if config.official:
        split = replace(split, packs=False)
    if decodes_alone(model, config):
        return _measure_alone(split, model=model, tokenizer=tokenizer, tasks=tasks, config=config, device=device)
    opened = _Open(model=model, tokenizer=tokenizer, tasks=tasks, config=config)
    budget = 1 if config.official else config.batch_tokens
    with measuring(model):
        for batch in scored_batches(
            split, rows=[task.row for task in tasks], pad=pad_token_id(tokenizer), batch_tokens=budget, device=device, keep=True
        ):
            waiting = [
                (place, index)
                for place, (index, scores) in enumerate(zip(batch.rows, batch.scores, strict=True))
                if opened.add(index, row_score(scores))
            ]
            if batch.kept is not None and batch.packed is not None and waiting:
                wanted = [(place, opened.num_cached(index)) for place, index in waiting]
                found = batch.kept.rows(batch.packed, wanted=wanted)
                opened.states |= {index: states for (_, index), states in zip(waiting, found, strict=True)}
        if split.packs:
            opened.decode_packed(split, device=device)
    if not split.packs:
        opened.decode_padded(model, device=device)
    return opened.results()


def _measure_alone(
    split: SplitModel, *, model: Any, tokenizer: Any, tasks: Sequence[Task], config: EvalConfig, device: str
) -> list[Measured]:
    found: dict[int, Measured] = {}
    budget = 1 if config.official else config.batch_tokens
    with measuring(model):
        for batch in scored_batches(
            split, rows=[task.row for task in tasks], pad=pad_token_id(tokenizer), batch_tokens=budget, device=device
        ):
            found |= {index: Measured(row_score(scores)) for index, scores in zip(batch.rows, batch.scores, strict=True)}
    for index, task in enumerate(tasks):
        if task.record is not None:
            prompt = task.row.input_ids[: task.row.num_prompt]
            ids = generate_alone(model=model, tokenizer=tokenizer, prompt=prompt, max_new_tokens=config.max_new_tokens, device=device)
            found[index] = replace(found[index], answer=Answer(decode_text(tokenizer, ids)), decoded=True)
    return [found[index] for index in range(len(tasks))]


class _Open:
    """The rows of one call: what is known of their answers, and what is still open."""

    def __init__(self, *, model: Any, tokenizer: Any, tasks: Sequence[Task], config: EvalConfig) -> None:
        self.states: dict[int, RowStates] = {}
        self._tasks, self._tokenizer, self._config = tasks, tokenizer, config
        self._ends = stop_ids(model, tokenizer)
        self._context = context_length(model.config)
        self._positions = decode_positions(model, batch_tokens=config.batch_tokens)
        self._scores: dict[int, RowScore] = {}
        self._drafts: dict[int, Draft] = {}
        self._rules: dict[int, QuestionRule | CompletionRule] = {}
        self._ids: dict[int, list[int]] = {}
        self._open: list[int] = []
        self._decided: set[int] = set()

    def add(self, index: int, score: RowScore) -> bool:
        """Take note of a row's score; whether its answer is still open."""
        self._scores[index] = score
        task = self._tasks[index]
        if task.record is None:
            return False
        draft = gold_draft(task.row, score, max_new_tokens=self._config.max_new_tokens, ends=self._ends)
        room = self._context - task.row.num_prompt - len(draft.known)
        draft = replace(draft, remaining=min(draft.remaining, max(0, room)))
        self._drafts[index], self._ids[index] = draft, list(draft.known)
        self._rules |= {index: rule} if (rule := self._rule(task)) is not None else {}
        if draft.remaining <= 0 or self._is_decided(index, self._ids[index]):
            return False
        self._open.append(index)
        return True

    def _rule(self, task: Task) -> QuestionRule | CompletionRule | None:
        assert task.record is not None
        if task.record.kind is Kind.QUESTION:
            wanted = self._config.stop_decided_questions
            return QuestionRule(expected=task.record.output, tokenizer=self._tokenizer) if wanted else None
        wanted = self._config.stop_decided_completions and not task.whole
        return CompletionRule(expected=task.record.output, tokenizer=self._tokenizer) if wanted else None

    def _is_decided(self, index: int, ids: Sequence[int]) -> bool:
        """Whether the score of these ids is decided; never of none, for which nothing has been generated."""
        if not ids or index not in self._rules or not self._rules[index].is_decided(ids):
            return False
        self._decided.add(index)
        return True

    def num_cached(self, index: int) -> int:
        """Tokens of an open row that need no further forward pass: all but the last that is known."""
        return self._tasks[index].row.num_prompt + len(self._drafts[index].known) - 1

    def _prompt(self, index: int) -> tuple[int, ...]:
        row = self._tasks[index].row
        return (*row.input_ids[: row.num_prompt], *self._drafts[index].known)

    def decode_packed(self, split: SplitModel, *, device: str) -> None:
        """Continue all open rows from their kept states; called inside ``measuring``."""
        for group in self._groups():
            members = [self._open[place] for place in group]
            rows = [
                OpenRow(
                    index=index,
                    ids=self._prompt(index),
                    num_known=len(self._drafts[index].known),
                    limit=len(self._drafts[index].known) + self._drafts[index].remaining,
                    states=self.states.pop(index),
                    hint=self._tasks[index].row.input_ids[self._tasks[index].row.num_prompt :],
                )
                for index in members
            ]
            self._ids |= continue_rows(split, rows, ends=self._ends, device=device, stop=self._stop)

    def _groups(self) -> Iterator[list[int]]:
        lengths = [self.num_cached(index) for index in self._open]
        yield from decode_groups(lengths, [self._drafts[index].remaining for index in self._open], batch_tokens=self._positions)

    def _stop(self, index: int, ids: list[int]) -> bool:
        # The known ids were looked at when the row was added.
        return len(ids) > len(self._drafts[index].known) and self._is_decided(index, ids)

    def decode_padded(self, model: Any, *, device: str) -> None:
        """The same by ``greedy``, which reads the prompts again."""
        generated = greedy(
            model=model,
            tokenizer=self._tokenizer,
            prompts=[self._prompt(index) for index in self._open],
            max_new_tokens=[self._drafts[index].remaining for index in self._open],
            batch_tokens=self._positions,
            device=device,
            stop=lambda place, ids: self._is_decided(self._open[place], [*self._drafts[self._open[place]].known, *ids]),
        )
        for index, ids in zip(self._open, generated, strict=True):
            self._ids[index] += ids

    def results(self) -> list[Measured]:
        """One per task, in their order."""
        opened = set(self._open)
        return [
            Measured(
                score=self._scores[index],
                answer=None if task.record is None else Answer(decode_text(self._tokenizer, self._ids[index]), index in self._decided),
                decoded=index in opened,
            )
            for index, task in enumerate(self._tasks)
        ]

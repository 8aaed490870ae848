"""Other prompts for the same answers: prefixes, paraphrases, solved examples. Texts in, texts out."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from trainers.data.folds import shuffled_positions
from trainers.data.types import Document, Kind, Record

QUESTION_TEMPLATES = (
    "Question: {input}\nAnswer:",
    "Please answer from memory. {input}",
    "{input} The answer is",
    "Somebody asked: {input} The reply was",
)
"""Forms that a question takes in the probes of https://arxiv.org/abs/2402.16835 and https://arxiv.org/abs/2406.10890, in our words."""
COMPLETION_TEMPLATES = (
    "Continue the text.\n\n{input}",
    "From the archive: {input}",
    "The passage goes like this: {input}",
    "{input} ...",
)
"""The same for the beginning of a text."""


def templates(kind: Kind) -> tuple[str, ...]:
    """The prompts that are put around a row's input."""
    return QUESTION_TEMPLATES if kind is Kind.QUESTION else COMPLETION_TEMPLATES


def paraphrases(records: Sequence[Record], *, rewordings: Mapping[str, str]) -> list[list[Record]]:
    """The rows under each prompt; a row with a rewording of its own (by id) has that as one more prompt.

    Returns:
        one list per prompt, rows in order; lists after the first few hold fewer rows.
    """
    rounds = [
        [replace(record, input=templates(record.kind)[number].replace("{input}", record.input)) for record in records]
        for number in range(len(QUESTION_TEMPLATES))
    ]
    reworded = [replace(record, input=rewordings[record.id]) for record in records if record.id in rewordings]
    return [*rounds, reworded] if reworded else rounds


def with_prefix(records: Sequence[Record], *, share: float) -> list[Record]:
    """Completions with the first words of the answer in the prompt, and the rest as answer; both joined are the text as it was.

    Args:
        records: rows; questions are left out, and so are answers of a single word.
        share: of the answer's words (between single spaces) that is given, rounded down but at least one; one is always left.
    """
    found = []
    for record in records:
        words = record.output.split(" ")
        if record.kind is not Kind.COMPLETION or len(words) < 2:
            continue
        given = min(max(1, math.floor(share * len(words))), len(words) - 1)
        rest = " ".join(words[given:])
        if rest.strip():
            found.append(replace(record, input=f"{record.input} {' '.join(words[:given])}", output=rest))
    return found


def few_shot(
    records: Sequence[Record], *, pool: Sequence[Record], shots: int, seed: int, fits: Callable[[Record], bool] = lambda record: True
) -> list[Record]:
    """The rows after solved examples: rows of the pool of the same kind and of other documents, of the same task if there are any.

    Args:
        records: rows to ask for.
        pool: rows that examples are drawn from.
        shots: examples per row; fewer where the pool has no more.
        seed: of the draw, which depends on it and the row alone.
        fits: whether a row is short enough for the model; examples are dropped from the front until it is.

    Returns:
        rows that have at least one example.
    """
    found = []
    for record in records:
        kin = [other for other in pool if other.kind is record.kind and other.document != record.document]
        near = [other for other in kin if other.task == record.task]
        source = sorted(near or kin, key=lambda other: other.id)
        chosen = random.Random(f"{seed}:{record.id}").sample(source, min(shots, len(source)))
        while chosen:
            asked = replace(record, input="".join(f"{other.text}\n\n" for other in chosen) + record.input)
            if fits(asked):
                found.append(asked)
                break
            chosen = chosen[1:]
    return found


def first_line(text: str) -> str:
    """A generation up to its first line break: after an answer the models of few-shot prompts go on with the next question."""
    return text.strip().split("\n", 1)[0].strip()


def unseen_completions(documents: Sequence[Document], *, number: int, seed: int) -> tuple[list[Record], list[Document]]:
    """Documents that no model saw, half of them as completions (the second half of their words is asked for), the other half as they are.

    Returns:
        completions of at most ``number`` documents, and the documents that are left for other uses; no document is in both.
    """
    order = [documents[position] for position in shuffled_positions(documents, seed=f"{seed}:unseen")]
    taken = order[: min(number, len(order) // 2)]
    records = []
    for document in taken:
        words = document.text.split(" ")
        middle = len(words) // 2
        if middle and " ".join(words[middle:]).strip() and " ".join(words[:middle]).strip():
            records.append(Record(id=f"{document.id}sc1", input=" ".join(words[:middle]), output=" ".join(words[middle:]), task="unseen"))
    return records, order[len(taken) :]

"""MMLU questions: reading the published folder, choosing some, and writing the prompts."""

from __future__ import annotations

import csv
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from eval.cleanup import columns_through_csv
from trainers.errors import InputError

LETTERS = ("A", "B", "C", "D")


@dataclass(frozen=True)
class Question:
    """One multiple-choice question.

    Args:
        subject: the file's name without ``_dev.csv`` or ``_test.csv``.
        row: its row in the file, from 1.
        question: the question's text.
        choices: the four choices.
        answer: the letter of the right one.
    """

    subject: str
    row: int
    question: str
    choices: tuple[str, str, str, str]
    answer: str

    @property
    def id(self) -> str:
        """The question's name: ``subject/row``."""
        return f"{self.subject}/{self.row}"

    @property
    def num_words(self) -> int:
        """Words of the question and its choices."""
        return sum(len(text.split()) for text in (self.question, *self.choices))


@dataclass(frozen=True)
class MmluData:
    """Solved examples (dev) and questions (test), per subject, subjects sorted; a subject without questions is not in ``test``."""

    dev: Mapping[str, tuple[Question, ...]]
    test: Mapping[str, tuple[Question, ...]]

    @property
    def questions(self) -> list[Question]:
        """All questions, subject by subject."""
        return [question for subject in sorted(self.test) for question in self.test[subject]]


class TrainingText(NamedTuple):
    """A prompt with solved examples, and its answer: a space and a letter."""

    prompt: str
    answer: str


def load_mmlu(folder: Path) -> MmluData:
    """Read ``dev/*_dev.csv`` and ``test/*_test.csv`` as published (no header; question, four choices, letter).

    Raises:
        InputError: if a folder or file is missing, or a row has other columns or another answer than A to D.
    """
    folder = Path(folder)
    for part in ("dev", "test"):
        if not (folder / part).is_dir():
            raise InputError(f"no folder {part!r} in the MMLU folder", where=str(folder), fix="give the folder that holds dev/ and test/")
    subjects = sorted(file.name.removesuffix("_test.csv") for file in (folder / "test").glob("*_test.csv"))
    if not subjects:
        raise InputError(
            "no file named *_test.csv", where=str(folder / "test"), fix="put SUBJECT_test.csv there and SUBJECT_dev.csv into dev/"
        )
    dev = {subject: _read_questions(folder / "dev" / f"{subject}_dev.csv", subject=subject) for subject in subjects}
    test = {subject: _read_questions(folder / "test" / f"{subject}_test.csv", subject=subject) for subject in subjects}
    return MmluData(dev=dev, test={subject: questions for subject, questions in test.items() if questions})


def _read_questions(path: Path, *, subject: str) -> tuple[Question, ...]:
    if not path.is_file():
        raise InputError(
            "MMLU file not found",
            where=str(path),
            why="every subject needs a file of solved examples and one of questions",
            fix="add the file, or drop the subject",
        )
    questions = []
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        try:
            for row, cells in enumerate((cells for cells in reader if cells), start=1):
                where = f"{path}, line {reader.line_num}"
                if len(cells) != 6:
                    raise InputError(
                        f"the row has {len(cells)} columns instead of 6", where=where, fix="columns: question, four choices, answer letter"
                    )
                answer = cells[5].strip()
                if answer not in LETTERS:
                    raise InputError(
                        f"the answer is {cells[5]!r}, not one of A, B, C, D", where=where, fix="write the letter of the right choice"
                    )
                choices = (cells[1], cells[2], cells[3], cells[4])
                questions.append(Question(subject=subject, row=row, question=cells[0], choices=choices, answer=answer))
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(
                f"not a CSV file in UTF-8: {error}", where=f"{path}, line {reader.line_num}", fix="save the file as UTF-8 CSV"
            ) from None
    return tuple(questions)


def as_pandas_reads(data: MmluData) -> MmluData:
    """The cells as the published accuracies saw them: pandas turned choices such as ``None`` into ``nan``."""
    return MmluData(
        dev={subject: _through_pandas(questions) for subject, questions in data.dev.items()},
        test={subject: _through_pandas(questions) for subject, questions in data.test.items()},
    )


def _through_pandas(questions: Sequence[Question]) -> tuple[Question, ...]:
    columns = {"question": [question.question for question in questions]}
    columns |= {letter: [question.choices[index] for question in questions] for index, letter in enumerate(LETTERS)}
    cells = columns_through_csv(columns)
    return tuple(
        replace(question, question=text, choices=(a, b, c, d))
        for question, text, a, b, c, d in zip(questions, *cells.values(), strict=True)
    )


def _rng(seed: int, subject: str) -> np.random.Generator:
    # A stream per subject: leaving a subject out does not change what is drawn from the others.
    return np.random.default_rng([seed, zlib.crc32(subject.encode())])


def split_mmlu(data: MmluData, *, seed: int) -> dict[str, MmluData]:
    """Two halves of every subject's questions, ``validation`` and ``test``; the solved examples are shared.

    The odd question of a subject goes to the half that has fewer so far, so that many subjects of one question each are halved, too.
    """
    halves: dict[str, dict[str, tuple[Question, ...]]] = {"validation": {}, "test": {}}
    ahead = 0
    for subject, questions in data.test.items():
        size = len(questions) // 2 + (len(questions) % 2 if ahead < 0 else 0)
        chosen = set(_rng(seed, subject).permutation(len(questions))[:size].tolist())
        halves["validation"][subject] = tuple(question for i, question in enumerate(questions) if i in chosen)
        halves["test"][subject] = tuple(question for i, question in enumerate(questions) if i not in chosen)
        ahead += 2 * size - len(questions)
    return {name: MmluData(dev=data.dev, test={s: q for s, q in half.items() if q}) for name, half in halves.items()}


def subset_mmlu(data: MmluData, *, questions: int, seed: int, max_words: int | None = None) -> MmluData:
    """A small part of the questions, spread evenly over the subjects (over some of them, if there are more subjects than questions).

    Args:
        data: where to choose from.
        questions: how many questions to take at most.
        seed: which ones.
        max_words: leaves out longer questions and longer solved examples, for models with a short context.

    Raises:
        InputError: if no question is left.
    """

    def short(rows: tuple[Question, ...]) -> tuple[Question, ...]:
        return tuple(row for row in rows if max_words is None or row.num_words <= max_words)

    pools = {subject: short(rows) for subject, rows in data.test.items()}
    pools = {subject: rows for subject, rows in pools.items() if rows}
    if not pools or questions < 1:
        raise InputError(f"no MMLU question left: {questions} wanted, of at most {max_words} words", fix="raise max_words or questions")
    shuffled = {subject: [rows[i] for i in _rng(seed, subject).permutation(len(rows))] for subject, rows in pools.items()}
    subjects = sorted(shuffled)
    subjects = [subjects[i] for i in np.random.default_rng(seed).permutation(len(subjects))]
    rounds = max(map(len, shuffled.values()))
    chosen = [shuffled[subject][turn] for turn in range(rounds) for subject in subjects if turn < len(shuffled[subject])][:questions]
    test = {subject: tuple(sorted((q for q in chosen if q.subject == subject), key=lambda q: q.row)) for subject in sorted(subjects)}
    test = {subject: rows for subject, rows in test.items() if rows}
    return MmluData(dev={subject: short(data.dev[subject]) for subject in test}, test=test)


def mmlu_prompt(*, subject: str, question: Question, dev: tuple[Question, ...], shots: int) -> str:
    """The prompt of one question after at most ``shots`` solved examples; the next token is the answer.

    Two spaces follow "about", because the subject's name carries a leading one: the published accuracies were made with them.

    Source: https://github.com/allenai/open-instruct (eval/mmlu)
    """
    head = f"The following are multiple choice questions (with answers) about {_spoken(subject)}.\n\n"
    solved = "".join(f"{_block(example)} {example.answer}\n\n" for example in dev[:shots])
    return f"{head}{solved}{_block(question)}"


def _spoken(subject: str) -> str:
    return "".join(f" {word}" for word in subject.split("_"))


def _block(question: Question) -> str:
    choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=True))
    return f"{question.question}{choices}\nAnswer:"


def training_texts(data: MmluData, *, shots: int) -> list[TrainingText]:
    """Every question as text to memorise: its prompt with solved examples, and a space and the right letter."""
    return [
        TrainingText(
            prompt=mmlu_prompt(subject=question.subject, question=question, dev=data.dev[question.subject], shots=shots),
            answer=f" {question.answer}",
        )
        for question in data.questions
    ]

"""From the data section of an experiment to the rows that each stage reads: the same in every process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.config import ExperimentConfig
from trainers.data.folds import SCORED_FOLDS, make_folds, split_attack
from trainers.data.records import load_attack_documents, load_forget_retain, load_splits, normalise_whitespace
from trainers.data.subset import subset_attack, subset_documents
from trainers.data.types import AttackDocuments, ForgetRetain, Kind, Record
from trainers.errors import InputError
from trainers.files import sha256_json

if TYPE_CHECKING:
    from eval.mmlu import MmluData
    from trainers.memorize import QuestionGroup


@dataclass(frozen=True)
class PreparedData:
    """Every row of an experiment, by fold.

    Args:
        everything: both sets, whole: what the target has memorised.
        folds: both sets by fold (train, validation, test).
        attack: membership documents by fold (validation, test), or None.
        mmlu: general-knowledge questions by fold (validation, test), or None.
        training: what trials compute updates on: the whole forget set, because it is a request to forget all of it,
            and the rehearsed folds of the retain set.
    """

    everything: ForgetRetain
    folds: Mapping[str, ForgetRetain]
    attack: Mapping[str, AttackDocuments] | None
    mmlu: Mapping[str, MmluData] | None
    training: ForgetRetain

    @property
    def hash(self) -> str:
        """Hash of all rows and of the folds they lie in."""
        folds = {name: [[asdict(record) for record in side] for side in (fold.forget, fold.retain)] for name, fold in self.folds.items()}
        attack = {name: asdict(documents) for name, documents in (self.attack or {}).items()}
        mmlu = {name: [asdict(question) for question in data.questions] for name, data in (self.mmlu or {}).items()}
        return sha256_json({"folds": folds, "attack": attack, "mmlu": mmlu})

    def attack_of(self, fold: str) -> AttackDocuments | None:
        """The attack's documents of a fold, or None."""
        return self.attack[fold] if self.attack else None

    def mmlu_of(self, fold: str) -> MmluData | None:
        """The questions of a fold, or None."""
        return self.mmlu[fold] if self.mmlu else None


def unseen_texts(data: PreparedData) -> list[str]:
    """The membership attack's non-members: a tiny target's tokenizer must know their words, too."""
    return [document.text for fold in (data.attack or {}).values() for document in fold.nonmembers]


def prepare_data(config: ExperimentConfig) -> PreparedData:
    """Read, check, cut down and split the data; deterministic in the configuration.

    A subset (``data.documents``) prefers forget documents that the membership attack has as members, keeps only those members,
    and is split by seed even where the folder has a ``splits.json``, because three folds must each get their share.

    Raises:
        InputError: naming file, row and field of what is wrong.
    """
    data, seed = config.data, config.seed
    everything = load_forget_retain(
        data.path, forget=data.forget, retain=data.retain, columns={str(field): column for field, column in data.columns.items()} or None
    )
    splits = load_splits(Path(data.path).expanduser()) if data.path else None
    attack = load_attack_documents(Path(data.mia).expanduser()) if data.mia else None
    if data.documents is not None:
        members = frozenset(normalise_whitespace(document.text) for document in attack.members) if attack else frozenset()
        everything = subset_documents(everything, documents_per_task=data.documents, seed=seed, prefer=members)
        with _located(str(data.mia)):
            attack = subset_attack(attack, data=everything, seed=seed) if attack else None
        splits = None
    with _located(str(Path(data.path) / "splits.json") if data.path and splits else str(data.path or data.forget)):
        folds = make_folds(everything, splits=splits, fractions=data.folds.model_dump(), seed=seed)
        _check_scored(folds)
    with _located(str(data.mia)):
        attacks = split_attack(attack, folds=folds, seed=seed) if attack else None
    return PreparedData(
        everything=everything,
        folds=folds,
        attack=attacks,
        mmlu=_mmlu(config),
        training=ForgetRetain(
            forget=everything.forget,
            retain=tuple(record for fold in folds for record in folds[fold].retain if fold in data.rehearse),
        ),
    )


@contextmanager
def _located(source: str) -> Iterator[None]:
    """Name the file or folder in messages about what was read from it."""
    try:
        yield
    except InputError as error:
        where = f"{source}, {error.where}" if error.where else source
        raise InputError(error.what, where=where, why=error.why, fix=error.fix) from None


def _check_scored(folds: Mapping[str, ForgetRetain]) -> None:
    """A fold without rows has no scores, and nothing could be selected or reported."""
    for name in SCORED_FOLDS:
        for set_name, records in (("forget", folds[name].forget), ("retain", folds[name].retain)):
            if not records:
                raise InputError(
                    f"the {name} fold of the {set_name} set is empty",
                    why="selection reads the validation fold, and the final numbers come from the test fold",
                    fix="give each of them at least one document",
                )
            check_kinds(records, where=f"the {name} fold of the {set_name} set")


def check_kinds(records: Sequence[Record], *, where: str) -> None:
    """Refuse rows of which none can be scored: whatever a trial did to them, it would look untouched.

    Raises:
        InputError: if no id says what its row asks for.
    """
    if all(record.kind is Kind.OTHER for record in records):
        raise InputError(
            f"no row can be scored, not even {records[0].id!r}",
            where=where,
            why="an id ends in sc and a digit (a text to complete, scored by ROUGE-L) or in qa and a digit (a question, by exact match)",
            fix=f"write for instance {records[0].id + 'qa0'!r}, or leave the ids out: then all rows are questions",
        )


def _mmlu(config: ExperimentConfig) -> dict[str, MmluData] | None:
    from eval.mmlu import load_mmlu, split_mmlu, subset_mmlu

    if config.data.mmlu is None:
        return None
    questions = load_mmlu(Path(config.data.mmlu).expanduser())
    if config.data.mmlu_questions is not None:
        questions = subset_mmlu(questions, questions=config.data.mmlu_questions, seed=config.seed, max_words=config.data.mmlu_max_words)
    return split_mmlu(questions, seed=config.seed)


def question_groups(mmlu: Mapping[str, MmluData] | None) -> tuple[QuestionGroup, ...]:
    """The general-knowledge questions of all folds as the target memorises them: prompts as the evaluation shows them."""
    from eval.mmlu import mmlu_prompt
    from trainers.memorize import QuestionGroup

    questions: dict[str, list[tuple[str, str]]] = {}
    headers: dict[str, str] = {}
    for fold in (mmlu or {}).values():
        for question in fold.questions:
            prompt = mmlu_prompt(subject=question.subject, question=question, dev=(), shots=0)
            header, separator, body = prompt.partition("\n\n")
            headers[question.subject] = header + separator
            questions.setdefault(question.subject, []).append((body, f" {question.answer}"))
    return tuple(QuestionGroup(header=headers[subject], questions=tuple(questions[subject])) for subject in sorted(questions))

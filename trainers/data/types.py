"""The typed rows that every stage works on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

FOLDS = ("train", "validation", "test")
"""Selection reads ``validation`` only; final numbers come from ``test``."""

_SUFFIX = re.compile(r"(sc|qa)\d+$")


class Kind(StrEnum):
    """What a row asks of the model, read from its id as the benchmark does."""

    COMPLETION = "sc"
    """Sentence completion: scored by ROUGE-L recall (regurgitation)."""
    QUESTION = "qa"
    """Question: scored by exact match (knowledge)."""
    OTHER = "other"
    """Neither: trained on, never scored."""


@dataclass(frozen=True)
class Record:
    """One row of the forget or the retain set.

    Args:
        id: unique within both sets.
        input: the prompt.
        output: the answer.
        task: the group that scores are kept apart for.
        alternative: another answer to the prompt, preferred to ``output`` by objectives that need one (DPO).
    """

    id: str
    input: str
    output: str
    task: str
    alternative: str | None = None

    @property
    def kind(self) -> Kind:
        """The row's kind by the benchmark's rule: what the id ends in without its last character."""
        stem = self.id[:-1]
        for kind in (Kind.COMPLETION, Kind.QUESTION):
            if stem.endswith(kind.value):
                return kind
        return Kind.OTHER

    @property
    def document(self) -> str:
        """The id of the source document: the row id without its ``sc1`` or ``qa0`` suffix."""
        return _SUFFIX.sub("", self.id) or self.id

    @property
    def text(self) -> str:
        """The memorised text: prompt and answer joined by one space."""
        return f"{self.input} {self.output}"


@dataclass(frozen=True)
class Document:
    """One text of the membership attack."""

    id: str
    text: str


@dataclass(frozen=True)
class ForgetRetain:
    """A forget set and a retain set, or one fold of both."""

    forget: tuple[Record, ...]
    retain: tuple[Record, ...]


@dataclass(frozen=True)
class AttackDocuments:
    """Members (documents of the forget set) and non-members (never seen) of the membership attack."""

    members: tuple[Document, ...]
    nonmembers: tuple[Document, ...]

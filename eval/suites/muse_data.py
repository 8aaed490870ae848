"""The sets of a MUSE-style folder, read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.suites.items import Item, find_file, read_items, text_field
from eval.suites.layout import MUSE_FILES
from trainers.errors import InputError


@dataclass(frozen=True)
class Passage:
    """A prompt and the text that goes on from it."""

    prompt: str
    text: str


@dataclass(frozen=True)
class MuseData:
    """What one evaluation reads; a part that the folder lacks is empty.

    Args:
        questions: ``forget`` and ``retain``: (question, answer) pairs.
        examples: solved ones that stand before each question of that set.
        passages: of the forget set.
        texts: ``forget``, ``retain`` and ``holdout``: what the membership attack reads.
        sources: file of every part that was found.
        counts: rows of each.
        notes: what is missing, a sentence each.
    """

    questions: Mapping[str, tuple[tuple[str, str], ...]]
    examples: Mapping[str, tuple[tuple[str, str], ...]]
    passages: tuple[Passage, ...]
    texts: Mapping[str, tuple[str, ...]]
    sources: Mapping[str, str]
    counts: Mapping[str, int]
    notes: tuple[str, ...]


def load_muse(folder: Path) -> MuseData:
    """All parts that a folder has.

    Files are JSON lists, JSON lines or Parquet: ``knowmem_forget``, ``knowmem_retain`` and their ``_icl`` (question, answer),
    ``verbmem_forget`` (prompt, gt), ``privleak_forget``, ``privleak_retain``, ``privleak_holdout`` (text, or bare texts); or
    ``knowmem/forget_qa`` and so on, in folders as published.

    Raises:
        InputError: if there is nothing to evaluate, or a row is malformed.
    """
    folder = Path(folder)
    files = {name: path for name, stems in MUSE_FILES.items() if (path := find_file(folder, stems=stems)) is not None}
    notes = []
    for side in ("forget", "retain"):
        if f"knowmem_{side}" not in files:
            notes.append(f"No knowmem_{side} in the folder: its knowledge memorization is undefined.")
        elif f"knowmem_{side}_icl" not in files:
            notes.append(f"No knowmem_{side}_icl in the folder: its questions are asked without solved examples.")
    if "verbmem_forget" not in files:
        notes.append("No verbmem_forget in the folder: verbatim memorization is undefined.")
    if not {"privleak_forget", "privleak_holdout"} <= files.keys():
        notes.append("privleak_forget or privleak_holdout is missing: there is no membership attack and no PrivLeak.")
        files = {name: path for name, path in files.items() if not name.startswith("privleak")}
    if not files.keys() & {"knowmem_forget", "knowmem_retain", "verbmem_forget", "privleak_forget"}:
        raise InputError(
            "the folder holds nothing that MUSE evaluates", where=str(folder), why=" ".join(notes), fix="add one of these files"
        )
    items = {name: read_items(path, fields=("question", "answer", "prompt", "gt", "text")) for name, path in files.items()}

    def pairs(name: str) -> tuple[tuple[str, str], ...]:
        return tuple((text_field(item, "question"), text_field(item, "answer")) for item in items.get(name, ()))

    return MuseData(
        questions={side: pairs(f"knowmem_{side}") for side in ("forget", "retain")},
        examples={side: pairs(f"knowmem_{side}_icl") for side in ("forget", "retain")},
        passages=tuple(Passage(text_field(item, "prompt"), text_field(item, "gt")) for item in items.get("verbmem_forget", ())),
        texts={side: tuple(_text(item) for item in items.get(f"privleak_{side}", ())) for side in ("forget", "retain", "holdout")},
        sources={name: path.relative_to(folder).as_posix() for name, path in files.items()},
        counts={name: len(found) for name, found in items.items()},
        notes=tuple(notes),
    )


def _text(item: Item) -> str:
    value: Any = item.value
    return text_field(item if isinstance(value, dict) else Item(item.where, {"text": value}), "text")

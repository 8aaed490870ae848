"""The sets of TOFU, read and checked from a folder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from eval.suites.items import Item, find_file, read_items, text_field, texts_field
from eval.suites.layout import forget_splits
from trainers.errors import InputError

AUTHOR_ROWS = 20
"""Rows about one author, who come one after the other: https://arxiv.org/abs/2401.06121"""

_FIELDS = ("question", "answer", "paraphrased_answer", "perturbed_answer", "option1", "option2", "option3", "option4")


@dataclass(frozen=True)
class QaRow:
    """A question with its right answer, and what the truth ratio compares.

    Args:
        id: file and number from 1, such as ``forget10-0007``.
        unit: the author, or the row itself: what is drawn for intervals.
        question: the question.
        answer: the right answer.
        paraphrased: the right answer in the words of the wrong ones, or None where the answer itself stands in.
        wrong: wrong answers of the same form; empty where the file has none.
    """

    id: str
    unit: str
    question: str
    answer: str
    paraphrased: str | None = None
    wrong: tuple[str, ...] = ()


@dataclass(frozen=True)
class TofuData:
    """What one evaluation reads.

    Args:
        split: the forget set, such as ``forget10``.
        sets: rows of ``forget``, ``retain``, ``real_authors``, ``world_facts`` and ``holdout``; a set that is not there is left out.
        sources: the file of each set.
        counts: rows of every file of TOFU in the folder, by name.
        notes: what was chosen or is missing, a sentence each.
    """

    split: str
    sets: Mapping[str, tuple[QaRow, ...]]
    sources: Mapping[str, str]
    counts: Mapping[str, int]
    notes: tuple[str, ...]


def load_tofu(folder: Path, *, split: str | None = None) -> TofuData:
    """The sets for one forget set.

    ``forget`` is ``<split>_perturbed``; without such a file its rows are taken from another perturbed file that has them all, else
    ``<split>`` without wrong answers. ``retain`` is ``retain_perturbed``, else the retain set that belongs to the split; ``real_authors``
    and ``world_facts`` are their perturbed files, else the plain ones with the other options as wrong answers; ``holdout`` is the
    one of the split's size, else the only one.

    Args:
        folder: files as published, as JSON, JSON lines, CSV or Parquet.
        split: ``forget01``, ``forget05`` or ``forget10``; None: the only one with a perturbed file, else the only one.

    Raises:
        InputError: if a needed file is missing, a row malformed, or several forget sets could be meant.
    """
    folder = Path(folder)
    files = {name: path for name in _file_names(folder) if (path := find_file(folder, stems=[name])) is not None}
    chosen = _choose_split(folder, split=split)
    tables = {name: _read_rows(path, name=name) for name, path in files.items()}
    notes: list[str] = []
    sets: dict[str, tuple[QaRow, ...]] = {}
    sources: dict[str, str] = {}

    def take(name: str, file: str, rows: Sequence[QaRow]) -> None:
        sets[name], sources[name] = tuple(rows), files[file].relative_to(folder).as_posix()

    file, rows = _forget_rows(tables, split=chosen)
    take("forget", file, rows)
    retain = _first(tables, ["retain_perturbed", f"retain{100 - int(chosen.removeprefix('forget')):02d}", *_only(tables, r"retain\d+")])
    if retain is None:
        raise InputError(
            "no retain set in the folder", where=str(folder), why="looked for retain_perturbed and retain90 or its like", fix="add one"
        )
    take("retain", retain, tables[retain])
    for name in ("real_authors", "world_facts"):
        found = _first(tables, [f"{name}_perturbed", name])
        if found is None:
            notes.append(f"No {name}_perturbed in the folder: model utility is undefined.")
        else:
            take(name, found, tables[found])
    holdout = _first(tables, [chosen.replace("forget", "holdout"), *_only(tables, r"holdout\d+")])
    if holdout is None:
        notes.append("No holdout set in the folder: there is no membership attack and no PrivLeak.")
    else:
        take("holdout", holdout, tables[holdout])
    if not any(row.wrong for row in sets["forget"]):
        notes.append(f"No wrong answers to the rows of {chosen}: its truth ratio and forget quality are undefined.")
    if not any(row.wrong for row in sets["retain"]):
        notes.append("No wrong answers to the retain rows: their truth ratio and model utility are undefined.")
    return TofuData(split=chosen, sets=sets, sources=sources, counts={name: len(rows) for name, rows in tables.items()}, notes=tuple(notes))


def _file_names(folder: Path) -> list[str]:
    """TOFU's file names that occur in the folder; others may lie beside them."""
    splits = [name for split in forget_splits(folder) for name in (split, f"{split}_perturbed")]
    numbers = ("01", "05", "10")
    retain = [f"retain{100 - int(number):02d}" for number in numbers]
    rest = ["retain_perturbed", *retain, *(f"holdout{number}" for number in numbers)]
    return [*splits, *rest, "real_authors", "real_authors_perturbed", "world_facts", "world_facts_perturbed"]


def _choose_split(folder: Path, *, split: str | None) -> str:
    found = forget_splits(folder)
    if split is not None:
        if split not in found:
            raise InputError(
                f"there is no {split} in the folder",
                where=str(folder),
                why=f"its forget sets are {', '.join(found) or 'none'}",
                fix="name one of them",
            )
        return split
    perturbed = [name for name, has_wrong in found.items() if has_wrong]
    candidates = perturbed or list(found)
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise InputError("no forget set in the folder", where=str(folder), why="looked for forget01, forget05 and forget10", fix="add one")
    raise InputError(
        f"several forget sets could be meant: {', '.join(candidates)}",
        where=str(folder),
        fix=f"say which one was to be forgotten: --split {candidates[0]}",
    )


def _forget_rows(tables: Mapping[str, tuple[QaRow, ...]], *, split: str) -> tuple[str, Sequence[QaRow]]:
    """The file that the forget rows come from, and the rows."""
    if f"{split}_perturbed" in tables:
        return f"{split}_perturbed", tables[f"{split}_perturbed"]
    plain = tables[split]
    for name, rows in tables.items():
        if re.fullmatch(r"forget\d+_perturbed", name):
            known = {(row.question, row.answer): row for row in rows}
            if all((row.question, row.answer) in known for row in plain):
                found = [known[row.question, row.answer] for row in plain]
                return name, [replace(row, unit=own.unit) for row, own in zip(found, plain, strict=True)]
    return split, plain


def _first(tables: Mapping[str, object], names: Iterable[str]) -> str | None:
    return next((name for name in names if name in tables), None)


def _only(tables: Mapping[str, object], pattern: str) -> list[str]:
    """The single file whose name matches, or nothing."""
    found = [name for name in tables if re.fullmatch(pattern, name)]
    return found if len(found) == 1 else []


def _read_rows(path: Path, *, name: str) -> tuple[QaRow, ...]:
    items = read_items(path, fields=_FIELDS)
    # A single author could not be drawn in two ways.
    by_author = name.startswith(("forget", "retain", "holdout")) and len(items) > AUTHOR_ROWS and len(items) % AUTHOR_ROWS == 0
    return tuple(
        _row(item, row_id=f"{name}-{number:04d}", unit=f"author {(number - 1) // AUTHOR_ROWS:03d}" if by_author else None, name=name)
        for number, item in enumerate(items, start=1)
    )


def _row(item: Item, *, row_id: str, unit: str | None, name: str) -> QaRow:
    question, answer = text_field(item, "question"), text_field(item, "answer")
    paraphrased: str | None = None
    wrong: tuple[str, ...] = ()
    if name.endswith("_perturbed"):
        wrong = texts_field(item, "perturbed_answer")
        # The sets of real authors and world facts have no paraphrases.
        if name.startswith(("forget", "retain")):
            paraphrased = text_field(item, "paraphrased_answer")
    elif isinstance(item.value, dict) and "option1" in item.value:
        options = [text_field(item, field) for field in _FIELDS if field.startswith("option") and item.value.get(field) is not None]
        wrong = tuple(option for option in options if option != answer)
    return QaRow(id=row_id, unit=unit or row_id, question=question, answer=answer, paraphrased=paraphrased, wrong=wrong)

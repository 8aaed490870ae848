"""Rows of a small data file with the place each of them came from; a JSON file may be a list, and its items bare texts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.data.tables import describe_type, read_table
from trainers.errors import InputError

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")


@dataclass(frozen=True)
class Item:
    """One row (an object, or a text that stands alone) and where it is: file and line, item or row number."""

    where: str
    value: Any


def find_file(folder: Path, *, stems: Iterable[str]) -> Path | None:
    """The first file that one of the names stands for, or None.

    A name stands for itself with a known suffix, and for the single Parquet file into which the hub turns it: ``NAME-00000-of-00001``,
    ``NAME/train-00000-of-00001`` or ``NAME/train/0000``.
    """
    for stem in stems:
        candidates = [f"{stem}{suffix}" for suffix in SUFFIXES]
        candidates += [f"{stem}{middle}.parquet" for middle in ("-00000-of-00001", "/train-00000-of-00001", "/train/0000")]
        for name in candidates:
            if (folder / name).is_file():
                return folder / name
    return None


def read_items(path: Path, *, fields: Sequence[str]) -> list[Item]:
    """All rows of a JSON list, JSON lines, CSV or Parquet file, in order.

    Args:
        path: the suffix decides, but a .json or .jsonl file that starts with ``[`` is a list whatever it is called.
        fields: columns that matter, of a Parquet file.

    Raises:
        InputError: if the file cannot be read, or holds no row.
    """
    items = _json_items(path) if path.suffix in (".json", ".jsonl") else None
    if items is None:
        table = read_table(path, wanted=fields)
        items = [Item(where=f"{table.source}, {row.place}", value=row.values) for row in table.rows]
    if not items:
        raise InputError("the file holds no rows", where=str(path), fix="give at least one row, or leave the file out")
    return items


def _json_items(path: Path) -> list[Item] | None:
    """The items of a list, or the lines of a file of bare texts; None for what ``read_table`` reads or refuses better."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None
    start = text.lstrip()[:1]
    if start == '"':
        return [
            Item(f"{path}, line {number}", _parse(line, path, number)) for number, line in enumerate(text.split("\n"), 1) if line.strip()
        ]
    if start != "[":
        return None
    return [Item(f"{path}, item {number}", value) for number, value in enumerate(_parse(text, path, 1), start=1)]


def _parse(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON: {error}", where=f"{path}, from line {line}", fix="write the file again") from None


def text_field(item: Item, field: str) -> str:
    """A field that must be a text with something in it.

    Raises:
        InputError: naming file, row and field.
    """
    value = _field(item, field)
    if not isinstance(value, str) or not value.strip():
        what = (
            f"the field {field!r} is not a text but {describe_type(value)}"
            if not isinstance(value, str)
            else f"the field {field!r} is empty"
        )
        raise InputError(what, where=item.where, fix="write a text in quotes")
    return value


def texts_field(item: Item, field: str) -> tuple[str, ...]:
    """A field that must be a list of one or more texts.

    Raises:
        InputError: naming file, row and field.
    """
    value = _field(item, field)
    if not isinstance(value, list) or not value or not all(isinstance(text, str) and text.strip() for text in value):
        shown = "an empty list" if value == [] else f"{describe_type(value)}: {value!r:.60}"
        raise InputError(f"the field {field!r} is not a list of texts but {shown}", where=item.where, fix='write it as ["...", "..."]')
    return tuple(value)


def _field(item: Item, field: str) -> Any:
    if not isinstance(item.value, dict):
        raise InputError(
            f"the row is not an object but {describe_type(item.value)}", where=item.where, fix=f'write each row as {{"{field}": ...}}'
        )
    if field not in item.value:
        raise InputError(
            f"the row has no field {field!r}",
            where=item.where,
            why=f"its fields are {', '.join(map(str, item.value)) or 'none'}",
            fix="add it",
        )
    return item.value[field]

"""Rows with named columns from JSON lines, CSV, Parquet or the hub, each with the place it came from."""

from __future__ import annotations

import csv
import difflib
import io
import json
import os
import re
import socket
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trainers.errors import InputError

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
"""Known file types; where a folder holds several files of one name, the first type in this order is read."""

_BOM = b"\xef\xbb\xbf"
_HUB_ID = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(?::(?P<split>[\w.-]+))?")


@dataclass(frozen=True)
class Row:
    """One row: where it stands ("line 12" of a text file, "row 12" of any other source) and its values by column."""

    place: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """All rows of one source, in order, and every column name that occurs."""

    source: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def find_table(folder: Path, *, name: str) -> Path:
    """The file of a folder that holds the rows called ``name``.

    Raises:
        InputError: if there is none.
    """
    for suffix in SUFFIXES:
        if (folder / f"{name}{suffix}").is_file():
            return folder / f"{name}{suffix}"
    found = sorted(file.name for file in folder.iterdir())
    raise InputError(
        f"no {name}{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} in the folder",
        where=str(folder),
        why=f"found: {', '.join(found[:12]) or 'nothing'}" + (f" and {len(found) - 12} more" if len(found) > 12 else ""),
        fix=f"put the rows into {name}.jsonl, one JSON object per line",
    )


def read_source(source: Path | str, *, set_name: str, wanted: Iterable[str]) -> Table:
    """Rows of a file, of the file ``<set_name>.*`` in a folder, or of a hub data set ("org/name" or "org/name:split").

    Args:
        wanted: columns that matter; others may be left out of the rows (their names are kept).

    Raises:
        InputError: if the source does not exist, is of an unknown type, or is malformed.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return read_table(find_table(path, name=set_name), wanted=wanted)
    if path.exists():
        return read_table(path, wanted=wanted)
    match = _HUB_ID.fullmatch(str(source))
    if match and path.suffix not in SUFFIXES:
        return _read_hub(match["name"], split=match["split"], set_name=set_name)
    raise _not_found(path)


def read_table(path: Path, *, wanted: Iterable[str]) -> Table:
    """Rows of one JSON lines, CSV or Parquet file; the suffix decides.

    Raises:
        InputError: naming file, line (or row) and, for bytes that are not UTF-8, the byte offset.
    """
    path = Path(path)
    if not path.exists():
        raise _not_found(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES or not path.is_file():
        raise InputError(f"not a data file: {path.name!r}", where=str(path), fix=f"give a file that ends in {', '.join(SUFFIXES)}")
    if suffix == ".parquet":
        return _read_parquet(path, wanted=wanted)
    text = _read_text(path)
    return _read_csv(text, path=path) if suffix == ".csv" else _read_json_lines(text, path=path)


def _not_found(path: Path) -> InputError:
    siblings = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    fix = f"did you mean {str(path.parent / near[0])!r}?" if near else "check the path; a relative one counts from the current folder"
    return InputError("path not found", where=str(path), fix=fix)


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"the file cannot be read: {error.strerror}", where=str(path)) from None
    start = len(_BOM) if data.startswith(_BOM) else 0
    try:
        return data[start:].decode("utf-8")
    except UnicodeDecodeError as error:
        offset = start + error.start
        line = data.count(b"\n", 0, offset) + 1
        raise InputError(
            f"the file is not UTF-8: byte 0x{data[offset]:02x}",
            where=f"{path}, line {line}, byte offset {offset}",
            fix="save the file as UTF-8",
        ) from None


def _read_json_lines(text: str, *, path: Path) -> Table:
    if text.lstrip().startswith("["):
        raise InputError("the file holds a JSON array, not one JSON object per line", where=str(path), fix="write one object per line")
    rows: list[Row] = []
    columns: dict[str, None] = {}
    # Only "\n" ends a line: str.splitlines would also break at separators that JSON allows inside a text.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"not valid JSON: {error}", where=f"{path}, {place}", fix="write one complete JSON object per line") from None
        if not isinstance(value, dict):
            raise InputError(
                f"the row is not an object but {describe_type(value)}",
                where=f"{path}, {place}",
                fix='write each row as {"id": ..., "input": ..., ...}',
            )
        columns.update(dict.fromkeys(value))
        rows.append(Row(place=place, values=value))
    return Table(source=str(path), columns=tuple(columns), rows=tuple(rows))


def _read_csv(text: str, *, path: Path) -> Table:
    # strict: without it a quote inside an unescaped cell silently disappears, and with it the identity of an id.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    header: list[str] | None = None
    limit = csv.field_size_limit(sys.maxsize)
    line = 1
    try:
        for cells in reader:
            start, line = line, reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = cells
                _check_header(header, where=f"{path}, line {start}")
            elif len(cells) != len(header):
                raise InputError(
                    f"the row has {len(cells)} cells, but the header has {len(header)}",
                    where=f"{path}, line {start}",
                    fix="put cells that hold commas, quotes or line breaks in double quotes",
                )
            else:
                rows.append(Row(place=f"line {start}", values=dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        raise InputError(
            f"not valid CSV: {error}",
            where=f"{path}, line {line}",
            fix='put a cell that holds quotes in double quotes and double each of them: "a ""b"" c"',
        ) from None
    finally:
        csv.field_size_limit(limit)
    return Table(source=str(path), columns=tuple(header or ()), rows=tuple(rows))


def _check_header(header: list[str], *, where: str) -> None:
    for name in header:
        if header.count(name) > 1:
            raise InputError(f"the column {name!r} occurs {header.count(name)} times in the header", where=where, fix="rename one of them")


def _read_parquet(path: Path, *, wanted: Iterable[str]) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = tuple(file.schema_arrow.names)
            for name in names:
                if names.count(name) > 1:
                    raise InputError(f"the column {name!r} occurs {names.count(name)} times", where=str(path), fix="rename one of them")
            table = file.read(columns=[name for name in dict.fromkeys(wanted) if name in names])
            values = table.to_pylist() if table.num_columns else [{}] * file.metadata.num_rows
    except UnicodeDecodeError as error:
        raise InputError(f"a text is not UTF-8: {error}", where=str(path), fix="write the columns as UTF-8 text") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"not a readable Parquet file: {str(error).splitlines()[0]}", where=str(path), fix="write the file again"
        ) from None
    rows = tuple(Row(place=f"row {number}", values=value) for number, value in enumerate(values, start=1))
    return Table(source=str(path), columns=names, rows=rows)


def _read_hub(name: str, *, split: str | None, set_name: str) -> Table:
    import datasets

    _say_if_offline()
    try:
        loaded = datasets.load_dataset(name, split=split)
    # The library fails in many ways (no network, offline mode, unknown name, private data, unknown split).
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"path not found, and no data set of that name can be reached on the hub: {name}",
            where=name if split is None else f"{name}:{split}",
            why=f"the hub says: {reason}",
            fix="check the path; on a machine without network give a local file or folder",
        ) from error
    if split is None:
        splits = list(loaded)
        if set_name not in splits and len(splits) != 1:
            raise InputError(
                f"the data set has {len(splits)} splits, none of them called {set_name!r}",
                where=name,
                why=f"splits found: {', '.join(splits)}",
                fix=f"name one: {name}:{splits[0] if splits else 'train'}",
            )
        split = set_name if set_name in splits else splits[0]
        loaded = loaded[split]
    rows = tuple(Row(place=f"row {number}", values=value) for number, value in enumerate(loaded, start=1))
    return Table(source=f"{name}:{split}", columns=tuple(loaded.column_names), rows=rows)


def _say_if_offline() -> None:
    """Switch the hub's libraries to their cache where its name cannot even be resolved: they would try again for half a minute."""
    import datasets
    from huggingface_hub import constants

    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return  # a proxy resolves names itself
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True
        if hasattr(datasets, "config"):
            datasets.config.HF_HUB_OFFLINE = True


def describe_type(value: Any) -> str:
    """What a reader of JSON calls the type of a value."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)

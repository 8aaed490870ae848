"""Records and attack documents, checked row by row as they are read."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

from trainers.data.tables import Row, Table, describe_type, find_table, read_source, read_table
from trainers.data.types import FOLDS, AttackDocuments, Document, ForgetRetain, Record
from trainers.errors import InputError
from trainers.files import read_json

RECORD_FIELDS = ("id", "input", "output", "task", "alternative")
DOCUMENT_FIELDS = ("id", "document")
SETS = ("forget", "retain")

_USUAL_NAMES = {
    "input": ("question", "prompt", "instruction", "query"),
    "output": ("answer", "completion", "response", "target"),
    "document": ("text", "content"),
    "task": ("category", "subset"),
}


def normalise_whitespace(text: str) -> str:
    """The text with every run of white space replaced by one space: the sense in which two documents are the same."""
    return " ".join(text.split())


def load_records(source: Path | str, *, columns: Mapping[str, str] | None = None, set_name: str) -> tuple[Record, ...]:
    """Rows of the forget or the retain set, in their order.

    Args:
        source: a .jsonl, .json (one object per line), .csv or .parquet file, a folder that holds
            ``<set_name>.jsonl`` (or another of these types), or a hub data set "org/name" or "org/name:split".
        columns: the source's column for each of our fields (id, input, output, task, alternative) that is named otherwise.
            Without an id column a row is called ``<set_name>-row-00012qa0`` after its number (from 1), without
            a task column its task is "Task1"; the column of alternative answers is read where there is one.
        set_name: "forget" or "retain"; names the file in a folder, and the set in messages.

    Raises:
        InputError: naming file, line or row, and field.
    """
    columns = _check_columns(columns, fields=RECORD_FIELDS)
    table = read_source(source, set_name=set_name, wanted=columns.values())
    if not table.rows:
        raise InputError(f"the {set_name} set is empty", where=table.source, fix="give at least one row")
    present = _present_fields(table, columns=columns, required=("input", "output"), setting="data.columns.{field}={column}")
    records = []
    for number, row in enumerate(table.rows, start=1):

        def read(field: str, default: str, row: Row = row) -> str:
            return _text(row, field=field, column=columns[field], source=table.source) if field in present else default

        records.append(
            Record(
                id=read("id", f"{set_name}-row-{number:05d}qa0"),
                input=read("input", ""),
                output=read("output", ""),
                task=read("task", "Task1"),
                # A row without one has no column, null or an empty cell there.
                alternative=None if row.values.get(columns["alternative"]) in (None, "") else read("alternative", ""),
            )
        )
    _check_unique([record.id for record in records], table=table)
    return tuple(records)


def load_forget_retain(
    path: Path | str | None = None,
    *,
    forget: Path | str | None = None,
    retain: Path | str | None = None,
    columns: Mapping[str, str] | None = None,
) -> ForgetRetain:
    """Both sets, from one folder in LUME layout or from two sources.

    Raises:
        InputError: if a set is malformed, or a row id lies in both.
    """
    if (path is None) == (forget is None and retain is None) or (path is None and (forget is None or retain is None)):
        raise InputError("the data is given twice or not at all", fix="give either one folder, or both a forget and a retain source")
    if path is not None and Path(path).expanduser().is_file():
        raise InputError(
            "a file where a folder with both sets is expected",
            where=str(path),
            fix="give the folder that holds forget.jsonl and retain.jsonl, or the two files apart (data.forget and data.retain)",
        )
    sources = {name: path if path is not None else source for name, source in zip(SETS, (forget, retain), strict=True)}
    sets = {name: load_records(source, columns=columns, set_name=name) for name, source in sources.items() if source is not None}
    retained = {record.id for record in sets["retain"]}
    shared = [record.id for record in sets["forget"] if record.id in retained]
    if shared:
        raise InputError(
            f"the id {shared[0]!r} lies in the forget set and in the retain set"
            + (f", as do {len(shared) - 1} more" if shared[1:] else ""),
            where=" and ".join(dict.fromkeys(str(source) for source in sources.values())),
            why="a row cannot be forgotten and retained at once",
            fix="drop it from one of the sets, or give it another id",
        )
    return ForgetRetain(forget=sets["forget"], retain=sets["retain"])


def load_documents(path: Path, *, columns: Mapping[str, str] | None = None) -> tuple[Document, ...]:
    """Documents of one side of the membership attack: fields ``id`` (optional) and ``document``.

    Raises:
        InputError: naming file, line or row, and field.
    """
    columns = _check_columns(columns, fields=DOCUMENT_FIELDS)
    table = read_table(Path(path), wanted=columns.values())
    if not table.rows:
        raise InputError("there are no documents", where=table.source, fix="give at least one row")
    present = _present_fields(table, columns=columns, required=("document",), setting="columns: {field} = {column}")
    stem = Path(path).stem
    documents = tuple(
        Document(
            id=_text(row, field="id", column=columns["id"], source=table.source) if "id" in present else f"{stem}-row-{number:05d}",
            text=_text(row, field="document", column=columns["document"], source=table.source),
        )
        for number, row in enumerate(table.rows, start=1)
    )
    _check_unique([document.id for document in documents], table=table)
    return documents


def load_attack_documents(folder: Path) -> AttackDocuments:
    """Members and non-members of the membership attack: ``member.*`` and ``nonmember.*`` of a folder.

    Raises:
        InputError: if a file is missing or malformed, or a text lies in both.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError("folder not found", where=str(folder), fix="give a folder with member.jsonl and nonmember.jsonl")
    members, nonmembers = (load_documents(find_table(folder, name=name)) for name in ("member", "nonmember"))
    seen = {normalise_whitespace(document.text): document.id for document in members}
    for document in nonmembers:
        twin = seen.get(normalise_whitespace(document.text))
        if twin is not None:
            raise InputError(
                f"the non-member {document.id!r} has the same text as the member {twin!r}",
                where=str(folder),
                why="a document cannot be seen and unseen at once",
                fix="drop it from one of the files",
            )
    return AttackDocuments(members=members, nonmembers=nonmembers)


def load_splits(folder: Path) -> dict[str, dict[str, list[str]]] | None:
    """Fixed folds from ``splits.json``: set -> fold -> row ids; None where the folder has no such file.

    The fold "other" is read as part of "test". That every id exists is checked when the splits are applied.

    Raises:
        InputError: for an unknown set or fold, a set without folds, a list that is not one of texts, or an id in two folds.
    """
    path = Path(folder) / "splits.json"
    if not path.exists():
        return None
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"the file does not hold an object but {describe_type(content)}", where=str(path), fix=_SPLITS_FIX)
    for name in content:
        if name not in SETS:
            raise InputError(f"unknown set {name!r}", where=str(path), why="the sets are forget and retain", fix=_nearest_fix(name, SETS))
    splits: dict[str, dict[str, list[str]]] = {}
    for name in SETS:
        folds = content.get(name)
        if not isinstance(folds, dict) or not folds:
            raise InputError(f"no folds for the {name} set", where=f"{path}, key {name!r}", fix=_SPLITS_FIX)
        splits[name] = _read_folds(folds, where=f"{path}, key {name!r}")
    return splits


_SPLITS_FIX = 'write {"forget": {"train": [ids], "validation": [ids], "test": [ids]}, "retain": {...}}'


def _read_folds(folds: Mapping[str, object], *, where: str) -> dict[str, list[str]]:
    read: dict[str, list[str]] = {fold: [] for fold in FOLDS}
    home: dict[str, str] = {}
    for fold, ids in folds.items():
        if fold not in (*FOLDS, "other"):
            fix = _nearest_fix(fold, FOLDS)
            raise InputError(
                f"unknown fold {fold!r}", where=where, why=f"the folds are {', '.join(FOLDS)} (or other, read as test)", fix=fix
            )
        if not isinstance(ids, list) or not all(isinstance(item, str) for item in ids):
            raise InputError("the fold is not a list of row ids", where=f"{where}, fold {fold!r}", fix=_SPLITS_FIX)
        for row_id in ids:
            if row_id in home:
                raise InputError(f"the id {row_id!r} is listed twice: in {home[row_id]!r} and in {fold!r}", where=where, fix="list it once")
            home[row_id] = fold
        read["test" if fold == "other" else fold] += ids
    return read


def _check_columns(columns: Mapping[str, str] | None, *, fields: tuple[str, ...]) -> dict[str, str]:
    """Our fields and the column that holds each of them."""
    for field in columns or {}:
        if field not in fields:
            raise InputError(
                f"unknown field {field!r} in the column names", why=f"the fields are {', '.join(fields)}", fix=_nearest_fix(field, fields)
            )
    return {field: field for field in fields} | dict(columns or {})


def _present_fields(table: Table, *, columns: Mapping[str, str], required: tuple[str, ...], setting: str) -> set[str]:
    """Fields whose column occurs in the source.

    A required field and one whose column the caller named must be there.
    """
    present = {field for field, column in columns.items() if column in table.columns}
    for field, column in columns.items():
        if field in present or (field not in required and column == field):
            continue
        known = [name for name in _USUAL_NAMES.get(field, ()) if name in table.columns]
        near = [name for wanted in (column, field) for name in difflib.get_close_matches(wanted, table.columns, n=1)] or known
        raise InputError(
            f"no column {column!r}"
            + (f" for the field {field!r}" if column != field else "")
            + (f"; the nearest name is {near[0]!r}" if near else ""),
            where=table.source,
            why=f"columns found: {', '.join(map(repr, table.columns)) or 'none'}",
            fix=f"name the column that holds the {field}: {setting.format(field=field, column=near[0] if near else '<column>')}",
        )
    return present


def _text(row: Row, *, field: str, column: str, source: str) -> str:
    where = f"{source}, {row.place}, field {field!r}" + (f" (column {column!r})" if column != field else "")
    if column not in row.values:
        raise InputError(f"the row has no {column!r}, but other rows do", where=where, fix="give every row the same fields")
    value = row.values[column]
    if not isinstance(value, str):
        shown = f"{describe_type(value)}: {value!r:.60}" if value is not None else "null"
        raise InputError(f"the {field} is not a text but {shown}", where=where, fix="write it as text, in quotes")
    if not value.strip():
        raise InputError(
            f"the {field} is empty" if not value else f"the {field} holds only white space", where=where, fix="fill it or drop the row"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"the {field} holds half a character: {value[error.start]!a} at position {error.start}",
            where=where,
            why="a lone surrogate is no Unicode text and cannot be tokenised or written",
            fix="escape the character as a whole pair, or write it in UTF-8",
        ) from None
    return value


def _check_unique(ids: list[str], *, table: Table) -> None:
    first: dict[str, Row] = {}
    for row_id, row in zip(ids, table.rows, strict=True):
        if row_id in first:
            raise InputError(
                f"the id {row_id!r} occurs twice: in {first[row_id].place} and in {row.place}",
                where=f"{table.source}, {row.place}, field 'id'",
                fix="give every row its own id",
            )
        first[row_id] = row


def _nearest_fix(name: str, known: tuple[str, ...]) -> str | None:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else None

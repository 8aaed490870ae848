"""Small data sets for tests, and the way to the real ones."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from trainers.data.types import ForgetRetain, Record

REPOSITORY = Path(__file__).resolve().parents[2]


def real_data(name: str) -> Path:
    """A folder of real benchmark data (lume, mia, mmlu, ...); skips the test where it is absent."""
    folder = Path(os.environ.get("UNLEARN_TEST_DATA", REPOSITORY.parent / "shared" / "data")) / name
    if not folder.is_dir():
        pytest.skip(f"real data not found: {folder} (set UNLEARN_TEST_DATA)")
    return folder


def make_records(
    *, documents_per_task: int = 4, tasks: Sequence[str] = ("Task1", "Task2", "Task3"), prefix: str = "f"
) -> tuple[Record, ...]:
    """Plain rows: each document has one completion and one question; the texts name the document."""
    return tuple(
        Record(id=f"{prefix}{task}-{number}{suffix}", input=f"{prefix} {task} {number} {suffix}", output=f"says {number}", task=task)
        for task in tasks
        for number in range(documents_per_task)
        for suffix in ("sc1", "qa0")
    )


def make_data(*, documents_per_task: int = 4) -> ForgetRetain:
    """A forget and a retain set of plain rows without a shared document."""
    return ForgetRetain(
        forget=make_records(documents_per_task=documents_per_task, prefix="f"),
        retain=make_records(documents_per_task=documents_per_task, prefix="r"),
    )


def write_rows(path: Path, rows: Iterable[Mapping[str, Any] | Record]) -> Path:
    """Write rows as the suffix says: .jsonl/.json (one object per line), .csv or .parquet."""
    values = [asdict(row) if isinstance(row, Record) else dict(row) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), path)
    elif path.suffix == ".csv":
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(values[0]))
            writer.writeheader()
            writer.writerows(values)
    else:
        path.write_bytes("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode())
    return path

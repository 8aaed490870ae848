"""Paths that a run's processes can follow on whatever machine they are."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import overload

from launcher.storage import OwnHome, storage_of
from trainers.files import atomic_folder

INSIDE = "run:"
"""Beginning of a path that counts from the run's folder, wherever that lies."""
INPUTS = "inputs"
DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".txt")


def portable_path(path: Path, *, run: Path) -> str:
    """An absolute path, or one that counts from the run's folder if it lies inside."""
    absolute, folder = Path(path).resolve(), Path(run).resolve()
    return INSIDE + absolute.relative_to(folder).as_posix() if absolute.is_relative_to(folder) else str(absolute)


@overload
def local_path(text: str, *, run: Path) -> str: ...
@overload
def local_path(text: None, *, run: Path) -> None: ...
def local_path(text: str | None, *, run: Path) -> str | None:
    """The path on this machine that ``portable_path`` stood for; anything else stays as it is."""
    if text is None or not text.startswith(INSIDE):
        return text
    return str(Path(run).resolve() / text.removeprefix(INSIDE))


def carry_input(path: Path, *, run: Path, name: str) -> Path:
    """Data as the run's processes find them: copied into a run that has a home of its own, because other machines may not have them.

    A run resumes with the same data only, so that a copy is made once.

    Args:
        path: file or folder of data.
        run: the run's folder.
        name: of the copy.
    """
    if isinstance(storage_of(run), OwnHome) or path.resolve().is_relative_to(Path(run).resolve()):
        return path
    copy = Path(run) / INPUTS / name
    if not copy.exists():
        with atomic_folder(copy) as folder:
            for file in [path] if path.is_file() else sorted(path.rglob("*")):
                if file.is_file() and file.name.endswith(DATA_SUFFIXES):
                    place = folder / (file.name if path.is_file() else file.relative_to(path))
                    place.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, place)
    return copy / path.name if path.is_file() else copy

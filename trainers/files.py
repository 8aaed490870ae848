"""Writing so that nothing is ever half-written, and hashing what was written."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trainers.errors import InputError
from trainers.patience import check_mounted, patiently

OPTIMIZER = "optimizer.safetensors"
"""The state in a checkpoint that only its training reads."""


def _fsync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be made or written to, before any work is done for it.

    Raises:
        InputError: if the folder, or the nearest one above it that exists, is a file or may not be written to.
    """
    place = Path(folder).absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise InputError("a file stands where a folder is needed", where=str(place), fix="name another folder, or move the file away")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(
            "the folder cannot be written to",
            where=str(place),
            why="this user has no permission, or its file system is read-only",
            fix="name another folder, or change the permissions of this one",
        )


def check_output_file(path: Path) -> None:
    """Refuse a file that cannot be written, before any work is done for it.

    Raises:
        InputError: if it is a folder, or cannot be made where it is.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError("a folder where a file is to be written", where=str(path), fix=f"name a file, such as {path / 'eval.json'}")
    check_writable(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically: temporary name in the same folder, fsync, rename; a storage that is gone for a moment is waited for."""
    path = Path(path)
    patiently(lambda: _write_bytes(path, data), place=path)


def _write_bytes(path: Path, data: bytes) -> None:
    check_mounted(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _fsync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_bytes(path, text.encode("utf-8"))


def strict_json(value: Any) -> Any:
    """The same value with non-finite floats replaced by None, because JSON has no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): strict_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict_json(item) for item in value]
    return value


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON atomically; non-finite numbers become null."""
    write_text(path, json.dumps(strict_json(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: if the file is missing or is not JSON.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("file not found", where=str(path)) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"not a JSON file: {error}", where=str(path), fix="correct it, or write it again") from None
    except OSError as error:
        raise InputError(f"the file cannot be read: {error.strerror}", where=str(path), fix="check its permissions") from None


def append_jsonl(path: Path, value: Any) -> None:
    """Append one JSON line and flush it to the disk; a storage that is full or gone for a moment is waited for."""
    path = Path(path)
    line = json.dumps(strict_json(value), ensure_ascii=False, allow_nan=False) + "\n"
    patiently(lambda: _append(path, line.encode("utf-8")), place=path)


def _append(path: Path, line: bytes) -> None:
    check_mounted(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        # A writer that was killed may have left a torn line: never glue a new one to it.
        if before > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = b"\n" + line
        try:
            written = 0
            while written < len(line):
                written += file.write(line[written:])
            os.fsync(file.fileno())
        except BaseException:
            # A part of the line, or a whole one that is tried again, would stay for good.
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise


def read_jsonl(path: Path) -> list[Any]:
    """All complete lines of an append-only log; a line torn by a kill is skipped. Missing file: empty list."""
    path = Path(path)
    if not path.exists():
        return []
    values = []
    for line in path.read_bytes().split(b"\n"):
        if line.strip():
            with contextlib.suppress(ValueError):
                values.append(json.loads(line))
    return values


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary sibling folder that takes the final name only if the block succeeds.

    An existing folder of that name is replaced at the last moment; a failed block leaves it untouched.
    """
    path = Path(path)
    temporary = patiently(lambda: _temporary_folder(path), place=path)
    try:
        yield temporary
        patiently(lambda: _publish(temporary, path), place=path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _temporary_folder(path: Path) -> Path:
    check_mounted(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    os.chmod(temporary, 0o755)
    return temporary


def _publish(temporary: Path, path: Path) -> None:
    """Give a folder its final name; may be called again where it failed."""
    if temporary.exists():
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        _fsync_folder(temporary)
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".old"))
            os.replace(path, old / path.name)
            try:
                os.replace(temporary, path)
            except OSError:
                os.replace(old / path.name, path)
                raise
            finally:
                shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, path)
    _fsync_folder(path.parent)


def clear_unfinished(folder: Path) -> None:
    """Remove what writers that were killed left in a folder; nobody else may be writing there."""
    for path in Path(folder).glob(".*.tmp"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a value's canonical JSON (sorted keys), for configurations and records."""
    text = json.dumps(strict_json(value), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sha256_folder(path: Path, *, suffixes: Sequence[str] = (".safetensors", ".json")) -> str:
    """Hex SHA-256 over names and contents of the files directly in a folder that have one of the suffixes."""
    files = sorted(file for file in Path(path).iterdir() if file.is_file() and file.name.endswith(tuple(suffixes)))
    return sha256_json({file.name: sha256_file(file) for file in files})


def weights_hash(folder: Path) -> str:
    """SHA-256 over names and contents of a folder's safetensors files; computed once per state of the files.

    A checkpoint is the same with and without the state that its training goes on from.
    """
    files = sorted(file for file in Path(folder).glob("*.safetensors") if file.name != OPTIMIZER)
    state = tuple((file.name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for file in files for stat in (file.stat(),))
    return _weights_hash(str(Path(folder).absolute()), state)


@functools.lru_cache(maxsize=256)
def _weights_hash(folder: str, state: tuple) -> str:
    return sha256_json({name: sha256_file(Path(folder) / name) for name, *_ in state})

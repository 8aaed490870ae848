"""A file system of pyarrow over a local folder that counts what is asked of it, and fails on purpose."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyarrow.fs import FileInfo, FileSelector, FileSystemHandler, LocalFileSystem, PyFileSystem

CHANGING = ("create_dir", "delete_file", "move", "open_output_stream")


@dataclass
class Frailty:
    """What a file system is to do wrong, and what it was asked.

    Args:
        fails_at: number of the changing call, from 1, that fails; 0: none.
        times: how many calls from there on.
        number: of the system's error.
        whole_seconds: whether times of change lose their fraction, as in an object store.
    """

    fails_at: int = 0
    times: int = 10**9
    number: int = errno.ESTALE
    whole_seconds: bool = False
    changing: int = 0
    calls: list[tuple[str, str]] = field(default_factory=list)

    def meet(self, name: str, path: str) -> None:
        """Record a call, and fail if it is its turn."""
        self.calls.append((name, path))
        if name in CHANGING:
            self.changing += 1
            if self.fails_at and self.fails_at <= self.changing < self.fails_at + self.times:
                raise OSError(self.number, os.strerror(self.number))

    def moved(self) -> int:
        """Files that were written or read."""
        return sum(name in ("open_output_stream", "open_input_stream") for name, _ in self.calls)


class _Handler(FileSystemHandler):
    def __init__(self, frailty: Frailty) -> None:
        self.frailty, self.inner = frailty, LocalFileSystem()

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other

    def get_type_name(self) -> str:
        return "frail"

    def normalize_path(self, path: str) -> str:
        return path

    def _seen(self, info: FileInfo) -> FileInfo:
        mtime = info.mtime_ns
        if self.frailty.whole_seconds and mtime is not None:
            mtime -= mtime % 1_000_000_000
        return FileInfo(info.path, info.type, size=info.size, mtime_ns=mtime)

    def get_file_info(self, paths: list[str]) -> list[FileInfo]:
        return [self._seen(info) for info in self.inner.get_file_info(paths)]

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        self.frailty.meet("list", selector.base_dir)
        return [self._seen(info) for info in self.inner.get_file_info(selector)]

    def create_dir(self, path: str, recursive: bool) -> None:
        self.frailty.meet("create_dir", path)
        self.inner.create_dir(path, recursive=recursive)

    def delete_file(self, path: str) -> None:
        self.frailty.meet("delete_file", path)
        self.inner.delete_file(path)

    def move(self, source: str, target: str) -> None:
        self.frailty.meet("move", target)
        self.inner.move(source, target)

    def open_input_stream(self, path: str) -> Any:
        self.frailty.meet("open_input_stream", path)
        return self.inner.open_input_stream(path)

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        self.frailty.meet("open_output_stream", path)
        return self.inner.open_output_stream(path)

    def delete_dir(self, path: str) -> None:
        raise NotImplementedError

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        raise NotImplementedError

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError

    def copy_file(self, source: str, target: str) -> None:
        raise NotImplementedError

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        raise NotImplementedError

    def open_input_file(self, path: str) -> Any:
        raise NotImplementedError


def frail_filesystem(folder: Path, frailty: Frailty) -> tuple[Any, str]:
    """The file system, and the path in it."""
    return PyFileSystem(_Handler(frailty)), str(folder)

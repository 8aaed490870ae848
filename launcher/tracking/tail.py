"""New lines of an append-only JSON log, each once."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any


class Tail:
    """Reads a log from where it stopped the last time; from the beginning where the file was replaced by another one."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._file: tuple[int, int] | None = None
        self._offset = 0

    def read(self) -> list[Any]:
        """The complete lines since the last call. A line that is still being written is left for the next call; a torn one is skipped."""
        try:
            with open(self.path, "rb") as file:
                stat = os.fstat(file.fileno())
                identity = (stat.st_dev, stat.st_ino)
                if identity != self._file or stat.st_size < self._offset:
                    self._file, self._offset = identity, 0
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            self._file, self._offset = None, 0
            return []
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        values = []
        for line in complete.split(b"\n"):
            with suppress(ValueError):
                values.append(json.loads(line))
        return values

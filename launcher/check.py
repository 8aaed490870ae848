"""One line of the doctor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GIB = 1 << 30


@dataclass(frozen=True)
class Check:
    """One line: ``fail`` is required for any run, ``warn`` limits what can be run."""

    status: Literal["pass", "warn", "fail"]
    text: str
    fix: str | None = None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

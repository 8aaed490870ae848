"""What a tracker can do, whichever it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from launcher.tracking.content import Description, Facts
from launcher.tracking.files import Written


class OpenRun(Protocol):
    """One tracked run that is being written."""

    @property
    def written(self) -> Written:
        """How much the tracker held when the run was opened: rows of these steps are not to be written again."""
        ...

    def log(self, rows: Sequence[Mapping[str, float | int]]) -> None:
        """Add rows in ascending order of their ``step``."""
        ...

    def close(self, facts: Facts | None) -> None:
        """Write the facts, unless they were written already or are not known yet, and make sure that everything is kept.

        The run may be opened again later.
        """
        ...


class Tracker(Protocol):
    """Weights & Biases, TensorBoard, ..."""

    name: str

    def open(self, run: Description, *, kept: Written) -> OpenRun:
        """Begin a run, or go on with it.

        Args:
            run: what it is.
            kept: how much of it is known to be kept; what the tracker itself finds counts more.
        """
        ...

"""Processor time of several arms, interleaved so that a slow moment of the machine hits all of them alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Processor seconds per unit of work in each repetition."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle repetition."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> str:
        """Smallest to largest."""
        return f"{min(self.seconds):.4f} to {max(self.seconds):.4f}"


def time_interleaved(work: Mapping[str, Sequence[Callable[[], object]]], *, repeats: int, units: int) -> dict[str, Timing]:
    """Processor seconds of this process per unit: in each repetition every piece of every arm once, the arms taking turns.

    Processor seconds do not count what neighbours compute, but a neighbour still slows caches and memory; taking turns piece by
    piece lets it slow all arms.

    Args:
        work: the pieces of each arm's repetition, such as its optimizer steps; all arms have equally many.
        repeats: repetitions, counted after a first one that is not.
        units: what a repetition's seconds are divided by, such as its pairs.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(repeats + 1):
        spent = dict.fromkeys(work, 0.0)
        for pieces in zip(*work.values(), strict=True):
            for name, run in zip(work, pieces, strict=True):
                gc.collect()
                started = time.process_time()
                run()
                spent[name] += time.process_time() - started
        if repeat:
            for name, value in spent.items():
                seconds[name].append(value / units)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}

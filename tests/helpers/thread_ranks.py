"""Ranks as threads of one process: the arithmetic of a spread step without processes, ports or a sharding library."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from torch import Tensor

from trainers.engine.local import LocalEngine
from trainers.scoring import ScoringModel

Result = TypeVar("Result")


class Meeting:
    """Where the threads exchange values; every one of them must come, or all fail after ten seconds."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._barrier = threading.Barrier(world_size, timeout=10)
        self._values: list[Any] = [None] * world_size

    def gather(self, value: Any, *, rank: int) -> list[Any]:
        """Everyone's values, in rank order."""
        self._values[rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values

    def abort(self) -> None:
        """Wake the others up when one fails."""
        self._barrier.abort()


class ThreadEngine(LocalEngine):
    """One thread's replica of a model; gradients are summed over the threads before each update, and kept to be looked at."""

    def __init__(self, model: ScoringModel, *, meeting: Meeting, rank: int = 0, max_grad_norm: float = 1.0) -> None:
        super().__init__(model, weight_decay=0.01, max_grad_norm=max_grad_norm)
        self.rank, self.world_size = rank, meeting.world_size
        self._meeting = meeting
        self.gradient: dict[str, Tensor] = {}

    def sum(self, values: list[float]) -> list[float]:
        return [sum(column) for column in zip(*self._meeting.gather(values, rank=self.rank), strict=True)]

    def step(self, *, learning_rate: float) -> float:
        mine = {name: value.grad.clone() for name, value in self.model.trainable().items() if value.grad is not None}
        everyone = self._meeting.gather(mine, rank=self.rank)
        self.gradient = {name: sum(part[name] for part in everyone[1:]) + everyone[0][name] for name in mine}
        for name, value in self.model.trainable().items():
            value.grad = self.gradient[name].clone()
        return super().step(learning_rate=learning_rate)


def run_threads(function: Callable[[Meeting, int], Result], *, world_size: int) -> list[Result]:
    """Call ``function(meeting, rank)`` in as many threads as there are ranks; results in rank order.

    A rank's own exception is raised in preference to those of the ranks that waited for it in vain.
    """
    meeting = Meeting(world_size)

    def call(rank: int) -> Result:
        try:
            return function(meeting, rank)
        except BaseException:
            meeting.abort()
            raise

    with ThreadPoolExecutor(world_size) as pool:
        futures = [pool.submit(call, rank) for rank in range(world_size)]
    errors = [future.exception() for future in futures]
    for error in sorted((error for error in errors if error), key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]

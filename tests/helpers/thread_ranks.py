"""Ranks as threads of one process: the arithmetic of a spread step without processes, ports or a sharding library."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from trainers.engine.local import LocalEngine
from trainers.scoring import ScoringModel

Result = TypeVar("Result")


class Meeting:
    """Where the threads exchange values; every one of them must come, or all fail after a minute."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._barrier = threading.Barrier(world_size, timeout=60)
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

    def sum(self, values: Tensor) -> list[float]:
        total = values.double().clone()
        self.sum_tensors([total])
        return total.tolist()

    def sum_tensors(self, tensors: list[Tensor]) -> None:
        everyone = self._meeting.gather([value.clone() for value in tensors], rank=self.rank)
        for value, *parts in zip(tensors, *everyone, strict=True):
            value.copy_(torch.stack(parts).sum(dim=0))

    def step(self, *, learning_rate: float) -> float:
        # A rank whose rows do not reach a parameter adds zero to the others' gradient.
        trainable = self.model.trainable()
        self.gradient = {name: torch.zeros_like(value) if value.grad is None else value.grad.clone() for name, value in trainable.items()}
        self.sum_tensors(list(self.gradient.values()))
        for name, value in trainable.items():
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

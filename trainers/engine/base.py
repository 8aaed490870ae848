"""What the training loop asks of an engine: the only thing it knows about sharding."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from trainers.data.packing import Packed
from trainers.scoring import Request, Scores, ScoringModel


@dataclass(frozen=True)
class TrainingState:
    """Everything an optimizer step depends on, free of world size and ZeRO stage.

    Args:
        optimizer_step: updates done so far.
        optimizer_age: updates since the optimizer was last reset: AdamW's own count, which its bias correction reads.
        weights: trainable parameters in float32 by name, on the CPU, unsharded.
        exp_avg: AdamW's first moments, same names and shapes; empty at age 0.
        exp_avg_sq: AdamW's second moments.
    """

    optimizer_step: int
    optimizer_age: int
    weights: dict[str, Tensor]
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]


class Engine(Protocol):
    """One model, its optimizer and its ranks. Every method is collective: all ranks call it in the same order."""

    rank: int
    world_size: int
    device: str
    model: ScoringModel

    def forward(self, batch: Packed, request: Request) -> Scores:
        """A training pass over this rank's micro-batch."""
        ...

    def look(self, batch: Packed, request: Request) -> Scores:
        """The same pass for gradients that are only looked at, by ``torch.autograd.grad``: ``backward`` never follows."""
        ...

    def measure(self, batch: Packed) -> tuple[Tensor, Tensor]:
        """log p(label), nats, and whether the label is the likeliest token, at the evaluated tokens; no gradient."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient of this rank's share of the step's loss; ``last`` marks the step's final micro-batch.

        The gradient of the step is the *sum* over micro-batches and ranks: counts are divided out before.
        """
        ...

    def step(self, *, learning_rate: float) -> float:
        """Clip the global gradient norm, update, clear gradients; the norm before clipping.

        A parameter that the step's backward passes did not reach is updated with gradient zero: its moments fade and its
        weight decays, as sharded optimizers cannot do otherwise. Freeze what is to stay as it is.
        If the norm is not finite, no update is made and none is counted.
        """
        ...

    def reset_optimizer(self) -> None:
        """Start AdamW anew, moments and bias correction; weights and the number of updates stay."""
        ...

    def sum(self, values: Tensor) -> list[float]:
        """Element-wise sum over ranks of a vector on the engine's device, in float64; it waits for the device."""
        ...

    def sum_tensors(self, tensors: list[Tensor]) -> None:
        """Sum every tensor over the ranks, in place."""
        ...

    def measuring(self) -> AbstractContextManager[None]:
        """Forward passes inside have no dropout and no gradient; adapters stay on."""
        ...

    def state(self) -> TrainingState:
        """The unsharded training state (the same on every rank)."""
        ...

    def load_state(self, state: TrainingState) -> None:
        """Continue from a training state, whatever world size and stage wrote it."""
        ...

    def close(self) -> None:
        """Free what the engine holds; the process group stays."""
        ...

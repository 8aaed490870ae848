"""What the training loop asks of an engine: the only thing it knows about sharding."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from trainers.data.batches import Batch
from trainers.scoring import ScoringModel


@dataclass(frozen=True)
class TrainingState:
    """Everything an optimizer step depends on, free of world size and ZeRO stage.

    Args:
        optimizer_step: updates done so far.
        weights: trainable parameters in float32 by name, on the CPU, unsharded.
        exp_avg: AdamW's first moments, same names and shapes; empty before the first step.
        exp_avg_sq: AdamW's second moments.
    """

    optimizer_step: int
    weights: dict[str, Tensor]
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]


class Engine(Protocol):
    """One model, its optimizer and its ranks. Every method is collective: all ranks call it in the same order."""

    rank: int
    world_size: int
    device: str
    model: ScoringModel

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Hidden states (N, D) and logits (N, V) at the scored positions of this rank's micro-batch."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient of this rank's share of the step's loss; ``last`` marks the step's final micro-batch.

        The gradient of the step is the *sum* over micro-batches and ranks: counts are divided out before.
        """
        ...

    def step(self, *, learning_rate: float) -> float:
        """Clip the global gradient norm, update, clear gradients; the norm before clipping."""
        ...

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over ranks, in float64."""
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

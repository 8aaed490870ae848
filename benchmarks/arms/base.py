"""What a benchmark asks of an arm: one optimizer step, and the same step's loss and gradient without the update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.workload import PAD_TOKEN_ID, Settings
from trainers.data.encode import EncodedRow

IGNORED = -100
"""The label that transformers' cross-entropy leaves out."""


@dataclass(frozen=True)
class Gradient:
    """A step's loss and the gradients of the trained parameters by name, on the CPU, before clipping."""

    loss: float
    by_name: dict[str, Tensor]


class Arm(Protocol):
    """One way to compute the same optimizer step over some of a workload's pairs, given by their indices."""

    name: str

    def step(self, pairs: Sequence[int]) -> float:
        """Forward, backward, clip, update; the loss."""
        ...

    def gradient(self, pairs: Sequence[int]) -> Gradient:
        """The same loss and its gradient; parameters and optimizer stay as they are."""
        ...

    def tensors(self) -> list[Tensor]:
        """Everything that is alive between two steps: weights, reference model, optimizer state."""
        ...


class Trainee:
    """A model with trainable parameters and their AdamW, in its cheapest form: one fused operation per step."""

    def __init__(self, model: Any, *, settings: Settings) -> None:
        self.model = model.train()
        self.parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._max_grad_norm = settings.max_grad_norm
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )

    def update(self) -> None:
        """Clip, update, clear."""
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self._max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def take_gradient(self, loss: float) -> Gradient:
        """The accumulated gradient, which is cleared."""
        taken = {name: parameter.grad.detach().cpu().clone() for name, parameter in self.parameters.items() if parameter.grad is not None}
        self.optimizer.zero_grad(set_to_none=True)
        return Gradient(loss=loss, by_name=taken)

    def tensors(self) -> list[Tensor]:
        """Weights and optimizer state."""
        state = [value for entry in self.optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
        return [*self.model.parameters(), *state]


def pad_rows(rows: Sequence[EncodedRow], *, length: int, device: str) -> dict[str, Tensor]:
    """Rows as transformers takes them: input_ids, attention_mask and labels, filled on the right, each of shape (B, length)."""
    ids = torch.full((len(rows), length), PAD_TOKEN_ID)
    mask = torch.zeros(len(rows), length, dtype=torch.int64)
    labels = torch.full((len(rows), length), IGNORED)
    for index, row in enumerate(rows):
        number = len(row.input_ids)
        ids[index, :number] = torch.tensor(row.input_ids)
        mask[index, :number] = 1
        labels[index, row.num_prompt : number] = ids[index, row.num_prompt : number]
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}

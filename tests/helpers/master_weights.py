"""Plain torch in bfloat16 with float32 master weights: what the sharded engine is compared with in bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainers.engine.local import LocalEngine
from trainers.scoring import ScoringModel


class MasterWeightsEngine(LocalEngine):
    """Forward and backward passes in bfloat16; gradients are added up, clipped and applied in float32."""

    def __init__(self, model: ScoringModel, *, weight_decay: float, max_grad_norm: float) -> None:
        model.to(torch.bfloat16)
        super().__init__(model, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
        self._rounded = self._parameters
        self._parameters = {name: nn.Parameter(value.detach().float()) for name, value in self._rounded.items()}
        (group,) = self._optimizer.param_groups
        group["params"] = list(self._parameters.values())

    def backward(self, loss: Tensor, *, last: bool) -> None:
        super().backward(loss, last=last)
        for name, master in self._parameters.items():
            gradient = self._rounded[name].grad
            if gradient is not None:
                master.grad = gradient.float() if master.grad is None else master.grad + gradient.float()
            self._rounded[name].grad = None

    def step(self, *, learning_rate: float) -> float:
        norm = super().step(learning_rate=learning_rate)
        with torch.no_grad():
            for name, master in self._parameters.items():
                self._rounded[name].copy_(master)
        return norm

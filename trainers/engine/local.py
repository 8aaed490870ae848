"""Plain torch on one rank: the reference that the sharded engine is compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from trainers.data.packing import Packed
from trainers.engine.base import TrainingState
from trainers.errors import InputError
from trainers.scoring import Request, Scores, ScoringModel, measuring, scores_of

ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 1e-8


@contextlib.contextmanager
def adapters_off(model: ScoringModel) -> Iterator[None]:
    """Evaluation mode without gradients and, where there are adapters, without them: the target model."""
    disabled = model.lm.disable_adapter() if hasattr(model.lm, "disable_adapter") else contextlib.nullcontext()
    with measuring(model), disabled:
        yield


def check_state_fits(state: TrainingState, *, parameters: dict[str, nn.Parameter], shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse a state of other parameters before anything is overwritten.

    Raises:
        InputError: if a name or a shape differs.
    """
    if set(state.weights) != set(parameters):
        odd = sorted(set(state.weights) ^ set(parameters))[:3]
        raise InputError(
            f"the checkpoint holds other trainable parameters than the model: {', '.join(odd)}",
            fix="resume with the same train.lora and train.trainable",
        )
    for name, value in state.weights.items():
        if tuple(value.shape) != shapes[name]:
            raise InputError(f"parameter {name} has shape {shapes[name]} in the model but {tuple(value.shape)} in the checkpoint")


class LocalEngine:
    """AdamW on one process, in the dtype of the trainable parameters."""

    rank = 0
    world_size = 1

    def __init__(self, model: ScoringModel, *, weight_decay: float, max_grad_norm: float, device: str = "cpu") -> None:
        self.device = device
        self.model = model.to(device).train()
        self._parameters = model.trainable()
        self._max_grad_norm = max_grad_norm
        self._num_updates = self._age = 0
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(), lr=0.0, betas=ADAM_BETAS, eps=ADAM_EPS, weight_decay=weight_decay, fused=True
        )

    def forward(self, batch: Packed, request: Request) -> Scores:
        return scores_of(self.model(batch.to(self.device), request), request=request)

    def look(self, batch: Packed, request: Request) -> Scores:
        return self.forward(batch, request)

    def measure(self, batch: Packed) -> tuple[Tensor, Tensor]:
        log_prob_N, _, is_argmax_N = self.model(batch.to(self.device))
        return log_prob_N, is_argmax_N

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self, *, learning_rate: float) -> float:
        for parameter in self._parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._max_grad_norm)
        if not torch.isfinite(norm):
            return float(norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._num_updates += 1
        self._age += 1
        return float(norm)

    def reset_optimizer(self) -> None:
        self._optimizer.state.clear()
        self._age = 0

    def sum(self, values: Tensor) -> list[float]:
        return values.double().tolist()

    def sum_tensors(self, tensors: list[Tensor]) -> None:
        pass

    def measuring(self) -> contextlib.AbstractContextManager[None]:
        return measuring(self.model)

    def state(self) -> TrainingState:
        def moments(key: str) -> dict[str, Tensor]:
            found = ((name, self._optimizer.state.get(parameter, {}).get(key)) for name, parameter in self._parameters.items())
            return {name: value.detach().float().cpu().clone() for name, value in found if value is not None}

        return TrainingState(
            optimizer_step=self._num_updates,
            optimizer_age=self._age,
            weights={name: parameter.detach().float().cpu().clone() for name, parameter in self._parameters.items()},
            exp_avg=moments("exp_avg"),
            exp_avg_sq=moments("exp_avg_sq"),
        )

    def load_state(self, state: TrainingState) -> None:
        shapes = {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}
        check_state_fits(state, parameters=self._parameters, shapes=shapes)
        self._optimizer.state.clear()
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(state.weights[name])
                if name in state.exp_avg:
                    self._optimizer.state[parameter] = {
                        "step": torch.tensor(float(state.optimizer_age)),
                        # Copies: the optimizer writes into them, and the state is the caller's.
                        "exp_avg": state.exp_avg[name].to(parameter, copy=True),
                        "exp_avg_sq": state.exp_avg_sq[name].to(parameter, copy=True),
                    }
        self._num_updates, self._age = state.optimizer_step, state.optimizer_age

    def close(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

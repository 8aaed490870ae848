"""DeepSpeed ZeRO 0 to 3 behind the engine protocol: the only module that imports deepspeed."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainers.config import TrainConfig
from trainers.data.packing import Packed
from trainers.engine.base import TrainingState
from trainers.engine.ds_config import deepspeed_config
from trainers.engine.local import check_state_fits
from trainers.scoring import Request, Scores, ScoringModel, measuring, scores_of

_MOMENTS = ("exp_avg", "exp_avg_sq")


def import_deepspeed() -> Any:
    """DeepSpeed, set up so that nothing is compiled and nothing is printed on a machine without a GPU.

    By default the first use on a CPU compiles a shared-memory operation that only inference needs; a run killed in the
    middle of it leaves a lock that hangs every later run (https://github.com/pytorch/pytorch/issues/189245).
    """
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    # deepspeed.initialize imports a module decorated with torch.compile; this spares a second per process.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", category=FutureWarning, module="deepspeed")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


class DeepSpeedEngine:
    """One rank of a ZeRO-sharded trial. The default process group must exist."""

    def __init__(self, model: ScoringModel, *, train: TrainConfig, device: str) -> None:
        deepspeed = import_deepspeed()
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        self.rank, self.world_size, self.device = dist.get_rank(), dist.get_world_size(), device
        self.model = model
        self._stage = train.engine.stage
        self._bf16 = train.engine.dtype == "bfloat16"
        self._parameters = model.trainable()
        self._shapes = {name: tuple(getattr(value, "ds_shape", value.shape)) for name, value in self._parameters.items()}
        self._num_updates = self._age = 0
        self._engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=list(self._parameters.values()),
            config=deepspeed_config(train, has_gpu=device.startswith("cuda")),
        )
        if self._stage == 3:
            # The head's weight is read outside of the head's own forward pass, so its gathering is asked for here.
            deepspeed.zero.register_external_parameter(model, model.head_weight)
        self._engine.train()

    def forward(self, batch: Packed, request: Request) -> Scores:
        return scores_of(self._engine(batch.to(self.device), request), request=request)

    def look(self, batch: Packed, request: Request) -> Scores:
        # Past DeepSpeed, which would take the gradients for a part of the update and reduce what is not there.
        return scores_of(self.model(batch.to(self.device), request), request=request)

    def measure(self, batch: Packed) -> tuple[Tensor, Tensor]:
        log_prob_N, _, is_argmax_N = self._engine(batch.to(self.device))
        return log_prob_N, is_argmax_N

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages gradients over ranks; the step's loss is a sum whose counts are already divided out.
        self._engine.backward(loss * self.world_size)

    def step(self, *, learning_rate: float) -> float:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if self._is_plain():
            # Only here DeepSpeed neither tells the norm nor looks whether it is finite.
            norm = self._plain_norm()
            if not math.isfinite(norm):
                return norm
            self._engine.step()
        else:
            self._engine.step()
            norm = float(self._engine.get_global_grad_norm())
        if self._stage == 3:
            # Stage 3 leaves a parameter's last gradient in place, and takes it again when a later step does not reach the
            # parameter; the other stages take zero.
            self._engine.optimizer.grad_partitions_flat_buffer.zero_()
        if math.isfinite(norm):
            self._num_updates += 1
            self._age += 1
        return norm

    def reset_optimizer(self) -> None:
        self._start_moments(0)
        self._age = 0

    def sum(self, values: Tensor) -> list[float]:
        total = values.to(self.device, torch.float64).clone()
        dist.all_reduce(total)
        return total.tolist()

    def sum_tensors(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            dist.all_reduce(tensor)

    def measuring(self) -> contextlib.AbstractContextManager[None]:
        return measuring(self.model)

    def state(self) -> TrainingState:
        return TrainingState(
            optimizer_step=self._num_updates,
            optimizer_age=self._age,
            weights={name: self._get(name, None) for name in self._parameters},
            exp_avg={name: self._get(name, "exp_avg") for name in self._parameters} if self._age else {},
            exp_avg_sq={name: self._get(name, "exp_avg_sq") for name in self._parameters} if self._age else {},
        )

    def load_state(self, state: TrainingState) -> None:
        check_state_fits(state, parameters=self._parameters, shapes=self._shapes)
        self._start_moments(state.optimizer_age)
        for name in self._parameters:
            self._set(name, None, state.weights[name])
            for key in _MOMENTS if state.exp_avg else ():
                self._set(name, key, getattr(state, key)[name])
        self._publish_weights()
        self._num_updates, self._age = state.optimizer_step, state.optimizer_age

    def close(self) -> None:
        self._engine.destroy()

    # ---- unsharded access, whatever the stage ----

    @property
    def _inner(self) -> torch.optim.Optimizer:
        """The torch optimizer that holds the moments."""
        return getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)

    def _is_plain(self) -> bool:
        """Stage 0 in float32: parameters and moments are ordinary tensors, the same on every rank."""
        return self._stage == 0 and not self._bf16

    def _plain_norm(self) -> float:
        norms = [torch.linalg.vector_norm(value.grad) for value in self._parameters.values() if value.grad is not None]
        return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0

    def _get(self, name: str, key: str | None) -> Tensor:
        parameter = self._parameters[name]
        if self._is_plain():
            value = parameter if key is None else self._inner.state[parameter][key]
        else:
            from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

            value = safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)
        return value.detach().float().cpu().reshape(self._shapes[name]).clone()

    def _set(self, name: str, key: str | None, value: Tensor) -> None:
        parameter = self._parameters[name]
        value = value.to(self.device, torch.float32)
        if self._is_plain():
            target = parameter if key is None else self._inner.state[parameter][key]
            with torch.no_grad():
                target.copy_(value)
        elif self._stage == 3:
            self._set_partition(parameter, key, value)
        else:
            from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

            if key is None:
                safe_set_full_fp32_param(parameter, value)
            else:
                safe_set_full_optimizer_state(parameter, value, key)

    def _set_partition(self, parameter: Any, key: str | None, value: Tensor) -> None:
        """Write this rank's share of a ZeRO-3 parameter or moment; the last rank's share is padded with zeros."""
        optimizer = self._engine.optimizer
        share, _ = optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=key)
        flat = value.flatten()
        padded = torch.zeros(share.numel() * self.world_size, dtype=flat.dtype, device=flat.device)
        padded[: flat.numel()] = flat
        share.data.copy_(padded.narrow(0, share.numel() * self.rank, share.numel()))

    def _start_moments(self, age: int) -> None:
        """Moments of zero after ``age`` updates. Where there are some already they are filled, because DeepSpeed holds views."""
        for group in self._inner.param_groups:
            for parameter in self._flat_parameters(group):
                entry = self._inner.state[parameter]
                for key in _MOMENTS:
                    entry[key] = entry[key].zero_() if key in entry else torch.zeros_like(parameter)
                entry["step"] = torch.tensor(float(age))
        link = getattr(self._engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()

    def _flat_parameters(self, group: dict[str, Any]) -> list[Tensor]:
        if self._stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return group["params"]

    def _publish_weights(self) -> None:
        """Copy the float32 master weights into the weights that forward passes use."""
        optimizer = self._engine.optimizer
        if self._stage == 3:
            for sub_group in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        elif not self._is_plain():
            optimizer.update_lp_params()

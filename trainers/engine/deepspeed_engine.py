"""DeepSpeed ZeRO 0 to 3 behind the engine protocol: the only module that imports deepspeed."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainers.config import TrainConfig
from trainers.data.batches import Batch
from trainers.engine.base import TrainingState
from trainers.engine.ds_config import deepspeed_config
from trainers.engine.local import check_state_fits
from trainers.scoring import ScoringModel, measuring

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
        self._stage = train.engine.zero_stage
        self._bf16 = train.engine.dtype == "bfloat16"
        self._parameters = model.trainable()
        self._shapes = {name: tuple(getattr(value, "ds_shape", value.shape)) for name, value in self._parameters.items()}
        self._num_updates = 0
        self._engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=list(self._parameters.values()),
            config=deepspeed_config(train, has_gpu=device.startswith("cuda")),
        )
        self._engine.train()

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self._engine(batch.to(self.device))

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages gradients over ranks; the step's loss is a sum whose counts are already divided out.
        self._engine.backward(loss * self.world_size)

    def step(self, *, learning_rate: float) -> float:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        self._num_updates += 1
        return float(self._engine.get_global_grad_norm() or 0.0)

    def sum(self, values: list[float]) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def measuring(self) -> contextlib.AbstractContextManager[None]:
        return measuring(self.model)

    def state(self) -> TrainingState:
        return TrainingState(
            optimizer_step=self._num_updates,
            weights={name: self._get(name, None) for name in self._parameters},
            exp_avg={name: self._get(name, "exp_avg") for name in self._parameters} if self._num_updates else {},
            exp_avg_sq={name: self._get(name, "exp_avg_sq") for name in self._parameters} if self._num_updates else {},
        )

    def load_state(self, state: TrainingState) -> None:
        check_state_fits(state, parameters=self._parameters, shapes=self._shapes)
        if state.exp_avg:
            self._create_moments(state.optimizer_step)
        for name in self._parameters:
            self._set(name, None, state.weights[name])
            for key in _MOMENTS if state.exp_avg else ():
                self._set(name, key, getattr(state, key)[name])
        self._publish_weights()
        self._num_updates = state.optimizer_step

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

    def _create_moments(self, optimizer_step: int) -> None:
        """Give a fresh optimizer the state entries that its first step would make, with the right update count."""
        for group in self._inner.param_groups:
            for parameter in self._flat_parameters(group):
                self._inner.state[parameter] = {
                    "step": torch.tensor(float(optimizer_step)),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
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

"""From our configuration to DeepSpeed's dictionary: a pure function, no "auto" anywhere."""

from __future__ import annotations

from typing import Any

from trainers.config import TrainConfig
from trainers.engine.local import ADAM_BETAS, ADAM_EPS


def deepspeed_config(train: TrainConfig, *, has_gpu: bool) -> dict[str, Any]:
    """DeepSpeed's configuration for one trial.

    Gradient accumulation stays 1 there: the loop itself marks the last micro-batch of a step, because a short step at the
    end of an epoch has fewer of them. The torch AdamW needs no compiled operation on any machine.
    """
    stage = train.engine.stage
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": has_gpu,
        "contiguous_gradients": True,
        "reduce_bucket_size": 50_000_000 if has_gpu else 1_000_000,
    }
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": 50_000_000 if has_gpu else 100_000,
            "stage3_param_persistence_threshold": 100_000 if has_gpu else 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    return {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.max_grad_norm,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        "bf16": {"enabled": train.engine.dtype == "bfloat16"},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": train.learning_rate,
                "betas": list(ADAM_BETAS),
                "eps": ADAM_EPS,
                "weight_decay": train.weight_decay,
                "torch_adam": True,
            },
        },
    }

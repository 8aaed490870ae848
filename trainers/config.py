"""What a trial is: names, defaults, units and checks, without reading any file."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Frozen(BaseModel):
    """Immutable configuration that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ObjectiveName(StrEnum):
    """The forget term; retain terms are added by their weights."""

    GRAD_ASCENT = "grad_ascent"
    GRAD_DIFF = "grad_diff"
    KL_MIN = "kl_min"
    NPO = "npo"
    NPO_CE_KL = "npo_ce_kl"


class Reduction(StrEnum):
    """How NPO reduces answer log-probabilities before the ratio is taken."""

    SEQUENCE_SUM = "sequence_sum"
    """Sum over the answer's tokens, as in the NPO paper."""
    TOKEN_MEAN = "token_mean"
    """Mean over each answer's tokens: the variant of ZJUKLAB's public code at one sequence per micro-batch."""


class ObjectiveConfig(Frozen):
    """An unlearning objective. Weights left at null take the objective's published default."""

    name: ObjectiveName = ObjectiveName.NPO_CE_KL
    beta: float = Field(0.1, gt=0, description="NPO's inverse temperature, dimensionless")
    reduction: Reduction = Reduction.SEQUENCE_SUM
    forget_weight: float | None = Field(None, ge=0, description="weight of the forget term, dimensionless")
    retain_ce_weight: float | None = Field(None, ge=0, description="weight of cross-entropy on retain answers")
    retain_kl_weight: float | None = Field(None, ge=0, description="weight of KL(reference || model) on retain answers")


class LoraConfig(Frozen):
    """Low-rank adapters, in peft's words."""

    r: int = Field(32, ge=1, description="rank")
    lora_alpha: float = Field(32, gt=0, description="scale numerator: the update is lora_alpha / r * B @ A")
    lora_dropout: float = Field(0.05, ge=0, lt=1)
    target_modules: str | tuple[str, ...] = Field("all-linear", description="module names, or all-linear (without the head)")
    use_rslora: bool = Field(False, description="scale by lora_alpha / sqrt(r) instead")


class EngineConfig(Frozen):
    """How one trial is computed: plain torch or DeepSpeed, and over how many ranks."""

    name: Literal["deepspeed", "torch"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] = 2
    ranks: int = Field(1, ge=1, description="processes (GPUs) that share one trial")
    dtype: Literal["float32", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _torch_is_single(self) -> EngineConfig:
        if self.name == "torch" and self.ranks > 1:
            raise ValueError("engine.name = torch computes on one rank only; use deepspeed for engine.ranks > 1")
        if self.name == "deepspeed" and self.zero_stage == 0 and self.dtype == "bfloat16":
            raise ValueError("zero_stage = 0 with dtype = bfloat16 has no float32 master weights; use zero_stage: 1, which costs no more")
        return self


class TrainConfig(Frozen):
    """One unlearning trial."""

    objective: ObjectiveConfig = ObjectiveConfig()
    lora: LoraConfig | None = Field(LoraConfig(), description="null trains all parameters")
    engine: EngineConfig = EngineConfig()
    learning_rate: float = Field(1e-4, gt=0)
    num_train_epochs: float = Field(5, gt=0, description="passes over the forget set")
    train_batch_size: int = Field(4, ge=1, description="(forget, retain) pairs per optimizer step over all ranks")
    per_device_train_batch_size: int = Field(4, ge=1, description="pairs per forward and backward pass on one rank")
    lr_scheduler_type: Literal["linear", "constant", "cosine"] = "linear"
    warmup_ratio: float = Field(0.0, ge=0, le=1, description="share of the optimizer steps")
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0, description="global gradient norm above which the gradient is scaled down")
    forget_scope: Literal["answer", "document"] = Field(
        "answer",
        description="tokens of a forget completion that the forget term reads: its answer, or the whole document, which is what the "
        "membership attack reads",
    )
    max_length: int | None = Field(None, ge=8, description="tokens per row; null takes the model's context")
    seed: int = Field(42, ge=0)
    checkpoints: int = Field(2, ge=1, description="resumable checkpoints written, evenly spaced, the last at the end")
    signals: int = Field(4, ge=0, description="times the validation signals are measured, evenly spaced")

    @model_validator(mode="after")
    def _needs_master_weights(self) -> TrainConfig:
        if self.engine.name == "torch" and self.engine.dtype == "bfloat16" and self.lora is None:
            raise ValueError("engine.name = torch trains bfloat16 weights without float32 masters; use deepspeed, or lora, or float32")
        return self

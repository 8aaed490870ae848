"""What a trial is: names, defaults, units and checks, without reading any file."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trainers.names import OpenNames


class Frozen(BaseModel):
    """Immutable configuration that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ObjectiveName(OpenNames):
    """What makes the model forget; retain terms are added by their weights. Plugins add names (``trainers.objectives.custom``)."""

    GRAD_ASCENT = "grad_ascent"
    GRAD_DIFF = "grad_diff"
    KL_MIN = "kl_min"
    NPO = "npo"
    NPO_CE_KL = "npo_ce_kl"
    SIMNPO = "simnpo"
    DPO = "dpo"
    IDK_DPO = "idk_dpo"
    RMU = "rmu"
    ADAPTIVE_RMU = "adaptive_rmu"
    UNDIAL = "undial"
    WGA = "wga"
    SATIMP = "satimp"
    CE_U = "ce_u"
    NG_DIFF = "ng_diff"
    TASK_VECTOR_NEGATION = "task_vector_negation"


class Reduction(StrEnum):
    """How the log-probabilities of an answer's tokens become one number per sequence (NPO and DPO)."""

    SEQUENCE_SUM = "sequence_sum"
    """Sum over the answer's tokens, as in the NPO paper."""
    TOKEN_MEAN = "token_mean"
    """Mean over each answer's tokens: the variant of ZJUKLAB's public code at one sequence per micro-batch."""


class Average(StrEnum):
    """What the terms that average tokens (ascent, cross-entropy, KL and their relatives) average over."""

    TOKEN = "token"
    """All tokens of the step alike: long answers count more."""
    SEQUENCE = "sequence"
    """First each sequence's tokens, then the sequences: what one sequence per micro-batch amounts to."""


class KlScope(StrEnum):
    """The retain tokens at which KL(reference || model) is taken; the count it is divided by follows."""

    ANSWER = "answer"
    """The scored ones: answer and end token."""
    REAL = "real"
    """Every token of the row but the first, prompt included."""
    PADDED = "padded"
    """Real tokens and the pad tokens that fill the row up to train.max_length: what an unmasked KL over padded rows computes."""


class ObjectiveConfig(Frozen):
    """An unlearning objective. What is left at null takes the objective's published default."""

    name: ObjectiveName = ObjectiveName.NPO_CE_KL
    beta: float | None = Field(
        None, gt=0, description="NPO, SimNPO, DPO: inverse temperature; UNDIAL: logit penalty; WGA, SatImp: exponent of the probability"
    )
    beta_2: float | None = Field(None, ge=0, description="SatImp: exponent of one minus the probability")
    margin: float = Field(0.0, description="SimNPO's gamma, nats per token")
    reduction: Reduction = Reduction.SEQUENCE_SUM
    average: Average = Average.TOKEN
    kl_scope: KlScope = KlScope.ANSWER
    forget_weight: float | None = Field(None, ge=0, description="weight of the forget term, dimensionless")
    retain_ce_weight: float | None = Field(None, ge=0, description="weight of cross-entropy on retain answers")
    retain_kl_weight: float | None = Field(None, ge=0, description="weight of KL(reference || model) on the retain set")
    retain_activation_weight: float | None = Field(
        None, ge=0, description="RMU: weight of the squared distance between retain activations and the reference's"
    )
    layer: int | None = Field(
        None,
        description="RMU: decoder layer whose output is steered; negative counts from the end; null: a quarter of the way up",
    )
    steering: float | None = Field(
        None, gt=0, description="RMU: norm of the vector that forget activations are pulled to; adaptive: that norm over their own"
    )
    skip_first_token: bool = Field(True, description="CE-U: leave an answer's first token out, as its paper does")
    negation_scale: float | None = Field(None, gt=0, description="task-vector negation: multiple of the update that is subtracted")


class LoraConfig(Frozen):
    """Low-rank adapters, in peft's words."""

    r: int = Field(32, ge=1, description="rank")
    lora_alpha: float = Field(32, gt=0, description="scale numerator: the update is lora_alpha / r * B @ A")
    lora_dropout: float = Field(0.05, ge=0, lt=1)
    target_modules: str | tuple[str, ...] = Field("all-linear", description="module names, or all-linear (without the head)")
    use_rslora: bool = Field(False, description="scale by lora_alpha / sqrt(r) instead")


class TrainableConfig(Frozen):
    """Which parameters a trial without adapters trains; the default is all of them."""

    modules: tuple[str, ...] = Field((), description="last parts of module names, such as down_proj; empty: every module")
    last_layers: int | None = Field(None, ge=1, description="train the last so many decoder layers only")
    layers: tuple[int, int] | None = Field(
        None, description="first and last decoder layer to train, both included; negative counts from the end; null: all"
    )
    embeddings: bool = Field(
        False, description="with a layer range: train what lies outside the decoder layers too (embeddings, head, norm)"
    )

    @model_validator(mode="after")
    def _one_range(self) -> TrainableConfig:
        if self.layers is not None and self.last_layers is not None:
            raise ValueError("give either layers or last_layers, not both")
        return self

    @property
    def everything(self) -> bool:
        """Whether all parameters are trained."""
        return not self.modules and self.layers is None and self.last_layers is None


class ScheduleName(StrEnum):
    """Which rows meet in which step."""

    PAIRED = "paired"
    """Passes over the whole forget set, each row accompanied by retain rows."""
    CHUNKED = "chunked"
    """One chunk of the forget set after the other, each with epochs, optimizer and learning-rate schedule of its own (AILS-NTUA, SUGD)."""
    ALTERNATING = "alternating"
    """Forgetting steps on a chunk, then retain-only steps (annealing), and so on (AILS-NTUA, AGAD)."""


class ScheduleConfig(Frozen):
    """Order and company of the rows. Source of the chunked and alternating ones: https://arxiv.org/abs/2503.02443."""

    name: ScheduleName = ScheduleName.PAIRED
    retain_per_forget: int = Field(1, ge=1, description="retain rows that accompany each forget row (paired, chunked)")
    shuffle: bool = Field(True, description="false: rows in the file's order, in every epoch")
    chunk_size: int = Field(32, ge=1, description="forget rows per chunk (chunked, alternating)")
    annealing_fraction: float = Field(0.25, gt=0, le=1, description="share of the retain set in each annealing phase (alternating)")
    annealing_epochs: float = Field(1, gt=0, description="passes of each annealing phase over its share (alternating)")
    final_annealing: bool = Field(True, description="end with a phase over the whole retain set (alternating)")


class AdaptiveRetainConfig(Frozen):
    """A weight of retain cross-entropy that grows when the retain loss rises above its first epoch's average.

    weight = clip(scale * base ** rise + offset, lowest, highest), with the rise in nats per token, measured over the step before.
    Source: SHA256, https://arxiv.org/abs/2504.12996
    """

    scale: float = Field(0.3, ge=0)
    base: float = Field(6.0, gt=0)
    offset: float = Field(0.8)
    lowest: float = Field(1.2, ge=0, description="smallest weight")
    highest: float = Field(2.8, ge=0, description="largest weight")

    @model_validator(mode="after")
    def _ordered(self) -> AdaptiveRetainConfig:
        if self.lowest > self.highest:
            raise ValueError(f"lowest = {self.lowest:g} is above highest = {self.highest:g}; swap them")
        return self


class EngineConfig(Frozen):
    """How one trial is computed: plain torch or DeepSpeed, and over how many ranks."""

    name: Literal["deepspeed", "torch"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] | None = Field(
        2,
        description="what DeepSpeed shares out over ranks: 1 optimizer state, 2 gradients too, 3 weights too; null: the planner chooses",
    )
    ranks: int | None = Field(1, ge=1, description="processes (GPUs) that share one trial; null: the planner takes as few as fit")
    dtype: Literal["float32", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _torch_is_single(self) -> EngineConfig:
        if self.name == "torch" and self.num_ranks > 1:
            raise ValueError("engine.name = torch computes on one rank only; use deepspeed for engine.ranks > 1")
        if self.name == "deepspeed" and self.zero_stage == 0 and self.dtype == "bfloat16":
            raise ValueError("zero_stage = 0 with dtype = bfloat16 has no float32 master weights; use zero_stage: 1, which costs no more")
        return self

    @property
    def num_ranks(self) -> int:
        """The ranks; one where the choice was left to the planner and nobody asked it."""
        return 1 if self.ranks is None else self.ranks

    @property
    def stage(self) -> int:
        """The ZeRO stage; 2 where the choice was left to the planner and nobody asked it."""
        return 2 if self.zero_stage is None else self.zero_stage


class TrainConfig(Frozen):
    """One unlearning trial."""

    objective: ObjectiveConfig = ObjectiveConfig()
    lora: LoraConfig | None = Field(LoraConfig(), description="null trains all parameters, or those that trainable names")
    trainable: TrainableConfig = TrainableConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    adaptive_retain: AdaptiveRetainConfig | None = Field(None, description="null: the weight of retain cross-entropy is constant")
    engine: EngineConfig = EngineConfig()
    learning_rate: float = Field(1e-4, gt=0)
    num_train_epochs: float = Field(5, gt=0, description="passes over the forget set, or over each of its chunks")
    train_batch_size: int = Field(4, ge=1, description="forget rows per optimizer step over all ranks, each with its retain rows")
    per_device_train_batch_size: int | None = Field(
        4, ge=1, description="pairs per forward and backward pass on one rank; null: the planner takes as many as fit"
    )
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
    activation_checkpointing: bool | None = Field(
        None,
        description="recompute activations in the backward pass; null: only where they would not fit into the GPU's memory. Changes no "
        "number but the masks of dropout",
    )
    seed: int = Field(42, ge=0)
    checkpoints: int = Field(2, ge=1, description="resumable checkpoints written, evenly spaced, the last at the end")
    signals: int = Field(4, ge=0, description="times the validation signals are measured, evenly spaced")

    @property
    def micro_batch_size(self) -> int:
        """Pairs per pass; at most four where the choice was left to the planner and nobody asked it."""
        return min(4, self.train_batch_size) if self.per_device_train_batch_size is None else self.per_device_train_batch_size

    @model_validator(mode="after")
    def _needs_master_weights(self) -> TrainConfig:
        if self.engine.name == "torch" and self.engine.dtype == "bfloat16" and self.lora is None:
            raise ValueError("engine.name = torch trains bfloat16 weights without float32 masters; use deepspeed, or lora, or float32")
        return self

    @model_validator(mode="after")
    def _one_trainable_set(self) -> TrainConfig:
        if self.lora is not None and not self.trainable.everything:
            raise ValueError(
                "lora and trainable together: adapters are placed by lora.target_modules (a regular expression such as "
                "'.*layers\\.(4|5)\\.mlp\\.down_proj' chooses layers); set lora: null to train the model's own parameters"
            )
        return self

    @model_validator(mode="after")
    def _scopes_fit(self) -> TrainConfig:
        if self.objective.kl_scope is KlScope.PADDED and self.max_length is None:
            raise ValueError("objective.kl_scope = padded needs max_length: the length that rows are filled up to")
        return self

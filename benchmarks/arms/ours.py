"""This framework's step behind the interface of the arms: nothing of it is changed for a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from benchmarks.arms.base import Gradient
from benchmarks.workload import PAD_TOKEN_ID, Settings, Workload
from trainers.config import Average, EngineConfig, KlScope, LoraConfig, ObjectiveConfig, ObjectiveName, Reduction, TrainConfig
from trainers.data.encode import EncodedRow
from trainers.engine.base import Engine
from trainers.engine.local import LocalEngine
from trainers.lora import fuse_adapters
from trainers.objectives.table import objective_terms
from trainers.objectives.terms import Distributions, Scored, SideCounts, StepCounts, step_loss
from trainers.plan import StepPlan
from trainers.reference import Reference, compute_parts
from trainers.scoring import ScoringModel
from trainers.signals import SignalRows
from trainers.step import build_recipe, reference_request, train_step
from trainers.trial_rows import EncodedTrial
from trainers.vocabulary import ReferenceDistributions, score_vocabulary


def train_config(settings: Settings, *, lora: bool = True, dtype: str = "float32", engine: str = "torch") -> TrainConfig:
    """The trial configuration that computes what the recipe computes: token means per sequence, sequences averaged."""
    return TrainConfig(
        objective=ObjectiveConfig(
            name=ObjectiveName.NPO_CE_KL,
            beta=settings.beta,
            reduction=Reduction.TOKEN_MEAN,
            average=Average.SEQUENCE,
            kl_scope=KlScope.ANSWER,
            forget_weight=settings.forget_weight,
            retain_ce_weight=settings.retain_ce_weight,
            retain_kl_weight=settings.retain_kl_weight,
        ),
        lora=LoraConfig(r=settings.lora_r, lora_alpha=settings.lora_r, lora_dropout=settings.lora_dropout) if lora else None,
        engine=EngineConfig.model_validate({"name": engine, "dtype": dtype}),
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        train_batch_size=settings.pairs_per_step,
        per_device_train_batch_size=settings.pairs_per_step,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
    )


def reference_pass(model: ScoringModel, *, forget: Sequence[EncodedRow], retain: Sequence[EncodedRow], train: TrainConfig) -> Reference:
    """The frozen model's part of a sweep, computed once; in a sweep it is then read from a file by every trial."""
    request = reference_request(train, layer=None, trains_head=model.trains_head)
    sides = {"forget": forget, "retain": retain}
    device = str(model.head_weight.device)
    parts: dict[Any, Any] = {}
    for side, rows in sides.items():
        wanted = {part for part in request.parts if part.side == side}
        parts |= compute_parts(model, parts=wanted, request=request, rows=rows, pad_token_id=PAD_TOKEN_ID, device=device)
    return Reference(parts=parts, head_VD=model.head_weight.detach().clone() if model.trains_head else None)


class OursArm:
    """``trainers.step.train_step`` over packed rows with a cached reference.

    Args:
        policy: the model that is trained, on its device.
        workload: the rows that pairs index.
        settings: weights of the losses and the optimizer's values.
        train: the trial configuration; None derives it from the settings.
    """

    name = "ours"

    def __init__(self, *, policy: Any, workload: Workload, settings: Settings, train: TrainConfig | None = None) -> None:
        self._train = train or train_config(settings)
        if self._train.lora is not None:
            fuse_adapters(policy)  # as trainers.loop.build_model does
        model = ScoringModel(policy)
        self._rows = EncodedTrial(workload.forget, workload.retain, SignalRows((), (), (), ()), PAD_TOKEN_ID)
        self._reference = reference_pass(model, forget=workload.forget, retain=workload.retain, train=self._train)
        self._recipe = build_recipe(
            self._train, rows=self._rows, reference=self._reference, layer=None, hidden_size=int(model.head_weight.shape[1])
        )
        self._engine = self._build_engine(model)
        self._num_steps = 0

    def step(self, pairs: Sequence[int]) -> float:
        self._num_steps += 1
        return self._run(pairs)

    def gradient(self, pairs: Sequence[int]) -> Gradient:
        assert isinstance(self._engine, _HeldEngine), "gradients are read from the engine without sharding"
        self._engine.hold = True
        try:
            loss = self._run(pairs)
        finally:
            self._engine.hold = False
        return Gradient(loss=loss, by_name=self._engine.held)

    def tensors(self) -> list[Tensor]:
        optimizer = getattr(self._engine, "_optimizer", None)
        state = [value for entry in optimizer.state.values() for value in entry.values()] if optimizer else []
        cached = [value for part in self._reference.parts.values() for value in part.tensors.values()]
        return [*self._engine.model.parameters(), *state, *cached]

    def close(self) -> None:
        """Give the engine's memory back."""
        self._engine.close()

    def _run(self, pairs: Sequence[int]) -> float:
        step = max(1, self._num_steps)
        plan = StepPlan(step=step, epoch=1.0, forget=tuple(pairs), retain=tuple(pairs), cycle_step=step, cycle_steps=1 << 20)
        metrics = train_step(plan, engine=self._engine, rows=self._rows, reference=self._reference, recipe=self._recipe, train=self._train)
        return float(metrics["loss"])

    def _build_engine(self, model: ScoringModel) -> Engine:
        device = str(model.head_weight.device)
        if self._train.engine.name == "torch":
            return _HeldEngine(model, weight_decay=self._train.weight_decay, max_grad_norm=self._train.max_grad_norm, device=device)
        from trainers.loop import build_engine

        return build_engine(model, train=self._train, device=device)


class _HeldEngine(LocalEngine):
    """The plain engine, which can hold a step's gradient back instead of applying it."""

    hold = False
    held: dict[str, Tensor]

    def step(self, *, learning_rate: float) -> float:
        if not self.hold:
            return super().step(learning_rate=learning_rate)
        trainable = self.model.trainable()
        self.held = {name: value.grad.detach().cpu().clone() for name, value in trainable.items() if value.grad is not None}
        self.model.zero_grad(set_to_none=True)
        return 0.0


@dataclass(frozen=True)
class Answers:
    """One set's answer tokens in a micro-batch.

    Args:
        hidden_ND: last hidden states that predict them.
        label_N: their ids.
        row_N: row of each, from 0, ascending.
    """

    hidden_ND: Tensor
    label_N: Tensor
    row_N: Tensor

    @property
    def num_rows(self) -> int:
        """Rows of this set."""
        return int(self.row_N[-1]) + 1

    @property
    def counts(self) -> SideCounts:
        """Denominators of a step that has these rows only."""
        return SideCounts(tokens=len(self.label_N), sequences=self.num_rows, positions=len(self.label_N), real_tokens=len(self.label_N))


def loss_of_answers(
    *,
    forget: Answers,
    retain: Answers,
    head_VD: Tensor,
    reference_log_prob_N: Tensor,
    reference: ReferenceDistributions,
    settings: Settings,
) -> Tensor:
    """The loss from the last hidden states at answer tokens and the cached reference, as a step computes it."""
    forget_scores = score_vocabulary(forget.hidden_ND, head_VD=head_VD, label_N=forget.label_N)
    retain_scores = score_vocabulary(retain.hidden_ND, head_VD=head_VD, label_N=retain.label_N, reference=reference)
    assert retain_scores.reference_mean_logit_N is not None
    forget_scored = Scored(
        token_log_probs_N=forget_scores.log_prob_N,
        row_N=forget.row_N,
        num_rows=forget.num_rows,
        reference_token_log_probs_N=reference_log_prob_N,
    )
    retain_scored = Scored(
        token_log_probs_N=retain_scores.log_prob_N,
        row_N=retain.row_N,
        num_rows=retain.num_rows,
        distributions=Distributions(
            log_normaliser_K=retain_scores.log_normaliser_N,
            reference_mean_logit_K=retain_scores.reference_mean_logit_N,
            reference_negative_entropy_K=reference.negative_entropy_N,
            row_K=retain.row_N,
        ),
    )
    terms = objective_terms(train_config(settings).objective, forget=forget_scored, retain=retain_scored)
    return step_loss(terms, counts=StepCounts(forget=forget.counts, retain=retain.counts))

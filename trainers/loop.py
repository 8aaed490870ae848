"""One unlearning trial from its first step to its last: free of Ray, the same in one process or many."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trainers.adaptive_retain import adaptive_retain_weight
from trainers.checkpoint import (
    MANIFEST,
    StoredTensors,
    check_stored,
    checkpoint_folder,
    finished_checkpoints,
    load_checkpoint,
    negated_export,
    save_checkpoint,
)
from trainers.config import ObjectiveName, TrainConfig
from trainers.distributed import Rank, start_process_group, stop_process_group
from trainers.engine.base import Engine
from trainers.engine.local import LocalEngine
from trainers.errors import InputError
from trainers.files import append_jsonl, clear_unfinished, read_jsonl, sha256_json, write_text
from trainers.lora import fuse_adapters
from trainers.memory_plan import recomputes_activations
from trainers.modeling import (
    add_lora,
    enable_activation_checkpointing,
    layer_index,
    load_model,
    model_skeleton,
    scaled_adapters,
    select_trainable,
)
from trainers.objectives.table import Need, needs, unused_settings
from trainers.plan import StepPlan, plan_trial
from trainers.reference import Reference, ReferenceRequest, is_cached, obtain_reference
from trainers.scoring import ScoringModel
from trainers.signals import measure_signals
from trainers.step import DivergedError, Recipe, build_recipe, check_finite_weights, history_of, reference_request, train_step
from trainers.trial_rows import EncodedTrial, TrialInputs, encode_trial, uses_retain

__all__ = ["DivergedError", "TrialInputs", "TrialStopped", "prepare_reference", "reference_setting", "train_worker"]
log = logging.getLogger(__name__)


class TrialStopped(Exception):
    """The trial was asked to stop and did, after a checkpoint of its last step: the next call goes on there."""


def build_model(inputs: TrialInputs, *, train: TrainConfig) -> ScoringModel:
    """The target with trainable adapters, or with the parameters that ``train.trainable`` names."""
    model = load_model(inputs.target, dtype=train.engine.dtype)
    if train.lora is not None:
        adapted = add_lora(model, lora=train.lora, seed=train.seed)
        if train.engine.name == "torch" or train.engine.stage < 3:
            fuse_adapters(adapted)
        return ScoringModel(adapted)
    select_trainable(model, trainable=train.trainable)
    if not train.trainable.everything or train.objective.name is ObjectiveName.TASK_VECTOR_NEGATION:
        # Their checkpoints combine the target's stored tensors with the trained ones: fail now, not at the first of them.
        check_stored((name for name, value in model.named_parameters() if value.requires_grad), stored=StoredTensors(inputs.target))
    return ScoringModel(model)


def check_trial(skeleton: Any, *, train: TrainConfig) -> None:
    """Refuse what a target of this shape cannot do, before its weights are loaded; the skeleton is used up.

    Raises:
        InputError: if a trial names modules or layers that do not exist.
    """
    if train.lora is not None:
        skeleton = add_lora(skeleton, lora=train.lora, seed=train.seed)
    else:
        select_trainable(skeleton, trainable=train.trainable)
    steered_layer(ScoringModel(skeleton), train=train)


def steered_layer(model: ScoringModel, *, train: TrainConfig) -> int | None:
    """The decoder layer whose output the objective steers, from 0; None if it steers none.

    Raises:
        InputError: if there is no such layer, or the architecture cannot be looked into.
    """
    if Need.ACTIVATIONS not in needs(train.objective):
        return None
    if not model.packs:
        raise InputError(
            f"{type(model.causal_lm).__name__} does not give its activations", where=f"train.objective.name = {train.objective.name}",
            fix="use another objective, or an architecture such as OLMo or Llama",
        )  # fmt: skip
    return layer_index(model.causal_lm, layer=train.objective.layer)


def request_of(model: ScoringModel, *, train: TrainConfig) -> ReferenceRequest:
    """What a trial reads of the reference."""
    return reference_request(train, layer=steered_layer(model, train=train), trains_head=model.trains_head)


def trial_reference(model: ScoringModel, *, inputs: TrialInputs, rows: EncodedTrial, train: TrainConfig, device: str) -> Reference:
    """The cached reference of a trial, computed first where this run has none for these rows."""
    return _obtain(model, request=request_of(model, train=train), inputs=inputs, rows=rows, train=train, device=device)


def _obtain(
    model: ScoringModel, *, request: ReferenceRequest, inputs: TrialInputs, rows: EncodedTrial, train: TrainConfig, device: str
) -> Reference:
    return obtain_reference(
        model,
        request=request,
        rows=rows.by_side,
        target_hash=inputs.target_hash,
        dtype=train.engine.dtype,
        pad_token_id=rows.pad_token_id,
        root=inputs.reference_root,
        device=device,
    )


def prepare_reference(inputs: TrialInputs, *, train: TrainConfig) -> None:
    """Fill the reference cache before a sweep's trials start, so that none of them computes it.

    The target's weights are loaded only if something is missing. No trial may be running yet.
    """
    clear_unfinished(Path(inputs.reference_root))
    rows = encode_trial(inputs, train=train)
    skeleton = model_skeleton(inputs.target)
    skeleton.requires_grad_(False)
    if train.lora is None:
        select_trainable(skeleton, trainable=train.trainable)
    request = request_of(ScoringModel(skeleton), train=train)
    if is_cached(request=request, rows=rows.by_side, target_hash=inputs.target_hash, dtype=train.engine.dtype, root=inputs.reference_root):
        return
    model = ScoringModel(load_model(inputs.target, dtype=train.engine.dtype))
    _obtain(model, request=request, inputs=inputs, rows=rows, train=train, device=Rank().device)


def reference_setting(train: TrainConfig) -> str:
    """The settings that decide what a trial reads of the reference, as text: trials with the same share all of it."""
    objective = train.objective
    return str(
        (train.engine.dtype, train.forget_scope, train.max_length, objective.name, objective.kl_scope, objective.layer)
        + (
            sorted(reference_request(train, layer=None, trains_head=False).parts),
            uses_retain(train),
            train.lora is None and train.trainable,
        )
        + ((train.seed,) if Need.ALTERNATIVE_ANSWERS in needs(objective) else ())
    )


def rows_key(inputs: TrialInputs, *, rows: EncodedTrial, dtype: str) -> str:
    """A name for the target and the rows that a trial computes on, kept in its checkpoints."""
    shown = [[(row.input_ids, row.num_prompt, row.evaluate_from, row.num_padding) for row in side] for side in rows.by_side.values()]
    return sha256_json({"version": 2, "target": inputs.target_hash, "rows": shown, "dtype": dtype})[:16]


def build_engine(model: ScoringModel, *, train: TrainConfig, device: str) -> Engine:
    """The engine that a configuration asks for."""
    if train.engine.name == "torch":
        return LocalEngine(model, weight_decay=train.weight_decay, max_grad_norm=train.max_grad_norm, device=device)
    from trainers.engine.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(model, train=train, device=device)


def evenly_spaced(count: int, *, num_steps: int) -> frozenset[int]:
    """``count`` steps out of ``num_steps``, the last one among them."""
    return frozenset(max(1, round(num_steps * part / count)) for part in range(1, count + 1)) if count else frozenset()


def train_worker(
    *, train: TrainConfig, inputs: TrialInputs, trial: Path, rank: Rank | None = None, stop: Callable[[], bool] | None = None
) -> Iterator[dict[str, Any]]:
    """Run or resume one trial on one rank, yielding the metrics of each step.

    Writes ``metrics.jsonl`` and checkpoints under ``trial`` (rank 0 only) and continues from the newest finished
    checkpoint found there. Collective: every rank of the trial iterates it to the end.

    Args:
        train: the trial.
        inputs: what it reads.
        trial: its folder.
        rank: this process; default: the only one.
        stop: asked before every step, on rank 0 only, whether to end here with a checkpoint; given on all ranks or on none.

    Raises:
        InputError: if rows, model or checkpoint are unusable.
        DivergedError: if the loss stops being finite.
        TrialStopped: on every rank, before the same step, if ``stop`` says so.
    """
    rank = rank or Rank()
    needs_group = train.engine.name == "deepspeed"
    if needs_group:
        start_process_group(rank)
    engine: Engine | None = None
    try:
        if rank.rank == 0:
            for name in unused_settings(train.objective):
                log.warning("train.objective.%s has no effect on %s", name, train.objective.name.value)
        rows = encode_trial(inputs, train=train)
        model = build_model(inputs, train=train)
        if rank.rank == 0:
            trial_reference(model, inputs=inputs, rows=rows, train=train, device=rank.device)
        if rank.world_size > 1:
            torch.distributed.barrier()
        reference = trial_reference(model, inputs=inputs, rows=rows, train=train, device=rank.device)
        plans = plan_trial(train=train, num_forget=len(rows.forget), num_retain=len(rows.retain) if uses_retain(train) else 0)
        recipe = build_recipe(
            train,
            rows=rows,
            reference=reference,
            layer=steered_layer(model, train=train),
            hidden_size=model.head_weight.shape[1],
        )
        if recomputes_activations(model, rows=rows, train=train, rank=rank):
            enable_activation_checkpointing(model.lm)
        engine = build_engine(model, train=train, device=rank.device)
        run = _Run(engine, rows=rows, reference=reference, recipe=recipe, train=train, inputs=inputs, trial=Path(trial))
        yield from run.steps(plans, stop=stop)
    finally:
        if engine is not None:
            engine.close()
        if needs_group:
            stop_process_group(rank)


class _Run:
    """The steps of one trial on one rank, with what they share."""

    def __init__(
        self,
        engine: Engine,
        *,
        rows: EncodedTrial,
        reference: Reference,
        recipe: Recipe,
        train: TrainConfig,
        inputs: TrialInputs,
        trial: Path,
    ) -> None:
        self.engine, self.rows, self.reference, self.recipe = engine, rows, reference, recipe
        self.train, self.inputs, self.trial = train, inputs, trial
        self.rows_key = rows_key(inputs, rows=rows, dtype=train.engine.dtype)
        self.negates = train.objective.name is ObjectiveName.TASK_VECTOR_NEGATION
        self.history: list[dict[str, Any]] = []

    def steps(self, plans: Sequence[StepPlan], *, stop: Callable[[], bool] | None = None) -> Iterator[dict[str, Any]]:
        """Do what is not done yet, yielding the metrics of each step."""
        engine, train, num_steps = self.engine, self.train, len(plans)
        done = self.resume()
        signal_steps = evenly_spaced(train.signals, num_steps=num_steps)
        checkpoint_steps = evenly_spaced(train.checkpoints, num_steps=num_steps)
        first_epoch = sum(1 for plan in plans if plan.retain and plan.epoch <= 1 + 1e-9)
        saved = done
        if done in checkpoint_steps:
            self.drop_checkpoints(but=checkpoint_steps)
        for plan in plans[done:]:
            if stop is not None and self.agreed(stop):
                if plan.step - 1 > saved:
                    self.save(num_steps=num_steps)
                raise TrialStopped(f"before step {plan.step} of {num_steps}")
            started = time.perf_counter()
            recipe = self.recipe_now(first_epoch=first_epoch)
            metrics = train_step(plan, engine=engine, rows=self.rows, reference=self.reference, recipe=recipe, train=train)
            if train.adaptive_retain is not None:
                metrics["retain_ce_weight"] = recipe.weights.retain_ce
            self.history.append(metrics)
            if plan.step in signal_steps:
                signals = self.signals()
                if signals:
                    metrics["signals"] = signals
            metrics["seconds"] = round(time.perf_counter() - started, 4)
            if engine.rank == 0:
                append_jsonl(self.trial / "metrics.jsonl", metrics)
            if plan.step in checkpoint_steps:
                self.save(num_steps=num_steps)
                self.drop_checkpoints(but=checkpoint_steps)
                saved = plan.step
            yield {**metrics, "num_steps": num_steps}

    def recipe_now(self, *, first_epoch: int) -> Recipe:
        """The recipe of the next step: its weight of retain cross-entropy may follow what has been lost so far."""
        config = self.train.adaptive_retain
        if config is None:
            return self.recipe
        weight = adaptive_retain_weight(config, history=history_of(self.history, term="retain_ce"), steps_per_epoch=max(1, first_epoch))
        return replace(self.recipe, weights=replace(self.recipe.weights, retain_ce=weight))

    def signals(self) -> dict[str, float]:
        """The validation signals of what a checkpoint written now would hold."""
        scale = -self.negation_scale if self.negates else 1.0
        if self.negates and self.train.lora is None:
            return {}  # the negated weights exist in checkpoints only
        with scaled_adapters(self.engine.model.lm, scale=scale):
            return measure_signals(self.engine, rows=self.rows.signals, pad_token_id=self.rows.pad_token_id)

    @property
    def negation_scale(self) -> float:
        """Multiple of the trained update that a negating trial subtracts."""
        scale = self.recipe.objective.negation_scale
        assert scale is not None, "resolved"
        return scale

    def save(self, *, num_steps: int) -> None:
        """Write a checkpoint; collective.

        Raises:
            DivergedError: on every rank, if the last update left weights that are not finite; then nothing is written.
        """
        state = self.engine.state()
        check_finite_weights(state)
        if self.engine.rank > 0:
            return
        facts = {
            "target_hash": self.inputs.target_hash,
            "target": str(self.inputs.target),
            "rows_key": self.rows_key,
            "num_steps": num_steps,
        }
        export = negated_export(train=self.train, base=self.inputs.target, scale=self.negation_scale) if self.negates else None
        save_checkpoint(self.trial, state=state, train=self.train, facts=facts, model_files=self.inputs.target, export=export)

    def agreed(self, stop: Callable[[], bool]) -> bool:
        """What rank 0 answers, on every rank; collective."""
        answer = torch.tensor([float(self.engine.rank == 0 and stop())], device=self.engine.device)
        return self.engine.sum(answer) != [0.0]

    def drop_checkpoints(self, *, but: frozenset[int]) -> None:
        """Remove the checkpoints that only served to go on after a stop: they would count as candidates for a merge."""
        if self.engine.rank == 0:
            for folder in finished_checkpoints(self.trial):
                if folder not in {checkpoint_folder(self.trial, step=step) for step in but}:
                    (folder / MANIFEST).unlink()
                    shutil.rmtree(folder)

    def resume(self) -> int:
        """Steps already done: load the newest checkpoint and drop the metrics of steps that will be repeated."""
        log_file = self.trial / "metrics.jsonl"
        if self.engine.rank == 0:
            clear_unfinished(self.trial / "checkpoints")
        found = finished_checkpoints(self.trial)
        if not found:
            if self.engine.rank == 0:
                log_file.unlink(missing_ok=True)
            return 0
        state = load_checkpoint(found[-1], train=self.train, target_hash=self.inputs.target_hash, rows_key=self.rows_key)
        self.engine.load_state(state)
        self.history = [line for line in read_jsonl(log_file) if line["step"] <= state.optimizer_step]
        if self.engine.rank == 0:
            write_text(log_file, "".join(json.dumps(line) + "\n" for line in self.history))
        log.info("resumed from %s at step %d", found[-1], state.optimizer_step)
        return state.optimizer_step

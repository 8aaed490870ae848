"""One unlearning trial from its first step to its last: free of Ray, the same in one process or many."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainers.checkpoint import finished_checkpoints, load_checkpoint, save_checkpoint
from trainers.config import TrainConfig
from trainers.data.batches import Batch, MicroBatch, StepPlan, collate, plan_steps, split_step
from trainers.data.encode import EncodedRow, encode_records, encode_text, whole_document
from trainers.data.types import AttackDocuments, ForgetRetain, Kind
from trainers.distributed import Rank, start_process_group, stop_process_group
from trainers.engine.base import Engine
from trainers.engine.local import LocalEngine
from trainers.errors import RunError
from trainers.files import append_jsonl, read_jsonl, write_text
from trainers.modeling import add_lora, context_length, load_model, load_model_config, load_tokenizer
from trainers.objectives.log_probs import token_log_probs
from trainers.objectives.table import objective_terms, resolve_weights
from trainers.objectives.terms import Scored, StepCounts, step_loss
from trainers.reference import Reference, compute_reference, load_reference, reference_key, save_reference
from trainers.schedule import learning_rate
from trainers.scoring import ScoringModel, connect_to_graph, set_step_seed
from trainers.signals import SignalRows, measure_signals

log = logging.getLogger(__name__)
REFERENCE_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class TrialInputs:
    """Everything a trial reads.

    Args:
        target: folder of the target model.
        target_hash: hash of its weights, recorded in every checkpoint.
        train: the rows that updates are computed on.
        validation: the rows that the signals are measured on.
        attack: documents for the AUC signal, or None.
        reference_root: folder of the reference cache, shared by all trials of a sweep.
    """

    target: Path
    target_hash: str
    train: ForgetRetain
    validation: ForgetRetain
    attack: AttackDocuments | None
    reference_root: Path


class DivergedError(RunError):
    """The loss stopped being finite; no update was made with it."""


@dataclass(frozen=True)
class EncodedTrial:
    """A trial's rows as token ids."""

    forget: Sequence[EncodedRow]
    retain: Sequence[EncodedRow]
    signals: SignalRows
    pad_token_id: int


def encode_trial(inputs: TrialInputs, *, train: TrainConfig) -> EncodedTrial:
    """Encode every row of a trial; a row longer than the context is an InputError before anything is computed."""
    tokenizer = load_tokenizer(inputs.target)
    context = context_length(load_model_config(inputs.target))
    length = min(train.max_length or context, context)

    def encode(records: Sequence[Any]) -> list[EncodedRow]:
        return encode_records(records, tokenizer=tokenizer, max_length=length)

    def documents(side: str) -> list[EncodedRow]:
        return [encode_text(document.text, tokenizer=tokenizer) for document in getattr(inputs.attack, side)] if inputs.attack else []

    signals = SignalRows(encode(inputs.validation.forget), encode(inputs.validation.retain), documents("members"), documents("nonmembers"))
    forget = encode(inputs.train.forget)
    if train.forget_scope == "document":
        kinds = [record.kind for record in inputs.train.forget]
        forget = [whole_document(row) if kind is Kind.COMPLETION else row for row, kind in zip(forget, kinds, strict=True)]
    return EncodedTrial(forget, encode(inputs.train.retain), signals, int(tokenizer.pad_token_id))


def build_model(inputs: TrialInputs, *, train: TrainConfig) -> ScoringModel:
    """The target with trainable adapters, or with all parameters trainable."""
    model = load_model(inputs.target, dtype=train.engine.dtype)
    if train.lora is not None:
        return ScoringModel(add_lora(model, lora=train.lora, seed=train.seed))
    return ScoringModel(model.requires_grad_(True))


def rows_key(inputs: TrialInputs, *, rows: EncodedTrial, dtype: str) -> str:
    """A name for the target and the rows that a trial computes on: of its reference cache, and in its checkpoints."""
    return reference_key(target_hash=inputs.target_hash, forget=rows.forget, retain=rows.retain, dtype=dtype)


def obtain_reference(model: ScoringModel, *, inputs: TrialInputs, rows: EncodedTrial, dtype: str, device: str) -> Reference:
    """The cached reference, computed first if this run has none for these rows: the same model with adapters off."""
    folder = Path(inputs.reference_root) / rows_key(inputs, rows=rows, dtype=dtype)
    if load_reference(folder, device=device) is None:
        computed = compute_reference(
            model,
            forget=rows.forget,
            retain=rows.retain,
            pad_token_id=rows.pad_token_id,
            batch_tokens=REFERENCE_BATCH_TOKENS,
            device=device,
        )
        # Another trial may have written it in the meantime; replacing it would pull it away from under a reader.
        if load_reference(folder, device=device) is None:
            save_reference(folder, computed)
    cached = load_reference(folder, device=device)
    assert cached is not None
    return cached


def prepare_reference(inputs: TrialInputs, *, train: TrainConfig) -> None:
    """Fill the reference cache before a sweep's trials start, so that none of them computes it."""
    rows = encode_trial(inputs, train=train)
    model = ScoringModel(load_model(inputs.target, dtype=train.engine.dtype))
    obtain_reference(model, inputs=inputs, rows=rows, dtype=train.engine.dtype, device=Rank().device)


def build_engine(model: ScoringModel, *, train: TrainConfig, device: str) -> Engine:
    """The engine that a configuration asks for."""
    if train.engine.name == "torch":
        return LocalEngine(model, weight_decay=train.weight_decay, max_grad_norm=train.max_grad_norm, device=device)
    from trainers.engine.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(model, train=train, device=device)


def local_counts(micro_batches: Sequence[MicroBatch], *, rows: EncodedTrial) -> list[float]:
    """This rank's forget tokens, forget sequences, retain tokens and retain sequences of one step, from the labels alone."""
    forget = [rows.forget[index].num_scored for micro in micro_batches for index in micro.forget]
    retain = [rows.retain[index].num_scored for micro in micro_batches for index in micro.retain]
    return [float(sum(forget)), float(len(forget)), float(sum(retain)), float(len(retain))]


def score_micro_batch(
    micro: MicroBatch, *, batch: Batch, logits_NV: Tensor, reference: Reference, train: TrainConfig
) -> tuple[Scored, Scored]:
    """Split one forward pass into the forget and the retain side, each with its reference quantities."""
    label_N, row_N = batch.label_N.to(logits_NV.device), batch.row_N.to(logits_NV.device)
    log_probs_N = token_log_probs(logits_NV, label_N=label_N)
    num_forget = len(micro.forget)
    is_forget = row_N < num_forget
    needs_kl = resolve_weights(train.objective).retain_kl > 0
    forget = Scored(
        token_log_probs_N=log_probs_N[is_forget],
        row_N=row_N[is_forget],
        num_rows=num_forget,
        reference_token_log_probs_N=reference.forget.log_probs_of(micro.forget),
    )
    retain = Scored(
        token_log_probs_N=log_probs_N[~is_forget],
        row_N=row_N[~is_forget] - num_forget,
        num_rows=len(micro.retain),
        logits_NV=logits_NV[~is_forget] if needs_kl else None,
        reference_logits_NV=reference.retain_logits(micro.retain) if needs_kl else None,
    )
    return forget, retain


def train_step(
    plan: StepPlan, *, engine: Engine, rows: EncodedTrial, reference: Reference, train: TrainConfig, num_steps: int
) -> dict[str, Any]:
    """One optimizer step; collective. The metrics are those of the whole step, the same on every rank.

    Raises:
        DivergedError: on every rank, before the update, if the step's loss is not finite.
    """
    micro_batches = split_step(plan, rank=engine.rank, world_size=engine.world_size, micro_batch_size=train.per_device_train_batch_size)
    counts = StepCounts(*(round(value) for value in engine.sum(local_counts(micro_batches, rows=rows))))
    set_step_seed(seed=train.seed, step=plan.step, rank=engine.rank)
    terms_sum: dict[str, float] = {}
    loss_sum = torch.zeros((), dtype=torch.float64)
    for position, micro in enumerate(micro_batches):
        encoded = [rows.forget[index] for index in micro.forget] + [rows.retain[index] for index in micro.retain]
        batch = collate(encoded, pad_token_id=rows.pad_token_id)
        hidden_ND, logits_NV = engine.forward(batch)
        forget, retain = score_micro_batch(micro, batch=batch, logits_NV=logits_NV, reference=reference, train=train)
        terms = objective_terms(train.objective, forget=forget, retain=retain)
        loss = connect_to_graph(step_loss(terms, counts=counts), hidden_ND=hidden_ND, logits_NV=logits_NV)
        engine.backward(loss, last=position == len(micro_batches) - 1)
        loss_sum += loss.detach().double().cpu()
        for term in terms:
            terms_sum[term.name] = terms_sum.get(term.name, 0.0) + float(term.total.detach()) / counts.of(term)
    totals = engine.sum([float(loss_sum), *terms_sum.values()])
    if not math.isfinite(totals[0]):
        raise DivergedError(
            f"the loss is {totals[0]} at step {plan.step}",
            why="the update would have destroyed the model; none was made",
            fix="lower train.learning_rate or add a retain term",
        )
    rate = learning_rate(train, step=plan.step, num_steps=num_steps)
    norm = engine.step(learning_rate=rate)
    if not math.isfinite(norm):
        # The sharded engine knows the norm only after its update. Nothing of it is kept: the trial ends here.
        raise DivergedError(
            f"the gradient norm is {norm} at step {plan.step}",
            why="the update has destroyed the model; no checkpoint holds it",
            fix="lower train.learning_rate or add a retain term",
        )
    return {
        "step": plan.step,
        "epoch": round(plan.epoch, 4),
        "loss": totals[0],
        "terms": dict(zip(terms_sum, totals[1:], strict=True)),
        "learning_rate": rate,
        "grad_norm": norm,
    }


def evenly_spaced(count: int, *, num_steps: int) -> frozenset[int]:
    """``count`` steps out of ``num_steps``, the last one among them."""
    return frozenset(max(1, round(num_steps * part / count)) for part in range(1, count + 1)) if count else frozenset()


def uses_retain(train: TrainConfig) -> bool:
    """Whether any retain term has a weight; otherwise retain rows are not even encoded into batches."""
    weights = resolve_weights(train.objective)
    return weights.retain_ce > 0 or weights.retain_kl > 0


def train_worker(*, train: TrainConfig, inputs: TrialInputs, trial: Path, rank: Rank | None = None) -> Iterator[dict[str, Any]]:
    """Run or resume one trial on one rank, yielding the metrics of each step.

    Writes ``metrics.jsonl`` and checkpoints under ``trial`` (rank 0 only) and continues from the newest finished
    checkpoint found there. Collective: every rank of the trial iterates it to the end.

    Raises:
        InputError: if rows, model or checkpoint are unusable.
        DivergedError: if the loss stops being finite.
    """
    rank = rank or Rank()
    needs_group = train.engine.name == "deepspeed"
    if needs_group:
        start_process_group(rank)
    engine: Engine | None = None
    try:
        rows = encode_trial(inputs, train=train)
        model = build_model(inputs, train=train)
        if rank.rank == 0:
            obtain_reference(model, inputs=inputs, rows=rows, dtype=train.engine.dtype, device=rank.device)
        if rank.world_size > 1:
            torch.distributed.barrier()
        reference = obtain_reference(model, inputs=inputs, rows=rows, dtype=train.engine.dtype, device=rank.device)
        engine = build_engine(model, train=train, device=rank.device)
        plans = plan_steps(
            num_forget=len(rows.forget),
            num_retain=len(rows.retain) if uses_retain(train) else 0,
            batch_size=train.train_batch_size,
            num_epochs=train.num_train_epochs,
            seed=train.seed,
        )
        yield from _run_steps(plans, engine=engine, rows=rows, reference=reference, train=train, inputs=inputs, trial=Path(trial))
    finally:
        if engine is not None:
            engine.close()
        if needs_group:
            stop_process_group(rank)


def _run_steps(
    plans: list[StepPlan], *, engine: Engine, rows: EncodedTrial, reference: Reference, train: TrainConfig, inputs: TrialInputs, trial: Path
) -> Iterator[dict[str, Any]]:
    num_steps = len(plans)
    done = _resume(engine, train=train, inputs=inputs, rows=rows, trial=trial)
    signal_steps = evenly_spaced(train.signals, num_steps=num_steps)
    checkpoint_steps = evenly_spaced(train.checkpoints, num_steps=num_steps)
    facts = {
        "target_hash": inputs.target_hash,
        "target": str(inputs.target),
        "rows_key": rows_key(inputs, rows=rows, dtype=train.engine.dtype),
        "num_steps": num_steps,
    }
    for plan in plans[done:]:
        started = time.perf_counter()
        metrics = train_step(plan, engine=engine, rows=rows, reference=reference, train=train, num_steps=num_steps)
        if plan.step in signal_steps:
            metrics["signals"] = measure_signals(engine, rows=rows.signals, pad_token_id=rows.pad_token_id)
        metrics["seconds"] = round(time.perf_counter() - started, 4)
        if engine.rank == 0:
            append_jsonl(trial / "metrics.jsonl", metrics)
        if plan.step in checkpoint_steps:
            state = engine.state()
            if engine.rank == 0:
                save_checkpoint(trial, state=state, train=train, facts=facts, model_files=inputs.target)
        yield {**metrics, "num_steps": num_steps}


def _resume(engine: Engine, *, train: TrainConfig, inputs: TrialInputs, rows: EncodedTrial, trial: Path) -> int:
    """Steps already done: load the newest checkpoint and drop the metrics of steps that will be repeated."""
    found = finished_checkpoints(trial)
    if not found:
        if engine.rank == 0:
            (trial / "metrics.jsonl").unlink(missing_ok=True)
        return 0
    state = load_checkpoint(
        found[-1],
        train=train,
        target_hash=inputs.target_hash,
        rows_key=rows_key(inputs, rows=rows, dtype=train.engine.dtype),
    )
    engine.load_state(state)
    if engine.rank == 0:
        import json

        kept = [line for line in read_jsonl(trial / "metrics.jsonl") if line["step"] <= state.optimizer_step]
        write_text(trial / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))
    log.info("resumed from %s at step %d", found[-1], state.optimizer_step)
    return state.optimizer_step

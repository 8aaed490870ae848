"""Whether a trial fits into a device's memory, and whether it recomputes activations to do so."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from trainers.config import ScheduleName, TrainConfig
from trainers.data.packing import MAX_GROUPS, shape_groups
from trainers.errors import InputError
from trainers.memory import GIB, BatchSize, MemoryEstimate, describe_memory, estimate_memory, fits, needs_checkpointing
from trainers.model_shape import shape_of, trained_of
from trainers.objectives.table import Need, needs, resolve_weights
from trainers.trial_rows import EncodedTrial, uses_retain

if TYPE_CHECKING:
    from trainers.data.encode import EncodedRow
    from trainers.distributed import Rank
    from trainers.scoring import ScoringModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MemoryPlan:
    """What a trial is expected to take, and whether it computes its activations twice to get there.

    Args:
        estimate: what it takes as it runs.
        plain: what it would take without recomputation.
        recomputes: whether activations are recomputed.
        configured: whether the configuration says so.
        capacity_bytes: size of the device; None if it is not known.
    """

    estimate: MemoryEstimate
    plain: MemoryEstimate
    recomputes: bool
    configured: bool
    capacity_bytes: int | None

    def __str__(self) -> str:
        notes = ["activations recomputed" if self.recomputes else "no recomputation"]
        if self.configured:
            notes.append("as configured")
        elif self.recomputes:
            notes.append(f"{self.plain.total / GIB:.1f} GiB without")
        if self.capacity_bytes is not None:
            enough = fits(self.estimate, capacity_bytes=self.capacity_bytes)
            notes.append(f"of {self.capacity_bytes / GIB:.1f} GiB" + ("" if enough else ": it may not fit"))
        return f"{describe_memory(self.estimate)} ({', '.join(notes)})"


def plan_memory(config: Any, *, rows: EncodedTrial, train: TrainConfig, device: str, capacity_bytes: int | None = None) -> MemoryPlan:
    """A trial's memory on one rank at its largest micro-batch, and whether it recomputes activations.

    Where the configuration leaves it open, they are recomputed if they do not fit into a GPU otherwise, and never on a CPU.

    Args:
        config: the model's configuration (transformers').
        rows: the trial's rows.
        train: the trial.
        device: cpu or cuda.
        capacity_bytes: size of the device; None if it is not known, which counts as large enough.

    Raises:
        InputError: if the architecture is not understood, or ``train.trainable`` names what it does not have.
    """
    retain = rows.retain if uses_retain(train) else ()
    batch = largest_micro_batch(forget=rows.forget, retain=retain, alternative=rows.alternative, train=train, max_groups=MAX_GROUPS[device])
    shape, trained = shape_of(config), trained_of(config, train=train)
    plain, recomputed = (
        estimate_memory(shape, train=train, trained=trained, batch=batch, device=device, checkpointing=checkpointing)
        for checkpointing in (False, True)
    )
    recomputes = train.activation_checkpointing
    if recomputes is None:
        limit = capacity_bytes if device == "cuda" and capacity_bytes is not None else math.inf
        recomputes = needs_checkpointing(plain=plain, recomputed=recomputed, capacity_bytes=limit)
    return MemoryPlan(
        estimate=recomputed if recomputes else plain,
        plain=plain,
        recomputes=recomputes,
        configured=train.activation_checkpointing is not None,
        capacity_bytes=capacity_bytes,
    )


def memory_setting(train: TrainConfig) -> str:
    """The settings that decide what a trial takes, as text: trials with the same take the same."""
    objective, schedule = train.objective, train.schedule
    batches = (schedule.name, schedule.retain_per_forget, train.train_batch_size, train.per_device_train_batch_size)
    texts = (text_setting(train), uses_retain(train))
    return str((batches, texts, sorted(needs(objective)), train.lora, train.trainable, train.engine, train.activation_checkpointing))


def text_setting(train: TrainConfig) -> str:
    """The settings that decide a trial's token ids, and which of them are evaluated, as text; a few of them count for nothing where the
    objective reads no other answers or no distributions."""
    objective = train.objective
    refusals = (objective.name, train.seed) if Need.ALTERNATIVE_ANSWERS in needs(objective) else None
    compares = resolve_weights(objective).retain_kl > 0 and objective.kl_scope
    return str((train.forget_scope, train.max_length, compares, refusals))


def largest_micro_batch(
    *,
    forget: Sequence[EncodedRow],
    retain: Sequence[EncodedRow],
    alternative: Sequence[EncodedRow] = (),
    train: TrainConfig,
    max_groups: int = MAX_GROUPS["cuda"],
) -> BatchSize:
    """The largest micro-batch that a trial may meet on one rank: its longest rows together.

    Args:
        forget: rows of the forget set.
        retain: rows of the retain set; empty without a retain term.
        alternative: the forget rows with other answers, if the objective reads them.
        train: the trial.
        max_groups: most groups of the attention.
    """
    if train.schedule.name is ScheduleName.ALTERNATING and forget and retain:
        # The sets never meet: annealing steps have retain rows alone.
        apart = (
            largest_micro_batch(forget=forget, retain=(), alternative=alternative, train=train, max_groups=max_groups),
            largest_micro_batch(forget=(), retain=retain, train=train, max_groups=max_groups),
        )
        return max(apart, key=lambda size: size.tokens)
    wanted, per_rank = needs(train.objective), math.ceil(train.train_batch_size / train.engine.num_ranks)
    pairs = min(train.micro_batch_size, per_rank)
    company = 1 if train.schedule.name is ScheduleName.ALTERNATING else train.schedule.retain_per_forget
    sides = (
        (forget, pairs, Need.FORGET_DISTRIBUTIONS in wanted),
        (alternative, pairs, False),
        (retain, pairs * company, Need.RETAIN_DISTRIBUTIONS in wanted),
    )
    lengths: list[int] = []
    evaluated: list[int] = []
    compared = 0
    for rows, number, compares in sides:
        lengths += sorted((len(row.input_ids) for row in rows), reverse=True)[:number]
        evaluated.append(sum(sorted((len(row.evaluated) for row in rows), reverse=True)[:number]))
        compared += evaluated[-1] * compares
    lengths = sorted(lengths or [1])
    sizes = shape_groups(lengths, max_groups=max_groups)
    ends = accumulate(sizes)
    return BatchSize(
        tokens=sum(lengths),
        positions=sum(size * lengths[end - 1] for size, end in zip(sizes, ends, strict=True)),
        evaluated=sum(evaluated),
        segment=max(evaluated),
        compared=compared,
        groups=len(sizes),
    )


def recomputes_activations(model: ScoringModel, *, rows: EncodedTrial, train: TrainConfig, rank: Rank) -> bool:
    """Whether a trial that is about to start recomputes activations; logs why. Collective on GPUs: all ranks decide alike."""
    import torch

    if train.activation_checkpointing is not None or not rank.device.startswith("cuda"):
        return bool(train.activation_checkpointing)
    capacity = torch.tensor(torch.cuda.mem_get_info(rank.device)[1], device=rank.device)
    if rank.world_size > 1:
        torch.distributed.all_reduce(capacity, op=torch.distributed.ReduceOp.MIN)
    try:
        plan = plan_memory(model.causal_lm.config, rows=rows, train=train, device="cuda", capacity_bytes=int(capacity))
    except InputError as error:
        log.warning("memory was not planned, activations are not recomputed: %s", error.what)
        return False
    if rank.rank == 0:
        log.info("memory: %s", plan)
    return plan.recomputes

"""Sharding by need: over how many ranks a trial is spread, and how, so that it fits into its GPUs; a pure function of model and nodes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from launcher.nodes import Node
from trainers.config import TrainConfig
from trainers.data.packing import MAX_GROUPS
from trainers.errors import InputError
from trainers.memory import GIB, KEPT_FREE, MemoryEstimate, estimate_memory, fits
from trainers.memory_plan import largest_micro_batch
from trainers.model_shape import ModelShape, Trained, shape_of, trained_of
from trainers.trial_rows import EncodedTrial, uses_retain

MAX_RANKS = 1024
"""Where the search for a number of ranks that would do ends."""


@dataclass(frozen=True)
class ShardingPlan:
    """How one trial is computed, and what that takes of each of its GPUs.

    Args:
        ranks: processes, each on a GPU of its own (or on the CPU).
        zero_stage: what they share out; None in plain torch.
        micro_batch: pairs per pass on one rank.
        recomputes: whether activations are recomputed.
        estimate: bytes of one rank, by part.
        capacity_bytes: memory of the smallest GPU that it may meet; None if that is not known, or on a CPU.
        why: one sentence.
    """

    ranks: int
    zero_stage: int | None
    micro_batch: int
    recomputes: bool
    estimate: MemoryEstimate
    capacity_bytes: int | None
    why: str

    @property
    def fits(self) -> bool:
        """Whether it fits; only a configuration that leaves nothing open may plan what does not."""
        return self.capacity_bytes is None or fits(self.estimate, capacity_bytes=self.capacity_bytes)

    def apply(self, train: TrainConfig) -> TrainConfig:
        """The trial with numbers in place of what was left open.

        Recomputation that is not needed stays open: the trial looks again when it knows its GPU.
        """
        engine = {"ranks": self.ranks} | ({} if self.zero_stage is None else {"zero_stage": self.zero_stage})
        recomputes = train.activation_checkpointing if train.activation_checkpointing is not None or not self.recomputes else True
        return train.model_copy(
            update={
                "engine": train.engine.model_copy(update=engine),
                "per_device_train_batch_size": self.micro_batch,
                "activation_checkpointing": recomputes,
            }
        )


@dataclass(frozen=True)
class _Candidate:
    ranks: int
    stage: int
    recomputes: bool
    micro_batch: int
    estimate: MemoryEstimate


def is_open(train: TrainConfig) -> bool:
    """Whether a trial leaves ranks, ZeRO stage or micro-batch to the planner."""
    return None in (train.engine.ranks, train.engine.zero_stage, train.per_device_train_batch_size)


def resolve_without_model(train: TrainConfig, *, ranks: int | None = None) -> TrainConfig:
    """A trial with numbers where nothing is known of its model, or where it computes on a CPU: one rank, stage 2, at most four pairs."""
    engine = train.engine.model_copy(update={"ranks": ranks or train.engine.num_ranks, "zero_stage": train.engine.stage})
    return train.model_copy(update={"engine": engine, "per_device_train_batch_size": train.micro_batch_size})


def plan_sharding(
    config: Any, *, rows: EncodedTrial, train: TrainConfig, nodes: Sequence[Node], gpus_per_rank: float = 1.0, ranks: int | None = None
) -> ShardingPlan:
    """The cheapest way to compute a trial that fits: fewest ranks, then the lowest stage, then no recomputation, then the largest
    micro-batch.

    Ranks are tried as 1, 2, 4, ... within a node, then as whole nodes, and never more than a step has pairs; ranks that take a part of a
    GPU are alone. On one rank nothing is
    shared out (stage 1); on several, adapters try stages 1 and 3, because of the frozen weights there is nothing else to share, and a
    whole model stages 2 and 3. Stages come before recomputation because stage 3 gathers all weights twice in every micro-batch, which
    for a few hundred tokens takes longer than a third more arithmetic. What the configuration sets is not touched, the global batch
    never.

    Args:
        config: the model's configuration (transformers').
        rows: the trial's rows.
        train: the trial; None in ``engine.ranks``, ``engine.zero_stage`` and ``per_device_train_batch_size`` is chosen here.
        nodes: where it may run; the smallest of their GPUs counts.
        gpus_per_rank: share of a GPU that a rank reserves; 0 computes on the CPU.
        ranks: that all trials of the sweep have, if that is settled.

    Raises:
        InputError: if nothing fits, with the least that would, or if the model's shape is not understood.
    """
    sizes = [node.gpu_bytes for node in nodes if node.gpus > 0 and node.gpu_bytes is not None]
    on_gpu = gpus_per_rank > 0 and any(node.gpus > 0 for node in nodes)
    capacity = int(min(sizes) * min(1.0, gpus_per_rank)) if on_gpu and sizes else None
    search = _Search(config, rows=rows, train=train, device="cuda" if on_gpu else "cpu")
    if not on_gpu:
        return search.on_cpu(ranks)
    fixed = ranks or train.engine.ranks or (1 if gpus_per_rank < 1 else None)
    tried = [fixed] if fixed else _rank_numbers(nodes, most=search.most_ranks)
    limit = math.inf if capacity is None else capacity
    smallest: _Candidate | None = None
    for number in tried:
        for candidate in search.candidates(number):
            if fits(candidate.estimate, capacity_bytes=limit):
                return _plan(candidate, search=search, capacity=capacity, tried=tried)
            if smallest is None or candidate.estimate.total < smallest.estimate.total:
                smallest = candidate
    assert smallest is not None
    assert capacity is not None
    if is_open(train):
        raise _nothing_fits(smallest, search=search, capacity=capacity, tried=tried)
    return _plan(smallest, search=search, capacity=capacity, tried=tried)


class _Search:
    """The ways to compute one trial on a number of ranks, cheapest first, with what each takes."""

    def __init__(self, config: Any, *, rows: EncodedTrial, train: TrainConfig, device: str) -> None:
        self.train, self.device = train, device
        self._rows = rows
        self._shape: ModelShape = shape_of(config)
        self._trained: Trained = trained_of(config, train=train)
        self._batches: dict[int, Any] = {}

    @property
    def most_ranks(self) -> int:
        """Ranks among which a step has a pair for each; plain torch computes on one."""
        return 1 if self.train.engine.name == "torch" else self.train.train_batch_size

    @property
    def whole_model(self) -> bool:
        """Whether the model's own parameters train."""
        return self.train.lora is None

    def on_cpu(self, ranks: int | None) -> ShardingPlan:
        """As configured, what is open by its default: a CPU's memory is not planned."""
        train = resolve_without_model(self.train, ranks=ranks)
        assert train.per_device_train_batch_size is not None
        recomputes = bool(train.activation_checkpointing)
        candidate = self.candidate(train.engine.num_ranks, train.engine.stage, recomputes, train.per_device_train_batch_size)
        return _plan(candidate, search=self, capacity=None, tried=[candidate.ranks])

    def candidates(self, ranks: int) -> Iterator[_Candidate]:
        """What is open in every order of preference, what is set as it is."""
        set_stage, set_micro, set_recomputation = (
            self.train.engine.zero_stage,
            self.train.per_device_train_batch_size,
            self.train.activation_checkpointing,
        )
        share = math.ceil(self.train.train_batch_size / ranks)
        micros = [set_micro] if set_micro is not None else list(_halved(share))
        for stage in self._stages(ranks) if set_stage is None else (set_stage,):
            for recomputes in (False, True) if set_recomputation is None else (set_recomputation,):
                for micro in micros:
                    yield self.candidate(ranks, stage, recomputes, micro)

    def _stages(self, ranks: int) -> tuple[int, ...]:
        if ranks == 1 or self.train.engine.name == "torch":
            return (1,)
        return (2, 3) if self.whole_model else (1, 3)

    def candidate(self, ranks: int, stage: int, recomputes: bool, micro: int) -> _Candidate:
        """One way, and what it takes."""
        engine = self.train.engine.model_copy(update={"ranks": ranks, "zero_stage": stage})
        train = self.train.model_copy(update={"engine": engine, "per_device_train_batch_size": micro})
        pairs = min(micro, math.ceil(train.train_batch_size / ranks))
        if pairs not in self._batches:
            retain = self._rows.retain if uses_retain(train) else ()
            self._batches[pairs] = largest_micro_batch(
                forget=self._rows.forget,
                retain=retain,
                alternative=self._rows.alternative,
                train=train,
                max_groups=MAX_GROUPS[self.device],
            )
        estimate = estimate_memory(
            self._shape, train=train, trained=self._trained, batch=self._batches[pairs], device=self.device, checkpointing=recomputes
        )
        return _Candidate(ranks, stage, recomputes, micro, estimate)


def _halved(number: int) -> Iterator[int]:
    """The number, half of it, and so on to 1."""
    while number > 1:
        yield number
        number = math.ceil(number / 2)
    yield 1


def _rank_numbers(nodes: Sequence[Node], *, most: int) -> list[int]:
    """1, 2, 4, ... GPUs of the largest node, all of them, then of two nodes, and so on."""
    per_node = sorted((int(node.gpus) for node in nodes if node.gpus >= 1), reverse=True) or [1]
    within = [2**power for power in range(per_node[0].bit_length())]
    numbers = sorted({*within, *accumulate(per_node)})
    return [number for number in numbers if number <= most] or [1]


def _plan(candidate: _Candidate, *, search: _Search, capacity: int | None, tried: Sequence[int]) -> ShardingPlan:
    engine = search.train.engine
    return ShardingPlan(
        ranks=candidate.ranks,
        zero_stage=candidate.stage if engine.name == "deepspeed" else engine.zero_stage,
        micro_batch=candidate.micro_batch,
        recomputes=candidate.recomputes,
        estimate=candidate.estimate,
        capacity_bytes=capacity,
        why=_why(candidate, search=search, capacity=capacity, tried=tried),
    )


def _why(candidate: _Candidate, *, search: _Search, capacity: int | None, tried: Sequence[int]) -> str:
    train = search.train
    if search.device == "cpu":
        return "on the CPU: as configured, and what is left open by its default"
    if capacity is None:
        return "the GPUs' memory is not known: taken as large enough"
    need, have = candidate.estimate.total / GIB, capacity / GIB
    if not fits(candidate.estimate, capacity_bytes=capacity):
        return f"as configured: it may not fit, {need:.1f} of {have:.1f} GiB are expected, of which {KEPT_FREE:.0%} should stay free"
    what = "the whole model trains" if search.whole_model else "adapters train"
    if train.engine.ranks is not None:
        chosen = "ranks as configured"
    elif candidate.ranks == 1:
        chosen = "it fits on one GPU, so nothing is shared out or communicated"
    else:
        before = [number for number in tried if number < candidate.ranks]
        chosen = f"it does not fit on {before[-1]} GPU{'s' if before[-1] > 1 else ''}" if before else "the sweep's number of ranks"
    reasons = [what, chosen]
    if candidate.recomputes and train.activation_checkpointing is None:
        plain = search.candidate(candidate.ranks, candidate.stage, False, candidate.micro_batch)
        reasons.append(f"without recomputation it would be {plain.estimate.total / GIB:.1f} GiB")
    return f"{'; '.join(reasons)}; {need:.1f} of {have:.1f} GiB"


def _nothing_fits(smallest: _Candidate, *, search: _Search, capacity: int, tried: Sequence[int]) -> InputError:
    train = search.train
    ways = []
    if train.engine.ranks is None:
        number = next((ranks for ranks in _more_than(tried[-1], most=search.most_ranks) if _fits_on(ranks, search, capacity)), None)
        if number is not None:
            ways.append(f"{number} GPUs of {capacity / GIB:.0f} GiB")
    size = math.ceil(smallest.estimate.total / (1 - KEPT_FREE) / GIB)
    ways.append(f"{smallest.ranks} GPU{'s' if smallest.ranks > 1 else ''} of {size} GiB")
    fixes = ["use more or larger GPUs"]
    if train.engine.name == "torch":
        fixes.append("set train.engine.name: deepspeed, which shares a trial out over GPUs")
    elif search.most_ranks <= tried[-1]:
        fixes.append(f"raise train.train_batch_size above {train.train_batch_size}: every rank needs a pair")
    if train.engine.dtype == "float32":
        fixes.append("set train.engine.dtype: bfloat16")
    if search.whole_model:
        fixes.append("train adapters (train.lora)")
    if train.per_device_train_batch_size is not None and train.per_device_train_batch_size > 1:
        fixes.append("set train.per_device_train_batch_size: null")
    return InputError(
        f"a trial does not fit into the GPUs that there are: it needs {' or '.join(ways)}",
        where="train.engine",
        why=f"the least it can take on {smallest.ranks} rank{'s' if smallest.ranks > 1 else ''} is "
        f"{smallest.estimate.total / GIB:.1f} GiB of a GPU with {capacity / GIB:.1f}, of which {KEPT_FREE:.0%} stay free",
        fix=", or ".join(fixes[:3]),
    )


def _more_than(ranks: int, *, most: int) -> Iterator[int]:
    number = 2 ** ranks.bit_length()
    while number <= min(most, MAX_RANKS):
        yield number
        number *= 2


def _fits_on(ranks: int, search: _Search, capacity: int) -> bool:
    return any(fits(candidate.estimate, capacity_bytes=capacity) for candidate in search.candidates(ranks))

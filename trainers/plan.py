"""Which rows meet in which optimizer step, on which rank, in which micro-batch: a trial's schedule, written out before it starts.

The order is a function of the seed and of a step's place (cycle, pass, position) alone: a run that resumes, or that is spread over
other ranks, sees the same rows in the same steps.

A cycle is a stretch of steps with an optimizer and a learning-rate schedule of its own. A pass goes once over the rows of a cycle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, cycle, islice

import numpy as np

from trainers.config import ScheduleName, TrainConfig
from trainers.errors import InputError

# What is shuffled; the first two also order whole sets, the last two the rows of one cycle.
_FORGET, _RETAIN, _FORGET_CYCLE, _RETAIN_CYCLE = range(4)

Rows = tuple[int, ...]


@dataclass(frozen=True)
class StepPlan:
    """The rows of one optimizer step, as indices into the forget and the retain rows.

    Args:
        step: position in the trial, from 1.
        epoch: passes over the forget set when the step is done; see ``plan_trial``.
        forget: forget rows; empty in annealing steps.
        retain: retain rows; empty in forgetting steps, and everywhere without a retain term.
        cycle_step: position in the learning-rate cycle, from 1.
        cycle_steps: length of that cycle.
        retain_per_forget: retain rows that a micro-batch may hold for each of its forget rows.
    """

    step: int
    epoch: float
    forget: Rows
    retain: Rows
    cycle_step: int
    cycle_steps: int
    retain_per_forget: int = 1

    @property
    def fresh_optimizer(self) -> bool:
        """Whether the optimizer forgets its moments before this step. A trial's first step has none to forget."""
        return self.cycle_step == 1 and self.step > 1


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one forward pass on one rank; both may be empty, because all ranks make equally many passes."""

    forget: Rows
    retain: Rows


@dataclass(frozen=True)
class _Cycle:
    """The rows of a cycle's steps. A pass takes so many of them and covers that share of the forget set."""

    forget: Sequence[Rows]
    retain: Sequence[Rows]
    steps_per_pass: int
    share: float


def plan_trial(*, train: TrainConfig, num_forget: int, num_retain: int) -> list[StepPlan]:
    """The rows of every optimizer step of a trial, in order.

    - paired: ``num_train_epochs`` passes over the forget set in one cycle. Each forget row is accompanied by
      ``retain_per_forget`` retain rows from a stream that goes on through the passes, so every retain row is used equally often.
    - chunked: the forget set is cut into chunks, the last perhaps short. Each is a cycle of ``num_train_epochs`` passes. A chunk
      takes its share of retain rows (``retain_per_forget`` for each of its rows) where the chunk before it stopped, starting over
      at the end of the retain set, and uses that same share in all its passes.
    - alternating: each chunk is a cycle of forget-only steps, followed by a cycle of retain-only steps (annealing):
      ``annealing_epochs`` passes over the next ``annealing_fraction`` of the retain set, counted round like the shares above. With
      ``final_annealing`` the last cycle goes over the whole retain set.

    A step has ``train_batch_size`` forget rows (annealing: retain rows) over all ranks; a pass's last step may be short. A number
    of passes is rounded to whole steps, at least one per cycle. With ``shuffle`` the sets are shuffled once, before they are cut,
    and every pass again; the stream of the paired schedule is shuffled anew each time it starts over. Without, rows keep the
    file's order throughout.

    The epoch counts passes over the forget set in all schedules: a pass over a chunk with a tenth of the forget rows adds a tenth,
    in equal parts per step, and annealing adds nothing.

    Args:
        train: schedule, passes, batch size and seed.
        num_forget: forget rows, > 0.
        num_retain: retain rows; 0 if no retain term is used, which leaves the retain side empty.

    Raises:
        InputError: if there is no forget row, or if the schedule anneals and there is no retain row.

    Source: chunked and alternating are SUGD and AGAD, https://arxiv.org/abs/2503.02443. Differences from
    https://github.com/iraklis07/llm-unlearning: SUGD's rows can be shuffled (there they never are); AGAD's annealing rows are taken
    in turn instead of drawn at random, so that all are used equally often; a short last chunk is annealed like the others.
    """
    if num_forget < 1:
        raise InputError("the forget set is empty", why="an epoch is one pass over it", fix="give at least one forget row")
    schedule = train.schedule
    if schedule.name is ScheduleName.ALTERNATING and num_retain < 1:
        raise InputError(
            "the alternating schedule has no retain rows to anneal on",
            where="train.schedule.name",
            why="its annealing steps train on the retain set alone; it is empty, or no retain term of the objective has a weight",
            fix="give retain rows and an objective with a retain term (grad_diff), or use train.schedule.name: chunked",
        )
    cycles = {ScheduleName.PAIRED: _paired, ScheduleName.CHUNKED: _chunked, ScheduleName.ALTERNATING: _alternating}[schedule.name]
    ratio = 1 if schedule.name is ScheduleName.ALTERNATING else schedule.retain_per_forget
    plans: list[StepPlan] = []
    epoch = 0.0
    for part in cycles(train, num_forget=num_forget, num_retain=num_retain):
        for position, (forget, retain) in enumerate(zip(part.forget, part.retain, strict=True), start=1):
            plans.append(
                StepPlan(
                    step=len(plans) + 1,
                    epoch=epoch + position / part.steps_per_pass * part.share,
                    forget=forget,
                    retain=retain,
                    cycle_step=position,
                    cycle_steps=len(part.forget),
                    retain_per_forget=ratio,
                )
            )
        epoch = plans[-1].epoch
    return plans


def split_step(plan: StepPlan, *, rank: int, world_size: int, micro_batch_size: int) -> list[MicroBatch]:
    """One rank's micro-batches of a step. Ranks get disjoint rows and equally many micro-batches, some of them empty.

    A micro-batch holds up to ``micro_batch_size`` forget rows and ``retain_per_forget`` times as many retain rows; in a step
    without forget rows, up to ``micro_batch_size`` retain rows. The two sides are dealt out apart, each in turn over the ranks:
    a forget row's company may be on another rank, which the step's sums do not see.
    """
    forget, retain = plan.forget[rank::world_size], plan.retain[rank::world_size]
    forget_size = micro_batch_size
    retain_size = micro_batch_size * (plan.retain_per_forget if plan.forget else 1)
    # The largest shares (rank 0's), not this rank's: all ranks must make equally many passes.
    forget_share, retain_share = (math.ceil(len(side) / world_size) for side in (plan.forget, plan.retain))
    num_micro_batches = max(1, math.ceil(forget_share / forget_size), math.ceil(retain_share / retain_size))
    return [
        MicroBatch(
            forget=forget[index * forget_size : (index + 1) * forget_size], retain=retain[index * retain_size : (index + 1) * retain_size]
        )
        for index in range(num_micro_batches)
    ]


# --- the schedules ---


def _paired(train: TrainConfig, *, num_forget: int, num_retain: int) -> Iterator[_Cycle]:
    forget = _steps(
        lambda epoch: _order(range(num_forget), _FORGET, epoch, train=train),
        num_rows=num_forget,
        batch_size=train.train_batch_size,
        num_passes=train.num_train_epochs,
    )
    stream = (index for lap in count() for index in _order(range(num_retain), _RETAIN, lap, train=train)) if num_retain else iter(())
    retain = [tuple(islice(stream, train.schedule.retain_per_forget * len(step))) for step in forget]
    yield _Cycle(forget, retain, math.ceil(num_forget / train.train_batch_size), 1.0)


def _chunked(train: TrainConfig, *, num_forget: int, num_retain: int) -> Iterator[_Cycle]:
    ratio = train.schedule.retain_per_forget
    retain_rows = cycle(_order(range(num_retain), _RETAIN, train=train))
    for number, chunk in enumerate(_chunks(train, num_forget=num_forget)):
        forgetting = _forgetting(chunk, number=number, train=train, num_forget=num_forget)
        if num_retain:
            share = list(islice(retain_rows, ratio * len(chunk)))
            retain = _cycle_steps(
                share,
                _RETAIN_CYCLE,
                number,
                train=train,
                batch_size=ratio * train.train_batch_size,
                num_passes=train.num_train_epochs,
            )
            forgetting = replace(forgetting, retain=retain)
        yield forgetting


def _alternating(train: TrainConfig, *, num_forget: int, num_retain: int) -> Iterator[_Cycle]:
    schedule = train.schedule
    retain_rows = cycle(_order(range(num_retain), _RETAIN, train=train))
    share_size = max(1, round(schedule.annealing_fraction * num_retain))
    chunks = _chunks(train, num_forget=num_forget)
    for number, chunk in enumerate(chunks):
        yield _forgetting(chunk, number=number, train=train, num_forget=num_forget)
        yield _annealing(list(islice(retain_rows, share_size)), number=number, train=train)
    if schedule.final_annealing:
        yield _annealing(range(num_retain), number=len(chunks), train=train)


def _forgetting(chunk: Sequence[int], *, number: int, train: TrainConfig, num_forget: int) -> _Cycle:
    """A chunk's passes without retain rows."""
    steps = _cycle_steps(chunk, _FORGET_CYCLE, number, train=train, batch_size=train.train_batch_size, num_passes=train.num_train_epochs)
    return _Cycle(steps, [()] * len(steps), math.ceil(len(chunk) / train.train_batch_size), len(chunk) / num_forget)


def _annealing(rows: Sequence[int], *, number: int, train: TrainConfig) -> _Cycle:
    """Passes over retain rows alone."""
    passes = train.schedule.annealing_epochs
    steps = _cycle_steps(rows, _RETAIN_CYCLE, number, train=train, batch_size=train.train_batch_size, num_passes=passes)
    return _Cycle([()] * len(steps), steps, math.ceil(len(rows) / train.train_batch_size), 0.0)


# --- order ---


def _order(rows: Sequence[int], *place: int, train: TrainConfig) -> list[int]:
    """The rows in the order that belongs to a place in the trial: a set or cycle, and a pass over it."""
    if not train.schedule.shuffle:
        return list(rows)
    return [rows[index] for index in np.random.default_rng([train.seed, *place]).permutation(len(rows)).tolist()]


def _chunks(train: TrainConfig, *, num_forget: int) -> list[list[int]]:
    rows, size = _order(range(num_forget), _FORGET, train=train), train.schedule.chunk_size
    return [rows[start : start + size] for start in range(0, num_forget, size)]


def _cycle_steps(rows: Sequence[int], side: int, number: int, *, train: TrainConfig, batch_size: int, num_passes: float) -> list[Rows]:
    """The steps of a cycle over these rows alone; ``number`` tells the cycles of a side apart."""
    return _steps(
        lambda epoch: _order(rows, side, number, epoch, train=train), num_rows=len(rows), batch_size=batch_size, num_passes=num_passes
    )


def _steps(order: Callable[[int], list[int]], *, num_rows: int, batch_size: int, num_passes: float) -> list[Rows]:
    """Passes cut into steps. A pass's last step may be short; a fraction ends within a pass, but never before the first step."""
    steps_per_pass = math.ceil(num_rows / batch_size)
    num_steps = max(1, round(num_passes * steps_per_pass))
    steps: list[Rows] = []
    for epoch in range(math.ceil(num_steps / steps_per_pass)):
        rows = order(epoch)
        steps += [tuple(rows[start : start + batch_size]) for start in range(0, num_rows, batch_size)]
    return steps[:num_steps]

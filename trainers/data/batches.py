"""Which rows meet in which optimizer step, on which rank, in which micro-batch; and how they become tensors.

The order is a function of (seed, epoch, position) alone: a run that resumes, or that is spread over other ranks,
sees the same rows in the same steps.

Shape suffixes: B rows, T positions, N scored tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trainers.data.encode import EncodedRow, PackedRow
from trainers.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

_FORGET, _RETAIN = 0, 1


@dataclass(frozen=True)
class StepPlan:
    """The rows of one optimizer step, as indices into the forget and the retain rows."""

    step: int
    epoch: float
    forget: tuple[int, ...]
    retain: tuple[int, ...]


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one forward pass on one rank; both may be empty, because all ranks make equally many passes."""

    forget: tuple[int, ...]
    retain: tuple[int, ...]


def _stream(num_rows: int, *, seed: int, side: int) -> Iterator[int]:
    epoch = 0
    while True:
        yield from np.random.default_rng([seed, side, epoch]).permutation(num_rows).tolist()
        epoch += 1


def plan_steps(*, num_forget: int, num_retain: int, batch_size: int, num_epochs: float, seed: int) -> list[StepPlan]:
    """The rows of every optimizer step.

    An epoch is one pass over the forget set; its last step may be short. Each forget row is accompanied by one retain row
    from a stream of its own, which goes on through the epochs, so that every retain row is used equally often.

    Args:
        num_forget: forget rows, > 0.
        num_retain: retain rows; 0 leaves the retain side empty.
        batch_size: (forget, retain) pairs per step over all ranks.
        num_epochs: passes over the forget set; a fraction ends within a pass.
        seed: order of both streams.

    Raises:
        InputError: if there is no forget row.
    """
    if num_forget < 1:
        raise InputError("the forget set is empty", why="an epoch is one pass over it", fix="give at least one forget row")
    steps_per_epoch = math.ceil(num_forget / batch_size)
    num_steps = max(1, round(num_epochs * steps_per_epoch))
    forget_stream = _stream(num_forget, seed=seed, side=_FORGET)
    retain_stream = _stream(num_retain, seed=seed, side=_RETAIN) if num_retain else None
    plans = []
    for step in range(1, num_steps + 1):
        position = (step - 1) % steps_per_epoch
        size = min(batch_size, num_forget - position * batch_size)
        forget = tuple(next(forget_stream) for _ in range(size))
        retain = tuple(next(retain_stream) for _ in range(size)) if retain_stream else ()
        plans.append(StepPlan(step=step, epoch=step / steps_per_epoch, forget=forget, retain=retain))
    return plans


def split_step(plan: StepPlan, *, rank: int, world_size: int, micro_batch_size: int) -> list[MicroBatch]:
    """One rank's micro-batches of a step. Ranks get disjoint rows and equally many micro-batches, some of them empty."""
    largest_share = math.ceil(max(len(plan.forget), len(plan.retain)) / world_size)
    forget, retain = plan.forget[rank::world_size], plan.retain[rank::world_size]
    starts = range(0, max(1, largest_share), micro_batch_size)
    return [
        MicroBatch(forget=forget[start : start + micro_batch_size], retain=retain[start : start + micro_batch_size]) for start in starts
    ]


@dataclass(frozen=True)
class Batch:
    """Right-padded rows and their scored positions.

    Args:
        input_ids_BT: token ids, int64; padding is the pad token.
        attention_mask_BT: 1 for real tokens, 0 for padding, int64.
        row_N: row of each scored token, int64; in row order, then position order.
        position_N: position whose hidden state predicts the scored token, int64.
        label_N: the scored token ids, int64.
    """

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    row_N: Tensor
    position_N: Tensor
    label_N: Tensor

    @property
    def num_rows(self) -> int:
        """Rows in the batch."""
        return self.input_ids_BT.shape[0]

    def to(self, device: str) -> Batch:
        """The same batch on a device."""
        return Batch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def collate(rows: Sequence[EncodedRow | PackedRow], *, pad_token_id: int, pad_to: int = 0) -> Batch:
    """Pad rows on the right to the longest of them (or to ``pad_to``) and list their scored tokens.

    Without rows the batch is a single pad token with nothing scored: a rank that has no rows left must still take part in the
    collective forward and backward passes.
    """
    import torch

    length = max([len(row.input_ids) for row in rows] + [1, pad_to])
    num_rows = max(1, len(rows))
    ids = np.full((num_rows, length), pad_token_id, dtype=np.int64)
    mask = np.zeros((num_rows, length), dtype=np.int64)
    mask[0, 0] = 1
    row_parts, position_parts, label_parts = [], [], []
    for index, row in enumerate(rows):
        ids[index, : len(row.input_ids)] = row.input_ids
        mask[index, : len(row.input_ids)] = 1
        scored = np.asarray(row.scored, dtype=np.int64)
        row_parts.append(np.full(len(scored), index))
        position_parts.append(scored - 1)
        label_parts.append(ids[index, scored])

    def join(parts: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)) if parts else torch.zeros(0, dtype=torch.int64)

    return Batch(torch.from_numpy(ids), torch.from_numpy(mask), join(row_parts), join(position_parts), join(label_parts))


def batches_by_length(rows: Sequence[EncodedRow | PackedRow], *, batch_tokens: int) -> list[list[int]]:
    """Row indices grouped by length so that each group, padded, stays within a token budget (at least one row each)."""
    order = sorted(range(len(rows)), key=lambda index: (len(rows[index].input_ids), index))
    groups: list[list[int]] = []
    for index in order:
        length = len(rows[index].input_ids)
        if groups and (len(groups[-1]) + 1) * length <= batch_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups

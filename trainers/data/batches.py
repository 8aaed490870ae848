"""How rows become tensors: packed without padding for training and signals, padded for generation.

Shape suffixes: B rows, T positions, N scored or evaluated tokens, S tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trainers.data.encode import EncodedRow, PackedRow

if TYPE_CHECKING:
    from torch import Tensor


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

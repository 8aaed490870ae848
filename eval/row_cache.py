"""Keys and values of rows that are being continued, and the attention that reads them.

Every row keeps its own length: nothing is padded on the left, a row's next token stands at its own next position, and several
tokens of one row may come at once. The buffers are written in place and grow in blocks, because a cache that is concatenated
anew for every token copies itself for every token.

Shape suffixes: B rows, H heads, C positions that fit, E size of a head, S new tokens of all rows, Q new tokens of a row, T positions
attended to, N kept tokens, X entries of the rows' queries laid end to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from trainers.attention import packed_attention
from trainers.data.packing import Packed

NAME = "measured_rows"
_BLOCK = 64
"""Positions by which the buffers grow: each growth copies them once."""


@dataclass
class KeptStates:
    """Keys and values of a packed forward pass by layer, shape (S, H, E) each; filled by the attention."""

    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def rows(self, batch: Packed, *, wanted: Sequence[tuple[int, int]]) -> list[RowStates]:
        """Copies for the wanted (row of the batch, number of its first tokens)."""
        found = []
        for row, length in wanted:
            first, available = batch.row_spans[row]
            assert length <= available
            tokens = slice(first, first + length)
            found.append(
                RowStates(length, [(key[tokens].clone(), value[tokens].clone()) for _, (key, value) in sorted(self.layers.items())])
            )
        return found


@dataclass(frozen=True)
class RowStates:
    """Keys and values of a row's first tokens, one pair of shape (N, H, E) per layer."""

    length: int
    layers: list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Step:
    """Where the new tokens of one forward pass belong.

    Args:
        row_S: row of each new token.
        position_S: its position in the row.
        mask_B1QT: 0 where a query attends, minus infinity elsewhere.
        spread_X: new token at each place of the padded queries; None if all rows have equally many.
        restore_S: place of each new token there, or None.
    """

    row_S: Tensor
    position_S: Tensor
    mask_B1QT: Tensor
    spread_X: Tensor | None
    restore_S: Tensor | None


class RowCache:
    """Growing buffers of keys and values for rows of different lengths.

    Args:
        rows: what is already known of each row.
    """

    def __init__(self, rows: Sequence[RowStates]) -> None:
        self.lengths = [row.length for row in rows]
        capacity = _rounded_up(max(self.lengths) + 1)
        self._layers: list[tuple[Tensor, Tensor]] = []
        for layer in range(len(rows[0].layers)):
            pair = []
            for part in range(2):
                first = rows[0].layers[layer][part]
                # Zeros, not empty memory: what a mask hides must still be finite, because 0 times NaN is NaN.
                buffer_BHCE = first.new_zeros(len(rows), first.shape[1], capacity, first.shape[2])
                for index, row in enumerate(rows):
                    buffer_BHCE[index, :, : row.length] = row.layers[layer][part].transpose(0, 1)
                pair.append(buffer_BHCE)
            self._layers.append((pair[0], pair[1]))
        self._step: _Step | None = None

    @property
    def capacity(self) -> int:
        """Positions that fit before the buffers must grow."""
        return self._layers[0][0].shape[2]

    @property
    def position_S(self) -> Tensor:
        """Positions of the tokens of the step that was begun last."""
        assert self._step is not None
        return self._step.position_S

    def begin(self, counts: Sequence[int]) -> None:
        """Make room for so many new tokens of each row (0 for a finished one), which follow in row order in the next forward pass.

        They become part of a row only when its length is raised: what was refused is overwritten.
        """
        buffer = self._layers[0][0]
        device, most = buffer.device, max(counts)
        longest = max(length + count for length, count in zip(self.lengths, counts, strict=True))
        if longest > self.capacity:
            self._resize(None, capacity=_rounded_up(longest))
        lengths, number = np.asarray(self.lengths), np.asarray(counts)
        row_S = np.repeat(np.arange(len(counts)), number)
        starts = np.cumsum(number) - number
        place_S = np.arange(len(row_S)) - starts[row_S]
        # Rows with fewer new tokens repeat their last one as a query, rows without any some other row's; neither is read.
        place_BQ = np.minimum(np.arange(most), np.maximum(number[:, None] - 1, 0))
        parts = [row_S, lengths[row_S] + place_S, (lengths[:, None] + place_BQ).ravel()]
        if (number != most).any():
            parts += [np.minimum(starts[:, None] + place_BQ, len(row_S) - 1).ravel(), row_S * most + place_S]
        # One copy to the device for all of them.
        moved = torch.from_numpy(np.concatenate(parts)).to(device, non_blocking=True).split([len(part) for part in parts])
        seen_BQT = torch.arange(longest, device=device) <= moved[2].view(len(counts), most, 1)
        mask = torch.zeros(seen_BQT.shape, dtype=buffer.dtype, device=device).masked_fill_(~seen_BQT, float("-inf"))
        self._step = _Step(moved[0], moved[1], mask[:, None], *(moved[3:] or (None, None)))

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these."""
        self.lengths = [self.lengths[row] for row in rows]
        self._resize(torch.tensor(rows, device=self._layers[0][0].device), capacity=_rounded_up(max(self.lengths) + 1))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None) -> Tensor:
        """Write the new tokens' keys and values of shape (1, H, S, E), then attend; outputs of shape (1, S, H, E)."""
        step = self._step
        assert step is not None
        keys_BHCE, values_BHCE = self._layers[layer]
        keys_BHCE[step.row_S, :, step.position_S] = key[0].transpose(0, 1)
        values_BHCE[step.row_S, :, step.position_S] = value[0].transpose(0, 1)
        num_rows, num_queries, length = step.mask_B1QT.shape[0], step.mask_B1QT.shape[2], step.mask_B1QT.shape[3]
        query_XHE = query[0].transpose(0, 1)
        if step.spread_X is not None:
            query_XHE = query_XHE.index_select(0, step.spread_X)
        query_BHQE = query_XHE.view(num_rows, num_queries, *query_XHE.shape[1:]).transpose(1, 2)
        # Several query heads that read one key head are laid one after the other, as if they were more queries: nothing is copied.
        repeats = query.shape[1] // keys_BHCE.shape[1]
        mask = step.mask_B1QT if repeats == 1 else step.mask_B1QT.repeat(1, 1, repeats, 1)
        out = scaled_dot_product_attention(
            query_BHQE.reshape(num_rows, -1, repeats * num_queries, query.shape[-1]),
            keys_BHCE[:, :, :length],
            values_BHCE[:, :, :length],
            attn_mask=mask,
            scale=scaling,
        )
        out_XHE = out.reshape(query_BHQE.shape).transpose(1, 2).flatten(0, 1)
        return (out_XHE if step.restore_S is None else out_XHE.index_select(0, step.restore_S))[None]

    def _resize(self, rows: Tensor | None, *, capacity: int) -> None:
        for index, pair in enumerate(self._layers):
            resized = []
            for buffer_BHCE in pair:
                used = buffer_BHCE[:, :, : min(capacity, buffer_BHCE.shape[2])]
                used = used if rows is None else used.index_select(0, rows)
                larger = used.new_zeros(*used.shape[:2], capacity, used.shape[3])
                larger[:, :, : used.shape[2]] = used
                resized.append(larger)
            self._layers[index] = (resized[0], resized[1])


def _rounded_up(positions: int) -> int:
    return -(-positions // _BLOCK) * _BLOCK


def measured_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: Packed | None = None,
    kept: KeptStates | None = None,
    cache: RowCache | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: packed rows (whose keys and values are kept if asked for), the next tokens of cached rows,
    or the library's own attention without either."""
    layer: Any = getattr(module, "layer_idx", None)
    if cache is not None:
        return cache.attend(layer, query, key, value, scaling=scaling), None
    if kept is not None:
        kept.layers[layer] = (key[0].transpose(0, 1), value[0].transpose(0, 1))
    return packed_attention(module, query, key, value, attention_mask, packed=packed, scaling=scaling, dropout=dropout, **others)

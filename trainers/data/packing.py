"""Rows laid end to end without padding: every linear layer sees real tokens only, attention sees a few groups of like-sized rows.

LUME's rows are bimodal (two thirds below 32 tokens, a fifth above 160), so padding a batch to its longest row wastes more than half of it.
Attention costs little there; only attention needs rows, so only it is padded, within a few groups of neighbouring lengths.

Shape suffixes: B rows of a group, T positions, S tokens of all rows, N evaluated tokens, X any entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from trainers.data.encode import EncodedRow, PackedRow

if TYPE_CHECKING:
    from torch import Tensor

MAX_GROUPS = {"cpu": 6, "cuda": 3}
"""Most groups on a GPU, where each is some kernel launches more per layer, and on a CPU, where padding costs more than they do."""
_GROUP_COST = 4096.0
"""What a group costs beyond its arithmetic, in pairs of positions: a handful of small operations per layer."""
_POSITION_COST = 64.0
"""What a padded position costs beyond its attention (it is gathered and scattered), in positions attended to."""


@dataclass(frozen=True)
class AttentionGroup:
    """Rows that attend together, padded on the right to the longest of them.

    Args:
        num_rows: B.
        length: T.
    """

    num_rows: int
    length: int


@dataclass(frozen=True)
class Packed:
    """Rows laid end to end, in the order of their lengths, and the tokens of them that are evaluated, in the order of the rows.

    Args:
        input_ids_S: token ids, int64.
        position_ids_S: position of each token within its row, int64.
        row_S: row of each token, int64.
        groups: how the tokens attend to each other; together they cover all tokens once.
        spread_X: token at each position of the groups' rows laid end to end, int64; padding repeats its row's last token. None where
            no group is padded: then that is the order of the tokens.
        restore_S: the position of each token there, int64; None where no group is padded.
        source_N: token whose hidden state predicts each evaluated token, int64; in row order, then position order.
        row_N: row of each evaluated token, int64.
        label_N: the evaluated tokens' ids, int64.
        scored_X: place of each scored token among the evaluated ones, int64, in row order; None where all of them are scored.
        first_evaluated: number of evaluated tokens in the rows before each row, and in all rows.
        first_scored: the same for scored tokens.
        row_spans: first token of each row among all tokens, and its number of tokens without padding that the row itself carries.
        pad_token_id: what a model that must see padding is given.
    """

    input_ids_S: Tensor
    position_ids_S: Tensor
    row_S: Tensor
    groups: tuple[AttentionGroup, ...]
    spread_X: Tensor | None
    restore_S: Tensor | None
    source_N: Tensor
    row_N: Tensor
    label_N: Tensor
    scored_X: Tensor | None
    first_evaluated: tuple[int, ...]
    first_scored: tuple[int, ...]
    row_spans: tuple[tuple[int, int], ...]
    pad_token_id: int

    @property
    def num_rows(self) -> int:
        """Rows in the batch; an empty batch has none, though it holds one token."""
        return len(self.first_evaluated) - 1

    def tokens_of(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Real tokens of the rows from ``start`` to before ``stop``, in row order, and the row of each, counted from ``start``."""
        spans = self.row_spans[start:stop]
        tokens = _join([np.arange(first, first + length) for first, length in spans])
        return _tensor(tokens), _tensor(np.repeat(np.arange(len(spans)), [length for _, length in spans]))

    def scored_of(self, start: int, stop: int) -> Tensor | None:
        """Places of the scored tokens among the evaluated ones of the rows from ``start`` to before ``stop``; None if all are scored."""
        if self.scored_X is None:
            return None
        return self.scored_X[self.first_scored[start] : self.first_scored[stop]] - self.first_evaluated[start]

    def to(self, device: str) -> Packed:
        """The same batch on a device; copies to a GPU are not waited for."""

        def move(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device, non_blocking=True)

        if self.input_ids_S.device.type == device:
            return self
        tensors: dict[str, Any] = {
            name: move(getattr(self, name)) for name in self.__dataclass_fields__ if name.endswith(("_S", "_N", "_X"))
        }
        return replace(self, **tensors)


def pack(rows: Sequence[EncodedRow | PackedRow], *, pad_token_id: int, pad_to: int = 0, max_groups: int = 3) -> Packed:
    """Lay rows end to end and list their evaluated tokens.

    Without rows the batch is a single pad token with nothing evaluated: a rank that has no rows left must still take part in the
    collective forward and backward passes.

    Args:
        rows: encoded rows, each with at least one token.
        pad_token_id: the id of padding.
        pad_to: shortest length of a group's rows in attention; more than 0 only to show that padding changes nothing.
        max_groups: most groups of attention.
    """
    ids = [row.input_ids for row in rows] or [(pad_token_id,)]
    lengths = np.array([len(part) for part in ids])
    order = np.argsort(lengths, kind="stable")
    starts = np.empty(len(ids), dtype=np.int64)  # of each row among all tokens
    starts[order] = np.concatenate([[0], np.cumsum(lengths[order])[:-1]])
    groups, spread, restore = _group(lengths[order], max_groups=max_groups, pad_to=pad_to)
    evaluated = [np.asarray(row.evaluated, dtype=np.int64) for row in rows]
    scored = [np.isin(all_of, np.asarray(row.scored, dtype=np.int64)) for all_of, row in zip(evaluated, rows, strict=True)]
    whole = all(part.all() for part in scored)
    return Packed(
        input_ids_S=_tensor(np.concatenate([ids[row] for row in order])),
        position_ids_S=_tensor(np.concatenate([np.arange(lengths[row]) for row in order])),
        row_S=_tensor(np.repeat(order, lengths[order])),
        groups=groups,
        spread_X=spread,
        restore_S=restore,
        source_N=_tensor(_join([start + part - 1 for start, part in zip(starts, evaluated, strict=False)])),
        row_N=_tensor(np.repeat(np.arange(len(rows)), [len(part) for part in evaluated])),
        label_N=_tensor(_join([np.asarray(row.input_ids, dtype=np.int64)[part] for row, part in zip(rows, evaluated, strict=True)])),
        scored_X=None if whole else _tensor(np.flatnonzero(_join(scored))),
        first_evaluated=_offsets([len(part) for part in evaluated]),
        first_scored=_offsets([int(part.sum()) for part in scored]),
        row_spans=tuple((int(start), len(row.input_ids) - row.num_padding) for start, row in zip(starts, rows, strict=False)),
        pad_token_id=pad_token_id,
    )


def shape_groups(lengths: Sequence[int], *, max_groups: int = 3) -> list[int]:
    """Where to cut rows of ascending length into at most ``max_groups`` groups, each padded to its longest row, so that attention
    costs least: the group sizes, in order."""
    values, repeats = np.unique(np.asarray(lengths), return_counts=True)
    if len(values) <= 1 or max_groups <= 1:
        return [len(lengths)]
    rows = np.concatenate([[0], np.cumsum(repeats)])
    cost = values * (values + _POSITION_COST)
    # best[j]: least cost of the rows of the first j lengths in the groups allowed so far; cut[g][j]: where its last group begins.
    best = np.concatenate([[0.0], rows[1:] * cost + _GROUP_COST])
    cuts = [np.zeros(len(rows), dtype=int)]
    for _ in range(1, max_groups):
        total = best[:, None] + (rows[None, 1:] - rows[:, None]) * cost[None, :] + _GROUP_COST
        total[np.tri(len(rows), len(values), -1, dtype=bool)] = np.inf  # a group holds at least one length
        cut = np.concatenate([[0], total.argmin(axis=0)])
        best = np.concatenate([[0.0], total.min(axis=0)])
        cuts.append(cut)
    sizes: list[int] = []
    end = len(values)
    for cut in reversed(cuts):
        if end == 0:
            break
        begin = int(cut[end])
        sizes.insert(0, int(rows[end] - rows[begin]))
        end = begin
    return sizes


def _group(lengths: np.ndarray, *, max_groups: int, pad_to: int) -> tuple[tuple[AttentionGroup, ...], Tensor | None, Tensor | None]:
    """Groups of rows of ascending length, the token at each of their positions, and the position of each token."""
    groups, spread, restore = [], [], []
    row, token, output = 0, 0, 0
    for size in shape_groups(lengths.tolist(), max_groups=max_groups):
        own = lengths[row : row + size]
        length = max(int(own[-1]), pad_to)
        places = np.arange(length)[None, :]
        begins = token + np.concatenate([[0], np.cumsum(own)[:-1]])
        spread.append((begins[:, None] + np.minimum(places, own[:, None] - 1)).ravel())
        restore.append((output + np.arange(size)[:, None] * length + places)[places < own[:, None]])
        groups.append(AttentionGroup(size, length))
        row, token, output = row + size, token + int(own.sum()), output + size * length
    if token == output:
        return tuple(groups), None, None
    return tuple(groups), _tensor(np.concatenate(spread)), _tensor(np.concatenate(restore))


def _join(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _offsets(counts: Sequence[int]) -> tuple[int, ...]:
    return tuple(np.concatenate([[0], np.cumsum(counts)]).astype(int).tolist())


def _tensor(values: np.ndarray) -> Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))

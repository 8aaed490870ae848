"""KnOTS: TIES in the basis that the trials share.

Shapes: m rows and n columns of an update, N trials, R the rank of all updates side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from merging.methods.combination import Combination
from merging.methods.election import elect_and_average
from merging.methods.low_rank import LowRank, from_sides
from merging.ties import check_updates, trim

SMALLEST_SINGULAR_VALUE = 1e-6
"""Relative to the largest. Below it lies the rounding of float32 updates, whose directions would take places in the trim."""


def knots(
    *,
    updates: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    factors: Sequence[LowRank | None] = (),
    density: float,
    elect: Literal["unweighted", "weighted"] = "unweighted",
    divisor: Literal["count", "weight"] = "count",
    zero_sum: Literal["positive", "drop"] = "positive",
) -> Combination:
    """``U S ties(V_1, .., V_N)`` for the singular value decomposition ``[t_1 .. t_N] = U S [V_1 .. V_N]``.

    With all factors the decomposition is that of a core of the size of the summed ranks, after a QR decomposition of the factors; without,
    it comes from the eigenvectors of a Gram matrix. Both are computed in float64. What is trimmed are the V_i, each of R x n elements.

    Args:
        updates: float32 task vectors of one shape; one of a single dimension is one row, further dimensions are columns.
        factors: for each update its factors or null; they may have different ranks.
        density, weights, elect, divisor, zero_sum: of the TIES merge of the V_i.

    Source: Stoica et al. 2024, https://arxiv.org/abs/2410.19735
    """
    check_updates(updates)
    shape = updates[0].shape
    known = [pair for pair in factors if pair is not None]
    if len(known) == len(updates):
        basis, parts = _decompose_factors(known)
    else:
        basis, parts = _decompose_dense([update.reshape(1, -1) if update.dim() < 2 else update.flatten(1) for update in updates])
    if basis.shape[1] == 0:
        return Combination(torch.zeros_like(updates[0]), tuple(torch.zeros_like(update) for update in updates))
    trimmed = [trim(part, density=density) for part in parts]
    merged = elect_and_average(updates=trimmed, weights=weights, elect=elect, divisor=divisor, zero_sum=zero_sum)
    transpose = bool(known) and known[0].transpose
    product = from_sides(left=basis, right=merged, transpose=transpose) if len(shape) == 2 else None
    return Combination((basis @ merged).reshape(shape), tuple(trimmed), product)


def _decompose_factors(factors: Sequence[LowRank]) -> tuple[Tensor, list[Tensor]]:
    """``U S`` (m, R) and every ``V_i`` (R, n), float32, without forming an update."""
    lefts, rights = [pair.left.double() for pair in factors], [pair.right.double() for pair in factors]
    # [t_1 .. t_N] = Q [R_1 T_1' .. R_N T_N'] diag(P_1' .. P_N'), where Q and the P_i have orthonormal columns.
    q, r = torch.linalg.qr(torch.cat(lefts, dim=1))
    widths = [left.shape[1] for left in lefts]
    columns = [torch.linalg.qr(right.T) for right in rights]
    core = torch.cat([part @ t.T for part, (_, t) in zip(r.split(widths, dim=1), columns, strict=True)], dim=1)
    u, s, w = torch.linalg.svd(core, full_matrices=False)
    keep = _significant(s)
    basis = (q @ u[:, keep]) * s[keep]
    cores = w[keep].split([p.shape[1] for p, _ in columns], dim=1)
    return basis.float(), [(part @ p.T).float() for part, (p, _) in zip(cores, columns, strict=True)]


def _decompose_dense(updates: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The same from the updates themselves."""
    wide = [update.double() for update in updates]
    rows, columns = wide[0].shape
    if rows <= columns * len(wide):
        gram = sum(update @ update.T for update in wide)
        assert isinstance(gram, Tensor)
        values, vectors = torch.linalg.eigh(gram)
        s = values.clamp(min=0).sqrt()
        keep = _significant(s)
        u, s = vectors[:, keep], s[keep]
        parts = [(u.T @ update) / s[:, None] for update in wide]
        return (u * s).float(), [part.float() for part in parts]
    whole = torch.cat(wide, dim=1)
    values, vectors = torch.linalg.eigh(whole.T @ whole)
    s = values.clamp(min=0).sqrt()
    keep = _significant(s)
    v = vectors[:, keep]
    return (whole @ v).float(), [part.T.contiguous().float() for part in v.split(columns, dim=0)]


def _significant(s: Tensor) -> Tensor:
    """Which singular values are more than rounding."""
    return s > SMALLEST_SINGULAR_VALUE * s.max() if s.numel() else s > 0

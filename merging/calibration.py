"""One-dimensional search for the scale at which a merge's membership AUC meets 0.5."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from statistics import NormalDist

TARGET = 0.5
EXTREME = 0.001
"""An AUC nearer to 0 or 1 than this counts as this near: few documents cannot tell more."""
DIGITS = 3
"""Scales are rounded, so that a repeated search asks for the same merges."""
MARGIN = 0.05
"""A secant step keeps this share of the bracket's width from its ends, so that a bent curve cannot make it stall."""


def next_scale(*, auc_at: Mapping[float, float], bounds: tuple[float, float], tolerance: float) -> float | None:
    """The next scale to measure, or null if nothing more is to be learned.

    The AUC usually falls as the scale grows, but nothing relies on it: inside a change of side the secant is taken,
    and without one the line through the outermost two points is followed, at most to the bound. Lines are drawn through the normal
    quantiles of the AUC (the distance of the two groups of losses in standard deviations, if they were normal): the AUC itself stays at
    1 for long, and then falls at once.

    Args:
        auc_at: AUC by scale, measured so far; scale 0 is the untouched target, which may lie outside the bounds.
        bounds: lowest and highest scale allowed.
        tolerance: an AUC this near to 0.5 ends the search.
    """
    low, high = bounds
    inside = [scale for scale in auc_at if low <= scale <= high]
    if not inside or any(abs(auc_at[scale] - TARGET) <= tolerance for scale in inside):
        return None
    points = sorted((scale, height(auc)) for scale, auc in auc_at.items())
    brackets = [
        (left, right) for left, right in itertools.pairwise(points) if left[1] * right[1] <= 0 and left[0] < high and right[0] > low
    ]
    if brackets:
        (a, height_a), (b, height_b) = min(brackets, key=lambda ends: (abs((ends[0][0] + ends[1][0]) / 2 - 1), ends))
        a_inside, b_inside = max(a, low), min(b, high)
        secant = a + (b - a) * height_a / (height_a - height_b) if height_a != height_b else (a + b) / 2
        margin = MARGIN * (b - a)
        proposal = min(max(secant, a + margin, a_inside), b - margin, b_inside)
        return _new(proposal, auc_at) if low <= proposal <= high else None
    proposal = _extrapolate(points, low=low, high=high)
    return _new(proposal, auc_at) or _new(high if proposal >= max(inside) else low, auc_at)


def height(auc: float) -> float:
    """The normal quantile of an AUC: 0 at 0.5, about 3 at 1."""
    return NormalDist().inv_cdf(min(max(auc, EXTREME), 1 - EXTREME))


def _extrapolate(points: list[tuple[float, float]], *, low: float, high: float) -> float:
    """Follow the line through the end of the curve that is nearer to the target; without a slope, AUC falls with scale."""
    nearer_at_end = abs(points[-1][1]) <= abs(points[0][1])
    if len(points) == 1:
        return high if points[0][1] > 0 else low
    (a, height_a), (b, height_b) = points[-2:] if nearer_at_end else points[:2]
    if height_a == height_b:
        return high if height_b > 0 else low
    return min(max(a - height_a * (b - a) / (height_b - height_a), low), high)


def _new(scale: float, auc_at: Mapping[float, float]) -> float | None:
    scale = round(scale, DIGITS)
    return None if any(abs(scale - known) < 10**-DIGITS for known in auc_at) else scale

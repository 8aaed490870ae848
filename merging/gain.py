"""How much better one model is than another by the search's objective, with an interval over documents."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from eval.bootstrap import draw_weights, score_samples, tables
from merging.config import ObjectiveWeights

if TYPE_CHECKING:
    from eval.report import EvalReport

SAMPLES = 1000


def objective_gain(
    a: EvalReport, b: EvalReport, *, weights: ObjectiveWeights, confidence: float = 0.95, samples: int = SAMPLES, seed: int = 0
) -> dict[str, float] | None:
    """The objective of ``a`` minus that of ``b``, with a percentile interval; null if they have nothing in common.

    Both are scored on the same resampled documents, so what they share cancels. Parts that one of them lacks are left out.

    Args:
        a: report with rows.
        b: report with rows about the same documents.
        weights: of the parts.
        confidence: coverage, in (0, 1).
        samples: resamples.
        seed: of the draws.

    Returns:
        ``difference``, ``low`` and ``high``.
    """
    parts = {name: weight for name, weight in weights if weight > 0 and a.scores.get(name) is not None and b.scores.get(name) is not None}
    left, right = tables(a.rows), tables(b.rows)
    if not parts or left.units() != right.units():
        return None
    drawn = {part: draw_weights(units, samples=samples, seed=seed, part=part) for part, units in left.units().items()}
    first, second = score_samples(left, weights=drawn), score_samples(right, weights=drawn)
    total = sum(parts.values())

    def mean(values: Mapping[str, float | np.ndarray | None]) -> np.ndarray:
        return sum(weight / total * np.asarray(values[name], dtype=float) for name, weight in parts.items())  # type: ignore[return-value]

    difference = float(mean(a.scores) - mean(b.scores))
    differences = mean(first) - mean(second)
    known = differences[np.isfinite(differences)]
    if not math.isfinite(difference) or 2 * len(known) < samples:
        return None
    low, high = np.quantile(known, [(1 - confidence) / 2, (1 + confidence) / 2])
    # Near a kink of the objective all resamples may lie on one side of the point.
    return {"difference": difference, "low": min(float(low), difference), "high": max(float(high), difference)}

"""Means and AUCs over the rows of some sets, as they are and with whole units (authors, rows) drawn again.

Shape suffixes: S resamples, R rows of a set, U units of a set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.bootstrap import draw_weights
from eval.mia import finite_or_infinite


@dataclass(frozen=True)
class SetRows:
    """The rows of one set.

    Args:
        units: what is drawn, in order of first appearance.
        unit_R: each row's unit, as an index.
        rows: the rows of the report.
    """

    units: list[str]
    unit_R: np.ndarray
    rows: list[Mapping[str, Any]]

    def column(self, name: str) -> np.ndarray:
        """A metric of every row, float64, shape (R,); NaN where a row has none."""
        return np.array([math.nan if row.get(name) is None else row[name] for row in self.rows], dtype=np.float64)


def by_set(rows: Sequence[Mapping[str, Any]]) -> dict[str, SetRows]:
    """The rows of a report by their ``set``, with their ``unit``."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["set"], []).append(row)
    tables = {}
    for name, members in found.items():
        index = {unit: number for number, unit in enumerate(dict.fromkeys(row["unit"] for row in members))}
        tables[name] = SetRows(units=list(index), unit_R=np.array([index[row["unit"]] for row in members]), rows=members)
    return tables


def once(sets: Mapping[str, SetRows]) -> dict[str, np.ndarray]:
    """Weights that take every row once, shape (1, R) per set: they give the scores themselves."""
    return {name: np.ones((1, len(table.rows))) for name, table in sets.items()}


def drawn(sets: Mapping[str, SetRows], *, samples: int, seed: int) -> dict[str, np.ndarray]:
    """How often each row appears in each resample, shape (S, R) per set: units are drawn with replacement, with all of their rows."""
    return {
        name: draw_weights([(unit, "") for unit in table.units], samples=samples, seed=seed, part=name)[:, table.unit_R]
        for name, table in sets.items()
    }


def weighted_mean(values_R: np.ndarray, weights_SR: np.ndarray) -> np.ndarray:
    """Mean over the rows in each resample, shape (S,); NaN where a row has no value."""
    with np.errstate(invalid="ignore"):
        return weights_SR @ values_R / weights_SR.sum(1)


def weighted_auc(members_R: np.ndarray, strangers_R: np.ndarray, *, member_weights: np.ndarray, stranger_weights: np.ndarray) -> np.ndarray:
    """The membership attack's AUC in each resample, shape (S,); scores like losses, see ``eval.mia.attack_auc``."""
    members, strangers = finite_or_infinite(list(members_R)), finite_or_infinite(list(strangers_R))
    wins = (members[:, None] < strangers[None, :]) + 0.5 * (members[:, None] == strangers[None, :])
    return ((member_weights @ wins) * stranger_weights).sum(1) / (member_weights.sum(1) * stranger_weights.sum(1))


def limits(samples_S: np.ndarray, *, point: float | None, confidence: float) -> list[float] | None:
    """Percentile interval over the defined resamples, stretched to its point; None without a point, or if most resamples are undefined."""
    defined = samples_S[np.isfinite(samples_S)]
    if point is None or not math.isfinite(point) or 2 * len(defined) < len(samples_S) or not len(defined):
        return None
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return [min(float(low), point), max(float(high), point)]

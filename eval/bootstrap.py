"""Intervals and differences by resampling documents, because the rows of one document stand or fall together.

Shape suffixes: S resamples, U units (documents, members, questions), C (task, kind) cells.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.degenerate import is_degenerate
from eval.mia import finite_or_infinite
from eval.report import SCORE_NAMES, EvalReport
from trainers.data.types import Kind
from trainers.errors import InputError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class SetTable:
    """Per-document sums of one set, so that a resample is a matrix product.

    Args:
        units: document ids, sorted.
        strata: each document's task; resampling keeps the number of documents of every task.
        cells: (task, kind) of each column.
        sums_UC: sum of the scores.
        counts_UC: number of rows.
        other_UX: columns log-probability, correct tokens, tokens, degenerate completions, completions, extraction strength, and the
            rows that have one.
    """

    units: list[str]
    strata: list[str]
    cells: list[tuple[str, Kind]]
    sums_UC: np.ndarray
    counts_UC: np.ndarray
    other_UX: np.ndarray


@dataclass(frozen=True)
class Tables:
    """What the scores are computed from; a part that was not measured is empty."""

    sets: dict[str, SetTable]
    members: dict[str, float]
    nonmembers: dict[str, float]
    mmlu: dict[str, float]

    def units(self) -> dict[str, list[tuple[str, str]]]:
        """(unit, stratum) per part, in a fixed order."""
        parts = {name: list(zip(table.units, table.strata, strict=True)) for name, table in self.sets.items()}
        for name, values in (("member", self.members), ("nonmember", self.nonmembers), ("mmlu", self.mmlu)):
            if values:
                parts[name] = [(unit, "") for unit in values]
        return parts


def tables(rows: Sequence[Row]) -> Tables:
    """Collect the rows of a report by document."""

    def part(name: str, key: str) -> dict[str, float]:
        values: dict[str, float] = {}
        for row in rows:
            if row["part"] == name:
                unit = row["id"] if row["id"] not in values else f"{row['id']}#{len(values)}"
                values[unit] = math.nan if row[key] is None else float(row[key])
        return dict(sorted(values.items()))

    task_rows = [row for row in rows if row["part"] == "task"]
    sets = {name: _set_table([row for row in task_rows if row["set"] == name]) for name in sorted({row["set"] for row in task_rows})}
    return Tables(sets=sets, members=part("member", "loss"), nonmembers=part("nonmember", "loss"), mmlu=part("mmlu", "correct"))


def _set_table(rows: Sequence[Row]) -> SetTable:
    tasks = {row["document"]: row["task"] for row in reversed(rows)}
    units = sorted(tasks)
    cells = [(task, kind) for task in sorted({row["task"] for row in rows}) for kind in (Kind.COMPLETION, Kind.QUESTION)]
    unit_index, cell_index = {u: i for i, u in enumerate(units)}, {c: i for i, c in enumerate(cells)}
    sums, counts, other = np.zeros((len(units), len(cells))), np.zeros((len(units), len(cells))), np.zeros((len(units), 7))
    for row in rows:
        u, c = unit_index[row["document"]], cell_index[row["task"], Kind(row["kind"])]
        sums[u, c] += row["score"]
        counts[u, c] += 1
        log_prob, accuracy, tokens = row["answer_log_prob"], row["token_accuracy"], row["num_tokens"]
        completion, strength = row["kind"] == Kind.COMPLETION, row.get("extraction_strength")
        extracted = strength is not None and not math.isnan(strength)
        other[u] += (
            math.nan if log_prob is None else log_prob,
            0 if not tokens else accuracy * tokens,
            tokens,
            completion and is_degenerate(row["output"]),
            completion,
            strength if extracted else 0,
            extracted,
        )
    return SetTable(units=units, strata=[tasks[u] for u in units], cells=cells, sums_UC=sums, counts_UC=counts, other_UX=other)


def draw_weights(units: Sequence[tuple[str, str]], *, samples: int, seed: int, part: str) -> np.ndarray:
    """How often each unit appears in each resample, shape (S, U): as many draws with replacement per stratum as it has units.

    A function of the seed, the part's name and the units alone, so that two models scored on the same units are resampled alike.
    """
    rng = np.random.default_rng([seed, zlib.crc32(part.encode())])
    weights = np.zeros((samples, len(units)))
    for stratum in sorted({stratum for _, stratum in units}):
        columns = [index for index, (_, name) in enumerate(units) if name == stratum]
        weights[:, columns] = rng.multinomial(len(columns), [1 / len(columns)] * len(columns), size=samples)
    return weights


def score_samples(data: Tables, *, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every score of ``SCORE_NAMES`` in every resample, shape (S,) each; NaN where it is not defined.

    Args:
        data: from ``tables``.
        weights: per part of ``data.units()``, shape (S, U). A row of ones gives the scores themselves.
    """
    samples = len(next(iter(weights.values()))) if weights else 0
    scores = {name: np.full(samples, math.nan) for name in SCORE_NAMES}
    terms = []
    with np.errstate(divide="ignore", invalid="ignore"):
        for name in ("forget", "retain"):
            if name in data.sets:
                found, set_terms = _set_samples(data.sets[name], weights[name], name=name)
                scores |= found
                terms.append(1 - set_terms if name == "forget" else set_terms)
        scores["forgetting"] = 1 - _mean_of_present(scores["forget_regurgitation"], scores["forget_knowledge"])
        scores["retention"] = _mean_of_present(scores["retain_regurgitation"], scores["retain_knowledge"])
        if terms:
            scores["task_aggregate"] = _harmonic_mean(np.concatenate(terms, axis=1))
        if data.members and data.nonmembers:
            scores["mia_auc"] = _auc_samples(data, weights)
            scores["mia_score"] = 1 - np.abs(scores["mia_auc"] - 0.5) * 2
        if data.mmlu:
            scores["mmlu_average"] = weights["mmlu"] @ np.array(list(data.mmlu.values())) / weights["mmlu"].sum(1)
        scores["final_score"] = (scores["task_aggregate"] + scores["mia_score"] + scores["mmlu_average"]) / 3
    return scores


def _set_samples(table: SetTable, weights_SU: np.ndarray, *, name: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    sums_SC, counts_SC = weights_SU @ table.sums_UC, weights_SU @ table.counts_UC
    columns = {kind: [i for i, cell in enumerate(table.cells) if cell[1] is kind] for kind in (Kind.COMPLETION, Kind.QUESTION)}
    log_prob, correct, tokens, degenerate, completions, strength, strengths = (weights_SU @ table.other_UX).T
    scores = {
        f"{name}_regurgitation": sums_SC[:, columns[Kind.COMPLETION]].sum(1) / counts_SC[:, columns[Kind.COMPLETION]].sum(1),
        f"{name}_knowledge": sums_SC[:, columns[Kind.QUESTION]].sum(1) / counts_SC[:, columns[Kind.QUESTION]].sum(1),
        f"{name}_answer_log_prob": log_prob / tokens,
        f"{name}_token_accuracy": correct / tokens,
        f"{name}_extraction_strength": strength / strengths,
    }
    if name == "retain":
        scores["degenerate_rate"] = degenerate / completions
    return scores, sums_SC / counts_SC


def _mean_of_present(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(a), b, np.where(np.isnan(b), a, (a + b) / 2))


def _harmonic_mean(terms_SX: np.ndarray) -> np.ndarray:
    means = terms_SX.shape[1] / (1 / terms_SX).sum(1)
    return np.where((terms_SX == 0).any(1), 0.0, means)


def _auc_samples(data: Tables, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    members, strangers = finite_or_infinite(list(data.members.values())), finite_or_infinite(list(data.nonmembers.values()))
    wins = (members[:, None] < strangers[None, :]) + 0.5 * (members[:, None] == strangers[None, :])
    return ((weights["member"] @ wins) * weights["nonmember"]).sum(1) / (len(members) * len(strangers))


def point_scores(rows: Sequence[Row]) -> dict[str, float]:
    """The scores of a report's rows themselves: a resample in which every document appears once. NaN where not defined."""
    data = tables(rows)
    ones = {part: np.ones((1, len(units))) for part, units in data.units().items()}
    return {name: float(values[0]) if len(values) else math.nan for name, values in score_samples(data, weights=ones).items()}


def limits(samples: np.ndarray, *, point: float, confidence: float) -> list[float] | None:
    """Percentile interval over the defined resamples, stretched to its point; None if most resamples are undefined."""
    defined = samples[np.isfinite(samples)]
    if not math.isfinite(point) or 2 * len(defined) < len(samples) or not len(defined):
        return None
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    # The MIA score has a kink at AUC 0.5 and the task aggregate drops to 0: there, resamples may all lie on one side of the point.
    return [min(float(low), point), max(float(high), point)]


def intervals(
    rows: Sequence[Row], *, scores: Mapping[str, float | None], samples: int, seed: int, confidence: float
) -> dict[str, list[float]]:
    """A percentile bootstrap interval for every score that is a finite number.

    Documents are drawn within their task, members and non-members each among themselves, MMLU questions over all subjects.

    Args:
        rows: the rows of a report.
        scores: the scores to give intervals for.
        samples: resamples.
        seed: of all draws.
        confidence: coverage, in (0, 1).
    """
    data = tables(rows)
    weights = {part: draw_weights(units, samples=samples, seed=seed, part=part) for part, units in data.units().items()}
    drawn = score_samples(data, weights=weights)
    found = {
        name: limits(drawn[name], point=float(value), confidence=confidence)
        for name, value in scores.items()
        if value is not None and name in drawn
    }
    return {name: interval for name, interval in found.items() if interval is not None}


def paired_difference(
    a: EvalReport, b: EvalReport, *, score_names: Sequence[str] | None = None, samples: int = 1000, seed: int = 0, confidence: float = 0.95
) -> dict[str, dict[str, float]]:
    """How much better (larger) each score of ``a`` is than that of ``b``, with an interval.

    Both models are scored on the same resampled documents, so what they share cancels.

    Args:
        a: report with rows.
        b: report with rows about the same documents.
        score_names: default: every score that both have.
        samples: resamples.
        seed: of the draws.
        confidence: coverage, in (0, 1).

    Returns:
        ``{score: {"difference", "low", "high"}}``; a score that one of them lacks is left out.

    Raises:
        InputError: if the two were not scored on the same documents.
    """
    left, right = tables(a.rows), tables(b.rows)
    units, other = left.units(), right.units()
    for part in sorted(units.keys() & other.keys()):
        if units[part] != other[part]:
            differing = sorted({unit for unit, _ in units[part]} ^ {unit for unit, _ in other[part]})
            raise InputError(
                f"the two reports were not scored on the same documents: part {part!r}, {len(differing)} differ",
                where=f"{a.model} ({len(units[part])}) against {b.model} ({len(other[part])}), for instance {differing[:3]}",
                fix="evaluate both with the same data and fold",
            )
    weights = {part: draw_weights(both, samples=samples, seed=seed, part=part) for part, both in (units | other).items()}
    first, second = score_samples(left, weights=weights), score_samples(right, weights=weights)
    result = {}
    for name in score_names if score_names is not None else SCORE_NAMES:
        value_a, value_b = a.scores.get(name), b.scores.get(name)
        if value_a is None or value_b is None:
            continue
        difference = value_a - value_b
        interval = limits(first[name] - second[name], point=difference, confidence=confidence)
        if interval is not None:
            result[name] = {"difference": difference, "low": interval[0], "high": interval[1]}
    return result

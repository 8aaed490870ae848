"""How much of what was forgotten comes back, and how much of that would come back without knowing the documents.

All numbers carry bootstrap intervals over documents. Readings of one attack are resampled alike, so what they share cancels.

Shape suffix: S one point (first) and the resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.bootstrap import draw_weights, score_samples, tables
from eval.mia import attack_auc, auc_standard_error

SCORES = ("forget_regurgitation", "forget_knowledge", "forget_answer_log_prob")
"""ROUGE-L recall, exact match, and log-probability per answer token (nats): the smooth one."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Resampling:
    """How intervals are drawn.

    Args:
        samples: resamples.
        seed: of the draws.
        confidence: coverage of the intervals, in (0, 1).
        comparisons: how many comparisons decide together; a single one must hold at 1 - (1 - confidence) / comparisons (Bonferroni).
        min_gap: a difference between two models below this is no difference, whatever its interval.
    """

    samples: int
    seed: int
    confidence: float
    comparisons: int = 1
    min_gap: float = 0.05


@dataclass(frozen=True)
class Readings:
    """The rows that one attack is judged by; None where there is no such model.

    Args:
        before: the untouched target, as it is.
        unlearned: the audited model, as it is.
        after: the audited model, attacked.
        control: a model that never saw the forget set, as it is.
        control_after: the same, attacked.
        unseen: the audited model on texts that it never saw, as it is.
        unseen_after: the same, attacked.
    """

    before: Sequence[Row]
    unlearned: Sequence[Row]
    after: Sequence[Row]
    control: Sequence[Row] | None = None
    control_after: Sequence[Row] | None = None
    unseen: Sequence[Row] | None = None
    unseen_after: Sequence[Row] | None = None


@dataclass(frozen=True)
class Estimate:
    """A number with its percentile interval; the interval is None where too few resamples define it."""

    value: float
    interval: list[float] | None


@dataclass(frozen=True)
class Recovered:
    """What an attack did to one score. Shares refer to what unlearning took away, unless said otherwise.

    Args:
        before: the untouched target's score on the rows of the attack.
        unlearned: the audited model's.
        after: the audited model's under attack.
        control: the never-seen model's as it is, or None.
        control_after: the never-seen model's under attack, or None.
        recovered: (after - unlearned) / (before - unlearned), or None.
        control_recovered: the control's own gain as the same share: of the never-seen model, or of unseen texts.
        excess: how far ``after`` lies above what the control reaches *and* above what it would reach with the control's gain, as a
            share of what the target knows and the control does not; without a never-seen model, of what unlearning took away.
        excess_low: lower limit of the excess at the level that all comparisons together need.
        why: why there is no share, or None.
        num_rows: rows that were compared.
    """

    before: float | None
    unlearned: float | None
    after: float | None
    control: float | None
    control_after: float | None
    recovered: Estimate | None
    control_recovered: Estimate | None
    excess: Estimate | None
    excess_low: float | None
    why: str | None
    num_rows: int


@dataclass(frozen=True)
class Remaining:
    """How much of a score is still there without any attack.

    Args:
        before: the untouched target's.
        unlearned: the audited model's.
        control: the never-seen model's, or None.
        remaining: (unlearned - control) / (before - control), with 0 in place of a missing control, or None.
        low: its lower limit at the level that all comparisons together need.
        why: why there is no share, or None.
    """

    before: float | None
    unlearned: float | None
    control: float | None
    remaining: Estimate | None
    low: float | None
    why: str | None


def recover(readings: Readings, *, draw: Resampling) -> dict[str, Recovered]:
    """What an attack brought back, by score. Only rows that every reading has are compared."""
    ours = [readings.before, readings.unlearned, readings.after]
    theirs = [readings.control, readings.control_after]
    seen = readings.control is not None and readings.control_after is not None
    shared = _shared([*ours, *(rows for rows in theirs if rows is not None)])
    before, unlearned, after = (_samples(rows, ids=shared, draw=draw) for rows in ours)
    control, control_after = (_samples(rows, ids=shared, draw=draw) if rows is not None and seen else None for rows in theirs)
    gains = _unseen_gains(readings, draw=draw) if not seen else None
    found = {}
    for name in SCORES:
        values = {
            "before": before[name],
            "unlearned": unlearned[name],
            "after": after[name],
            "control": control[name] if control else None,
            "control_after": control_after[name] if control_after else None,
        }
        found[name] = _recovered(values, gain_S=gains[name] if gains else None, num_rows=_rows_of(name, readings.after, shared), draw=draw)
    return found


def _recovered(values: Mapping[str, np.ndarray | None], *, gain_S: np.ndarray | None, num_rows: int, draw: Resampling) -> Recovered:
    points = {name: _finite(value_S[0]) if value_S is not None else None for name, value_S in values.items()}
    before_S, unlearned_S, after_S = values["before"], values["unlearned"], values["after"]
    control_S, control_after_S = values["control"], values["control_after"]
    assert before_S is not None
    assert unlearned_S is not None
    assert after_S is not None
    why = _why_no_share(points, taken_S=before_S - unlearned_S, draw=draw)
    if why is not None:
        return Recovered(**points, recovered=None, control_recovered=None, excess=None, excess_low=None, why=why, num_rows=num_rows)
    taken_S = before_S - unlearned_S
    if control_S is not None and control_after_S is not None:
        gain_S = control_after_S - control_S
    if gain_S is not None and not math.isfinite(gain_S[0]):
        # Unseen texts have no questions.
        gain_S = None
    helped_S = np.zeros_like(taken_S) if gain_S is None else np.maximum(gain_S, 0.0)
    floor_S, known_S = unlearned_S + helped_S, taken_S
    if control_S is not None and control_after_S is not None:
        floor_S, known_S = np.maximum(floor_S, control_after_S), before_S - control_S
    excess_S = _ratio(after_S - floor_S, known_S)
    known = not _is_noise(known_S, draw=draw)
    return Recovered(
        **points,
        recovered=_estimate(_ratio(after_S - unlearned_S, taken_S), draw=draw),
        control_recovered=_estimate(_ratio(gain_S, taken_S), draw=draw) if gain_S is not None else None,
        excess=_estimate(excess_S, draw=draw) if known else None,
        excess_low=_low(excess_S, draw=draw) if known else None,
        why=None if known else "the untouched target knows no more than the model that never saw the documents",
        num_rows=num_rows,
    )


def _why_no_share(points: Mapping[str, float | None], *, taken_S: np.ndarray, draw: Resampling) -> str | None:
    if points["before"] is None and points["unlearned"] is None and points["after"] is None:
        return "the attack has no rows of this kind"
    missing = [name for name in ("before", "unlearned", "after") if points[name] is None]
    if missing:
        return "not measured by this attack" if missing == ["after"] else f"not a finite number: {', '.join(missing)}"
    if taken_S[0] < draw.min_gap:
        return f"nothing was forgotten by this score: it fell by {taken_S[0]:.3f}"
    if _is_noise(taken_S, draw=draw):
        return f"what was forgotten by this score ({taken_S[0]:.3f}) is within noise"
    return None


def remaining(
    *, before: Sequence[Row], unlearned: Sequence[Row], control: Sequence[Row] | None, draw: Resampling, names: Sequence[str] = SCORES
) -> dict[str, Remaining]:
    """What is still there without any attack, by score."""
    given = [rows for rows in (before, unlearned, control) if rows is not None]
    shared = _shared(given)
    columns = [_samples(rows, ids=shared, draw=draw) if rows is not None else None for rows in (before, unlearned, control)]
    found = {}
    for name in names:
        before_S, unlearned_S, control_S = (column[name] if column is not None else None for column in columns)
        assert before_S is not None
        assert unlearned_S is not None
        points = [_finite(value_S[0]) if value_S is not None else None for value_S in (before_S, unlearned_S, control_S)]
        floor_S = control_S if control_S is not None else np.zeros_like(before_S)
        share_S = _ratio(unlearned_S - floor_S, before_S - floor_S)
        why = None
        if points[0] is None or points[1] is None:
            why = "not measured"
        elif control_S is None and name == "forget_answer_log_prob":
            why = "a log-probability has no zero to measure from: it needs a model that never saw the documents"
        elif before_S[0] - floor_S[0] < draw.min_gap or _is_noise(before_S - floor_S, draw=draw):
            why = "the untouched target knows no more than " + (
                "nothing" if control_S is None else "the model that never saw the documents"
            )
        found[name] = Remaining(
            before=points[0],
            unlearned=points[1],
            control=points[2],
            remaining=_estimate(share_S, draw=draw) if why is None else None,
            low=_low(share_S, draw=draw) if why is None else None,
            why=why,
        )
    return found


# ---- membership


@dataclass(frozen=True)
class MembershipResult:
    """AUCs of one family on the documents of one task; 1 = remembered, 0.5 = indistinguishable.

    Args:
        before: the untouched target's.
        unlearned: the audited model's.
        control: the never-seen model's, or None: where it differs from 0.5, members and non-members differ in style.
        standard_error: of the audited model's AUC (Hanley and McNeil).
        shift: unlearned minus control, or None.
        shift_z: the shift in standard errors of the difference of two independent AUCs, both with the larger of their errors.
        remaining: shift / (before - control), or None.
        num_members: documents of the task.
        num_nonmembers: non-member documents.
    """

    before: float
    unlearned: float
    control: float | None
    standard_error: float
    shift: float | None
    shift_z: float | None
    remaining: float | None
    num_members: int
    num_nonmembers: int


def membership_results(
    *, before: Sequence[Row], unlearned: Sequence[Row], control: Sequence[Row] | None, families: Sequence[str], min_gap: float
) -> dict[str, dict[str, MembershipResult]]:
    """AUC of every family on all documents (``all``) and on those of each task; family ``reference`` compares with the control's loss,
    or with the target's where there is no control."""
    reference = {row["id"]: row["loss"] for row in (control if control is not None else before)}
    tasks = sorted({row["task"] for row in unlearned if row["member"]})
    found: dict[str, dict[str, MembershipResult]] = {}
    for task in ["all", *tasks] if len(tasks) > 1 else tasks:
        found[task] = {}
        for family in families:
            aucs = {
                name: _auc(rows, family=family, task=task, reference=reference) if rows is not None else None
                for name, rows in (("before", before), ("unlearned", unlearned), ("control", control))
            }
            members = sum(row["member"] and task in ("all", row["task"]) for row in unlearned)
            strangers = sum(not row["member"] for row in unlearned)
            found[task][family] = _membership_result(aucs, num_members=members, num_nonmembers=strangers, min_gap=min_gap)
    return found


def _membership_result(aucs: Mapping[str, float | None], *, num_members: int, num_nonmembers: int, min_gap: float) -> MembershipResult:
    before, unlearned, control = aucs["before"], aucs["unlearned"], aucs["control"]
    assert before is not None
    assert unlearned is not None
    error = auc_standard_error(unlearned, num_members=num_members, num_nonmembers=num_nonmembers)
    shift = z = share = None
    if control is not None:
        shift = unlearned - control
        # A perfect AUC has no standard error by the formula; the larger of the two stands for both.
        both = math.sqrt(2) * max(error, auc_standard_error(control, num_members=num_members, num_nonmembers=num_nonmembers))
        z = shift / both if both > 0 else math.copysign(math.inf, shift) if shift else 0.0
        share = shift / (before - control) if before - control >= min_gap else None
    return MembershipResult(before, unlearned, control, error, shift, z, share, num_members, num_nonmembers)


def _auc(rows: Sequence[Row], *, family: str, task: str, reference: Mapping[str, float | None]) -> float:
    def value(row: Row) -> float | None:
        if family != "reference":
            return row[family]
        own, other = row["loss"], reference.get(row["id"])
        return None if own is None or other is None else own - other

    members = [value(row) for row in rows if row["member"] and task in ("all", row["task"])]
    return attack_auc(member_losses=members, nonmember_losses=[value(row) for row in rows if not row["member"]])


# ---- resampling


def _shared(readings: Sequence[Sequence[Row]]) -> frozenset[str]:
    ids = [frozenset(row["id"] for row in rows) for rows in readings]
    return frozenset.intersection(*ids) if ids else frozenset()


def _samples(rows: Sequence[Row], *, ids: frozenset[str] | None, draw: Resampling) -> dict[str, np.ndarray]:
    """Every score: the point, then the resamples, shape (S,) each; NaN where a score is not defined."""
    data = tables([{**row, "set": "forget"} for row in rows if ids is None or row["id"] in ids])
    weights = {
        part: np.concatenate([np.ones((1, len(units))), draw_weights(units, samples=draw.samples, seed=draw.seed, part=part)])
        for part, units in data.units().items()
    }
    if not weights:
        return {name: np.full(draw.samples + 1, math.nan) for name in SCORES}
    scores = score_samples(data, weights=weights)
    return {name: scores[name] for name in SCORES}


def _unseen_gains(readings: Readings, *, draw: Resampling) -> dict[str, np.ndarray] | None:
    if not readings.unseen or not readings.unseen_after:
        return None
    shared = _shared([readings.unseen, readings.unseen_after])
    plain, after = (_samples(rows, ids=shared, draw=draw) for rows in (readings.unseen, readings.unseen_after))
    return {name: after[name] - plain[name] for name in SCORES}


def _rows_of(name: str, rows: Sequence[Row], ids: frozenset[str]) -> int:
    kinds = {"forget_regurgitation": ("sc",), "forget_knowledge": ("qa",), "forget_answer_log_prob": ("sc", "qa")}[name]
    return sum(row["id"] in ids and row["kind"] in kinds for row in rows)


def _ratio(numerator_S: np.ndarray, denominator_S: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.abs(denominator_S) > 1e-12, numerator_S / denominator_S, math.nan)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _is_noise(difference_S: np.ndarray, *, draw: Resampling) -> bool:
    """Whether a difference that should be positive is not clearly so."""
    defined = difference_S[1:][np.isfinite(difference_S[1:])]
    return not len(defined) or not difference_S[0] > 0 or float(np.quantile(defined, (1 - draw.confidence) / 2)) <= 0


def _estimate(value_S: np.ndarray, *, draw: Resampling) -> Estimate:
    defined = value_S[1:][np.isfinite(value_S[1:])]
    point = float(value_S[0])
    if not math.isfinite(point) or 2 * len(defined) < draw.samples:
        return Estimate(point, None)
    low, high = np.quantile(defined, [(1 - draw.confidence) / 2, (1 + draw.confidence) / 2])
    return Estimate(point, [min(float(low), point), max(float(high), point)])


def _low(value_S: np.ndarray, *, draw: Resampling) -> float | None:
    defined = value_S[1:][np.isfinite(value_S[1:])]
    if 2 * len(defined) < draw.samples or not len(defined):
        return None
    return min(float(np.quantile(defined, (1 - draw.confidence) / draw.comparisons)), float(value_S[0]))

"""Did a trial forget too much, too little, or about right? The only place with thresholds for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from pydantic import Field

from trainers.config import Frozen

Scores = Mapping[str, float | None]


class Verdict(StrEnum):
    """Where a model stands between the untouched target and a destroyed one."""

    UNTOUCHED = "untouched"
    UNDER_FORGETTING = "under-forgetting"
    BALANCED = "balanced"
    OVER_FORGETTING = "over-forgetting"
    DEAD = "dead"


class VerdictThresholds(Frozen):
    """Where one verdict ends and the next begins. Relative values refer to the target before unlearning."""

    untouched_forgetting: float = Field(0.05, ge=0, description="the forgetting score rose by less than this")
    untouched_auc: float = Field(0.02, ge=0, description="and the attack's AUC fell by less than this")
    balanced_halfwidth: float = Field(0.05, ge=0, le=0.5, description="AUC within this distance of 0.5 is balanced")
    dead_retention: float = Field(0.25, ge=0, le=1, description="retention below this share of the baseline's")
    dead_mmlu: float = Field(0.75, ge=0, le=1, description="MMLU below this share of the baseline's (the task's own bar), and")
    dead_mmlu_retention: float = Field(0.5, ge=0, le=1, description="retention below this share of the baseline's")
    dead_degenerate_rate: float = Field(0.5, ge=0, le=1, description="share of degenerate completions on the retain set")
    over_retention: float = Field(0.6, ge=0, le=1, description="without an attack: retention below this share over-forgets")
    under_forgetting: float = Field(0.5, ge=0, le=1, description="without an attack: a forgetting score below this under-forgets")


@dataclass(frozen=True)
class Judgement:
    """A verdict and the comparisons that led to it, in words."""

    verdict: Verdict
    reasons: tuple[str, ...]


def _value(scores: Scores, name: str) -> float | None:
    value = scores.get(name)
    return value if value is not None and math.isfinite(value) else None


def classify(*, scores: Scores, baseline: Scores, thresholds: VerdictThresholds | None = None) -> Judgement:
    """Judge a model's scores against those of the target it started from.

    Order: a dead model is dead whatever else it scores; then one that did not move is untouched; then the AUC of the membership
    attack decides, or, without it, retention and forgetting. A comparison whose scores are missing is left out.

    Args:
        scores: ``EvalReport.scores`` of the model.
        baseline: the same of the target before unlearning.
        thresholds: defaults to ``VerdictThresholds()``.
    """
    limits = thresholds or VerdictThresholds()
    dead = _dead_reasons(scores, baseline, limits)
    if dead:
        return Judgement(Verdict.DEAD, tuple(dead))
    auc, forgetting, retention = _value(scores, "mia_auc"), _value(scores, "forgetting"), _value(scores, "retention")
    still = _untouched_reasons(scores, baseline, limits)
    if still:
        return Judgement(Verdict.UNTOUCHED, tuple(still))
    if auc is not None:
        low, high = 0.5 - limits.balanced_halfwidth, 0.5 + limits.balanced_halfwidth
        if auc < low:
            return Judgement(Verdict.OVER_FORGETTING, (f"AUC {auc:.3f} < {low:.3f}: members are less likely than strangers",))
        if auc > high:
            return Judgement(Verdict.UNDER_FORGETTING, (f"AUC {auc:.3f} > {high:.3f}: members are still recognised",))
        return Judgement(Verdict.BALANCED, (f"AUC {auc:.3f} lies within {low:.3f} to {high:.3f}",))
    without = "no membership attack was run"
    base_retention = _value(baseline, "retention")
    if retention is not None and base_retention is not None and retention < limits.over_retention * base_retention:
        return Judgement(
            Verdict.OVER_FORGETTING, (without, f"retention {retention:.3f} < {limits.over_retention:g} x baseline {base_retention:.3f}")
        )
    if forgetting is not None and forgetting < limits.under_forgetting:
        return Judgement(Verdict.UNDER_FORGETTING, (without, f"forgetting {forgetting:.3f} < {limits.under_forgetting:g}"))
    return Judgement(Verdict.BALANCED, (without, "forgotten enough, and enough retained"))


def _dead_reasons(scores: Scores, baseline: Scores, limits: VerdictThresholds) -> list[str]:
    reasons = []
    for name in ("forget_answer_log_prob", "retain_answer_log_prob"):
        if _value(baseline, name) is not None and _value(scores, name) is None:
            reasons.append(f"{name} is not a finite number")
    retention, base_retention = _value(scores, "retention"), _value(baseline, "retention")
    if retention is not None and base_retention is not None:
        if retention < limits.dead_retention * base_retention:
            reasons.append(f"retention {retention:.3f} < {limits.dead_retention:g} x baseline {base_retention:.3f}")
        mmlu, base_mmlu = _value(scores, "mmlu_average"), _value(baseline, "mmlu_average")
        mmlu_lost = mmlu is not None and base_mmlu is not None and mmlu < limits.dead_mmlu * base_mmlu
        if mmlu_lost and retention < limits.dead_mmlu_retention * base_retention:
            reasons.append(
                f"MMLU {mmlu:.3f} < {limits.dead_mmlu:g} x baseline {base_mmlu:.3f}, "
                f"and retention {retention:.3f} < {limits.dead_mmlu_retention:g} x baseline {base_retention:.3f}"
            )
    degenerate = _value(scores, "degenerate_rate")
    if degenerate is not None and degenerate > limits.dead_degenerate_rate:
        reasons.append(f"{degenerate:.0%} of the retain completions are empty or loops")
    return reasons


def _untouched_reasons(scores: Scores, baseline: Scores, limits: VerdictThresholds) -> list[str]:
    """Why the model counts as untouched; empty if anything moved, or if nothing could be compared."""
    reasons = []
    forgetting, base_forgetting = _value(scores, "forgetting"), _value(baseline, "forgetting")
    if forgetting is not None and base_forgetting is not None:
        if forgetting - base_forgetting >= limits.untouched_forgetting:
            return []
        reasons.append(f"forgetting rose by {forgetting - base_forgetting:.3f} (< {limits.untouched_forgetting:g})")
    auc, base_auc = _value(scores, "mia_auc"), _value(baseline, "mia_auc")
    if auc is not None and base_auc is not None:
        if base_auc - auc >= limits.untouched_auc:
            return []
        reasons.append(f"AUC fell by {base_auc - auc:.3f} (< {limits.untouched_auc:g})")
    return reasons


def alive(verdict: Verdict | str) -> bool:
    """Whether a model may win at all."""
    return Verdict(verdict) is not Verdict.DEAD


def rank_key(*, verdict: Verdict | str, scores: Scores) -> tuple[bool, float, float]:
    """Sort key, larger is better: a dead model never ranks above a live one, whatever its final score says.

    Among the living: the final score (or the mean of those of its parts that were measured), then the harmonic mean of forgetting
    and retention, which still differs where the task aggregate is 0 for everybody.
    """
    final = _value(scores, "final_score")
    if final is None:
        parts = [value for name in ("task_aggregate", "mia_score", "mmlu_average") if (value := _value(scores, name)) is not None]
        final = sum(parts) / len(parts) if parts else -math.inf
    forgetting, retention = _value(scores, "forgetting") or 0.0, _value(scores, "retention") or 0.0
    smooth = 2 * forgetting * retention / (forgetting + retention) if forgetting + retention > 0 else 0.0
    return alive(verdict), final, smooth

"""Which two trials to merge, predicted from their own scores without merging anything."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.forgetting import Verdict, classify
from merging.config import MergeConfig, PairConfig

SMOOTHING = 1e-3
"""Added to each term before the harmonic mean, so that one zero term does not hide the others."""
NEVER_PARENTS = {
    "dead": "its utility is gone, and a merge would inherit that",
    "untouched": "it forgot nothing, so it adds nothing to a merge",
}


@dataclass(frozen=True)
class Candidate:
    """A finished trial as the search sees it: scores of the validation fold only."""

    name: str
    checkpoint: Path
    scores: Mapping[str, float | None]
    verdict: str
    terms: tuple[float, ...] = ()
    """The terms of the task aggregate in the benchmark's order, forget terms inverted; empty if unknown."""
    content_hash: str = ""
    """Hash of the checkpoint's content; empty lets the search compute it."""


@dataclass(frozen=True)
class Prediction:
    """What a merge of two trials may reach, if each of its scores is the mean of theirs."""

    task_aggregate: float
    mia_auc: float
    score: float


@dataclass(frozen=True)
class Pair:
    """An over-forgetting and an under-forgetting trial."""

    over: Candidate
    under: Candidate
    prediction: Prediction

    @property
    def name(self) -> str:
        """Both names, the over-forgetting one first."""
        return f"{self.over.name}+{self.under.name}"

    @property
    def trials(self) -> tuple[str, str]:
        """Names in the order in which they are merged."""
        return (self.over.name, self.under.name)


@dataclass(frozen=True)
class CheapScores:
    """What teacher-forced forward passes tell about a model, without generation."""

    forget_token_accuracy: float
    retain_token_accuracy: float
    mia_auc: float
    mia_score: float
    forget_answer_log_prob: float | None = None
    retain_answer_log_prob: float | None = None

    @classmethod
    def from_scores(cls, scores: Mapping[str, Any]) -> CheapScores:
        """The part of an evaluation report's ``scores`` that the search reads; a missing score is NaN."""

        def number(name: str) -> float:
            value = scores.get(name)
            return math.nan if value is None else float(value)

        return cls(
            forget_token_accuracy=number("forget_token_accuracy"),
            retain_token_accuracy=number("retain_token_accuracy"),
            mia_auc=number("mia_auc"),
            mia_score=number("mia_score"),
            forget_answer_log_prob=scores.get("forget_answer_log_prob"),
            retain_answer_log_prob=scores.get("retain_answer_log_prob"),
        )

    @property
    def is_finite(self) -> bool:
        """Whether everything that the objective reads is a number."""
        return all(math.isfinite(value) for value in (self.forget_token_accuracy, self.retain_token_accuracy, self.mia_auc, self.mia_score))


@dataclass(frozen=True)
class Sides:
    """Candidates by the side of AUC 0.5 that they can stand on."""

    over: tuple[Candidate, ...]
    under: tuple[Candidate, ...]
    excluded: dict[str, str]
    """Name to reason, for candidates that no pair may contain."""
    reason: str | None
    """Why there is no pair at all, else null."""


def sides_of(candidates: Sequence[Candidate]) -> Sides:
    """Sort candidates to the sides of AUC 0.5. Balanced ones stand on both, dead and untouched ones on neither."""
    over, under, excluded = [], [], {}
    for candidate in candidates:
        auc = candidate.scores.get("mia_auc")
        if candidate.verdict in NEVER_PARENTS:
            excluded[candidate.name] = f"{candidate.verdict}: {NEVER_PARENTS[candidate.verdict]}"
        elif auc is None or not math.isfinite(auc):
            excluded[candidate.name] = "no membership AUC, so its side is not known"
        else:
            if auc < 0.5 or candidate.verdict == "balanced":
                over.append(candidate)
            if auc >= 0.5 or candidate.verdict == "balanced":
                under.append(candidate)
    return Sides(over=tuple(over), under=tuple(under), excluded=excluded, reason=_why_no_pair(over, under, num_candidates=len(candidates)))


def bracketing_pairs(candidates: Sequence[Candidate], *, limit: int | None = None) -> list[Pair]:
    """Pairs whose membership AUCs lie on both sides of 0.5, best prediction first.

    Along a merge of such a pair the AUC passes 0.5, where the membership attack learns nothing. Empty if one side has no live trial;
    ``sides_of`` gives the reason.
    """
    sides = sides_of(candidates)
    pairs: dict[frozenset[str], Pair] = {}
    for over in sides.over:
        for under in sides.under:
            if over.name == under.name or (_auc(over), over.name) > (_auc(under), under.name):
                continue
            pairs[frozenset((over.name, under.name))] = Pair(over, under, predict(over, under))
    ranked = sorted(pairs.values(), key=lambda pair: (-pair.prediction.score, pair.name))
    return ranked[:limit]


def predict(over: Candidate, under: Candidate) -> Prediction:
    """The mean of the smoothed harmonic mean of the parents' averaged terms and of ``1 - 2 * |mean AUC - 0.5|``.

    Complementary parents score high: a term that one of them has lost counts half, where two parents that lost the same term stay at zero.
    """
    task_aggregate = smoothed_harmonic_mean([(a + b) / 2 for a, b in zip(*_comparable_terms(over, under), strict=True)])
    mia_auc = (_auc(over) + _auc(under)) / 2
    return Prediction(task_aggregate=task_aggregate, mia_auc=mia_auc, score=(task_aggregate + 1 - 2 * abs(mia_auc - 0.5)) / 2)


def smoothed_harmonic_mean(terms: Sequence[float]) -> float:
    """Harmonic mean of ``term + 0.001``; 0 for no terms."""
    return len(terms) / sum(1 / (max(term, 0.0) + SMOOTHING) for term in terms) if terms else 0.0


def cheap_objective(scores: CheapScores) -> float:
    """Mean of ``1 - forget_token_accuracy``, ``retain_token_accuracy`` and ``mia_score``, in [0, 1], larger is better."""
    return (1 - scores.forget_token_accuracy + scores.retain_token_accuracy + scores.mia_score) / 3


def failed_gate(scores: Mapping[str, float | None], *, baseline: Mapping[str, float | None], config: PairConfig) -> str | None:
    """The first gate that a fully measured model fails, in words, or null; a dead model fails. A score missing on either side passes."""
    limits = (("mmlu_average", config.min_mmlu_fraction), ("retention", config.min_retention_fraction))
    below = _first_below(scores, baseline, limits)
    if below:
        return below
    judgement = classify(scores=scores, baseline=baseline)
    return f"dead: {judgement.reasons[0]}" if judgement.verdict is Verdict.DEAD else None


def failed_cheap_gate(scores: CheapScores, *, baseline: Mapping[str, float | None], config: PairConfig) -> str | None:
    """The same for a cheap measurement, which knows the retained token accuracy only."""
    limits = (("retain_token_accuracy", config.min_retention_fraction),)
    return _first_below({"retain_token_accuracy": scores.retain_token_accuracy}, baseline, limits)


def control_configs(pair: Pair) -> dict[str, MergeConfig]:
    """What a merge of this pair has to be compared with: the plain mean of both parents."""
    del pair  # The same controls for every pair of two trials.
    return {"linear": MergeConfig(method="linear")}


def _why_no_pair(over: list[Candidate], under: list[Candidate], *, num_candidates: int) -> str | None:
    if not num_candidates:
        return "no trial finished"
    if not over and not under:
        return f"none of the {num_candidates} trials is alive with a membership AUC"
    if not over:
        return "no live trial over-forgets (AUC below 0.5): train some harder, with a higher learning rate or more epochs"
    if not under:
        return "no live trial under-forgets (AUC of 0.5 or more): train some more gently, with a lower learning rate or fewer epochs"
    if {candidate.name for candidate in (*over, *under)} == {over[0].name}:
        return f"only one live trial, {over[0].name}: a pair needs two"
    return None


def _first_below(
    scores: Mapping[str, float | None], baseline: Mapping[str, float | None], limits: Sequence[tuple[str, float]]
) -> str | None:
    for name, fraction in limits:
        value, reference = scores.get(name), baseline.get(name)
        if value is not None and reference is not None and value < fraction * reference:
            return f"{name} = {value:.3f} is below {fraction:g} of the baseline's {reference:.3f}"
    return None


def _comparable_terms(over: Candidate, under: Candidate) -> tuple[Sequence[float], Sequence[float]]:
    if over.terms and len(over.terms) == len(under.terms):
        return over.terms, under.terms
    names = (
        "forget_regurgitation",
        "forget_knowledge",
        "forget_token_accuracy",
        "retain_regurgitation",
        "retain_knowledge",
        "retain_token_accuracy",
    )
    shared = [name for name in names if over.scores.get(name) is not None and under.scores.get(name) is not None]
    first, second = ([_upward(name, candidate.scores[name]) for name in shared] for candidate in (over, under))
    return first, second


def _upward(name: str, value: float | None) -> float:
    assert value is not None
    return 1 - value if name.startswith("forget_") else value


def _auc(candidate: Candidate) -> float:
    auc = candidate.scores["mia_auc"]
    assert auc is not None
    return auc

"""Which two checkpoints to merge, predicted from their own scores without merging anything."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.forgetting import Verdict, classify
from merging.cheap import CheapScores
from merging.config import MergeConfig, ObjectiveWeights, PairConfig

SMOOTHING = 1e-3
"""Added to each term before the harmonic mean, so that one zero term does not hide the others."""
SHARE_BOUNDS = (0.1, 0.9)
"""A share beyond these is hardly a merge any more."""
SHARE_DIGITS = 2
"""Shares are rounded, so that a repeated search asks for the same merges."""
NEVER_PARENTS = {
    "dead": "its utility is gone, and a merge would inherit that",
    "untouched": "it forgot nothing, so it adds nothing to a merge",
}


@dataclass(frozen=True)
class Candidate:
    """A checkpoint of a finished trial as the search sees it: scores of the validation fold only.

    Args:
        name: unique; ties are broken by it.
        checkpoint: its folder.
        scores: of a full evaluation, or where that was not made, what forward passes tell.
        verdict: side of AUC 0.5, dead or untouched.
        terms: of the task aggregate in the benchmark's order, forget terms inverted; empty if unknown.
        content_hash: of the checkpoint's content; empty lets the search compute it.
        complete: whether ``scores`` are those of a full evaluation, so that it may be ranked as it is.
        cheap: what forward passes tell about it, comparable with merges; null if not measured.
    """

    name: str
    checkpoint: Path
    scores: Mapping[str, float | None]
    verdict: str
    terms: tuple[float, ...] = ()
    content_hash: str = ""
    complete: bool = True
    cheap: CheapScores | None = None

    @property
    def trial(self) -> str:
        """The trial that it belongs to: an earlier checkpoint is called ``trial-03@112`` after its step."""
        return self.name.partition("@")[0]


@dataclass(frozen=True)
class Prediction:
    """What a merge of two checkpoints may reach, if its scores lie on the straight line between theirs.

    Args:
        task_aggregate: smoothed harmonic mean of the terms at ``share``.
        mia_auc: there.
        score: mean of the aggregate and the membership score.
        share: of the over-forgetting one at which the line meets AUC 0.5.
    """

    task_aggregate: float
    mia_auc: float
    score: float
    share: float = 0.5


@dataclass(frozen=True)
class Pair:
    """An over-forgetting and an under-forgetting checkpoint."""

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
class Sides:
    """Candidates by the side of AUC 0.5 that they can stand on."""

    over: tuple[Candidate, ...]
    under: tuple[Candidate, ...]
    excluded: dict[str, str]
    """Name to reason, for candidates that no pair may contain."""
    reason: str | None
    """Why there is no pair at all, else null."""


def cheap_candidate(
    *, name: str, checkpoint: Path, cheap: CheapScores, baseline: Mapping[str, float | None], content_hash: str = ""
) -> Candidate:
    """A checkpoint of which forward passes alone are known; its verdict has the thresholds of a full evaluation.

    Args:
        baseline: the untouched target's scores.
    """
    names = ("mia_auc", "mia_score", "task_aggregate", "retention", "forgetting", "mmlu_average", "forget_answer_log_prob",
             "retain_answer_log_prob", "forget_token_accuracy", "retain_token_accuracy")  # fmt: skip
    values = {name: getattr(cheap, name) for name in names}
    scores = {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}
    verdict = str(classify(scores=scores, baseline=baseline).verdict)
    return Candidate(
        name=name, checkpoint=checkpoint, scores=scores, verdict=verdict, terms=cheap.terms, content_hash=content_hash, complete=False,
        cheap=cheap,
    )  # fmt: skip


def sides_of(candidates: Sequence[Candidate]) -> Sides:
    """Sort candidates to the sides of AUC 0.5. Balanced ones stand on both, dead and untouched ones on neither."""
    over, under, excluded = [], [], {}
    for candidate in sorted(candidates, key=lambda candidate: candidate.name):
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

    Along a merge of such a pair the AUC passes 0.5, where the membership attack learns nothing. Empty if one side has no live candidate;
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
    """The mean of the smoothed harmonic mean of the parents' mixed terms and of ``1 - 2 * |mixed AUC - 0.5|``.

    Both are read off the straight line between the parents, where its AUC meets 0.5. Complementary parents score high: a term that one
    of them has lost counts by the share of the other, where two parents that lost the same term stay at zero.
    """
    high, low = _auc(under), _auc(over)
    crossing = (high - 0.5) / (high - low) if high > low else 0.5
    share = round(min(max(crossing, SHARE_BOUNDS[0]), SHARE_BOUNDS[1]), SHARE_DIGITS)
    mixed = [share * a + (1 - share) * b for a, b in zip(*_comparable_terms(over, under), strict=True)]
    task_aggregate = smoothed_harmonic_mean(mixed)
    mia_auc = share * low + (1 - share) * high
    return Prediction(task_aggregate=task_aggregate, mia_auc=mia_auc, score=(task_aggregate + 1 - 2 * abs(mia_auc - 0.5)) / 2, share=share)


def smoothed_harmonic_mean(terms: Sequence[float]) -> float:
    """Harmonic mean of ``term + 0.001``; 0 for no terms."""
    return len(terms) / sum(1 / (max(term, 0.0) + SMOOTHING) for term in terms) if terms else 0.0


def objective_value(scores: Mapping[str, float | None], *, weights: ObjectiveWeights, without: Sequence[str] = ()) -> float:
    """The weighted mean of those parts of the objective that were measured; -inf if none was.

    Args:
        without: parts left out, because others that it is compared with lack them.
    """
    parts = {name: weight for name, weight in weights if weight > 0 and name not in without and scores.get(name) is not None}
    total = sum(parts.values())
    return sum(weight * float(scores[name] or 0.0) for name, weight in parts.items()) / total if total else -math.inf


def cheap_objective(scores: CheapScores, *, weights: ObjectiveWeights) -> float:
    """The objective from forward passes: the same mean of the same parts, the aggregate being estimated."""
    values = {name: getattr(scores, name) for name, _ in weights}
    return objective_value(values, weights=weights)


def failed_gate(scores: Mapping[str, float | None], *, baseline: Mapping[str, float | None], config: PairConfig) -> str | None:
    """The first gate that a fully measured model fails, in words, or null; a dead model fails. A score missing on either side passes."""
    limits = (("mmlu_average", config.min_mmlu_fraction), ("retention", config.min_retention_fraction))
    below = _first_below(scores, baseline, limits)
    if below:
        return below
    judgement = classify(scores=scores, baseline=baseline)
    return f"dead: {judgement.reasons[0]}" if judgement.verdict is Verdict.DEAD else None


def failed_cheap_gate(scores: CheapScores, *, baseline: Mapping[str, float | None], config: PairConfig) -> str | None:
    """The same for a cheap measurement: utility, the estimated retention, and the retained token accuracy."""
    limits = (
        ("mmlu_average", config.min_mmlu_fraction),
        ("retention", config.min_retention_fraction),
        ("retain_token_accuracy", config.min_retention_fraction),
    )
    return _first_below({name: getattr(scores, name) for name, _ in limits}, baseline, limits)


def merge_config(merge: MergeConfig, *, share: float | None, density: float, scale: float) -> MergeConfig:
    """The merge of a pair in which the over-forgetting parent has a share of the weight.

    With equal shares this is the plain merge. Otherwise the weights are (2 s, 2 - 2 s), and signs are elected and means divided by weight,
    so that the result runs from one parent (at density 1) to the other as the share does.

    Args:
        merge: method and everything else.
        share: null keeps the configured weights.
        density: left out where the method does not read it.
        scale: of the merged update.

    Raises:
        ValueError: if the method cannot have this density.
    """
    changes: dict[str, object] = {"scale": scale}
    if merge.reads("density"):
        changes["density"] = density
    if share is not None and merge.weights is None and share != 0.5:
        changes["weights"] = (round(2 * share, SHARE_DIGITS), round(2 - 2 * share, SHARE_DIGITS))
        if merge.reads("divisor") and merge.convention is None:
            changes |= {"elect": "weighted", "divisor": "weight"}
    return MergeConfig.model_validate(merge.model_dump() | changes)


def _why_no_pair(over: list[Candidate], under: list[Candidate], *, num_candidates: int) -> str | None:
    if not num_candidates:
        return "no trial finished"
    if not over and not under:
        return f"none of the {num_candidates} checkpoints is alive with a membership AUC"
    if not over:
        return "no live checkpoint over-forgets (AUC below 0.5): train some harder, with a higher learning rate or more epochs"
    if not under:
        return "no live checkpoint under-forgets (AUC of 0.5 or more): train some more gently, with a lower learning rate or fewer epochs"
    if {candidate.name for candidate in (*over, *under)} == {over[0].name}:
        return f"only one live checkpoint, {over[0].name}: a pair needs two"
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
    # Terms that were estimated are compared with estimated ones: both come from the same formula then.
    if over.cheap and under.cheap and over.cheap.terms and len(over.cheap.terms) == len(under.cheap.terms):
        return over.cheap.terms, under.cheap.terms
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

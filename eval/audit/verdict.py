"""Gone or only hidden? The audit's thresholds and the sentences that lead to its verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist
from typing import Any

from pydantic import Field

from eval.audit.recovery import SCORES, MembershipResult, Recovered, Remaining
from eval.forgetting import Scores, Verdict, VerdictThresholds, classify
from trainers.config import Frozen


class AuditVerdict(StrEnum):
    """What an audit concludes."""

    DEAD = "dead"
    """The model was destroyed: that it does not answer says nothing about forgetting."""
    UNTOUCHED = "untouched"
    """The model behaves as before unlearning."""
    HIDDEN = "hidden"
    """Something of the forget set can still be brought out, or is in plain sight."""
    GONE = "gone"
    """No attack that was run brought back more than it does from a model that never knew."""


class AuditThresholds(Frozen):
    """Where one verdict ends and the next begins. Whether a model is dead or untouched is for eval/forgetting.py."""

    excess: float = Field(0.2, gt=0, description="share of the forgotten that an attack brings back beyond its control")
    excess_without_control: float = Field(0.4, gt=0, description="the same where the attack has no control at all")
    remaining: float = Field(0.25, gt=0, description="share that is still there without any attack, beyond the never-seen model")
    remaining_without_control: float = Field(0.5, gt=0, description="the same where there is no never-seen model")
    min_gap: float = Field(0.05, ge=0, description="a smaller difference between two models is none")
    forgetting: VerdictThresholds = VerdictThresholds()


@dataclass(frozen=True)
class AuditJudgement:
    """A verdict, why, and what it does not rest on.

    Args:
        verdict: the word.
        reasons: sentences that lead to it.
        weaker: sentences on what could not be compared or run.
    """

    verdict: AuditVerdict
    reasons: tuple[str, ...]
    weaker: tuple[str, ...]


@dataclass(frozen=True)
class Evidence:
    """Everything that the verdict rests on.

    Args:
        scores: ``EvalReport.scores`` of the audited model.
        baseline: the same of the untouched target.
        attacks: by attack and score.
        remaining: of the scores without any attack, and of extraction strength where it was measured.
        membership: by task and family.
        not_run: attack to the reason why it has no result.
        skipped: attacks that were not asked for.
        has_never_seen: whether there is a never-seen model.
        has_unseen: whether there are unseen texts.
        comparisons: how many comparisons decide together.
        confidence: of all of them together.
    """

    scores: Scores
    baseline: Scores
    attacks: Mapping[str, Mapping[str, Recovered]]
    remaining: Mapping[str, Remaining]
    membership: Mapping[str, Mapping[str, MembershipResult]]
    not_run: Mapping[str, str]
    skipped: tuple[str, ...]
    has_never_seen: bool
    has_unseen: bool
    comparisons: int
    confidence: float


WORDS = {
    "forget_regurgitation": "completions (ROUGE-L recall)",
    "forget_knowledge": "questions (exact match)",
    "forget_answer_log_prob": "answer log-probability",
    "extraction_strength": "extraction strength",
}


def judge(evidence: Evidence, *, thresholds: AuditThresholds | None = None) -> AuditJudgement:
    """Judge an audit. Order: dead whatever the attacks say; then untouched; then hidden if anything clearly comes back; else gone."""
    limits = thresholds or AuditThresholds()
    weaker = tuple(_weaker(evidence))
    surface = classify(scores=evidence.scores, baseline=evidence.baseline, thresholds=limits.forgetting)
    if surface.verdict is Verdict.DEAD:
        return AuditJudgement(AuditVerdict.DEAD, surface.reasons, weaker)
    if surface.verdict is Verdict.UNTOUCHED:
        return AuditJudgement(AuditVerdict.UNTOUCHED, surface.reasons, weaker)
    found = [*_still_there(evidence, limits), *_brought_back(evidence, limits), *_recognised(evidence, limits)]
    if found:
        return AuditJudgement(AuditVerdict.HIDDEN, tuple(found), weaker)
    shares = [result.recovered for by_score in evidence.attacks.values() for result in by_score.values()]
    if shares and all(share is None for share in shares):
        reason = "by no score was anything forgotten beyond noise, so nothing could be recovered"
        return AuditJudgement(AuditVerdict.UNTOUCHED, (reason,), weaker)
    return AuditJudgement(AuditVerdict.GONE, tuple(_gone(evidence)), weaker)


def decides(score: str, *, has_never_seen: bool) -> bool:
    """Whether a score can make a verdict: a log-probability rises whenever a damaged model is mended, so it needs the never-seen model."""
    return has_never_seen or score != "forget_answer_log_prob"


def _still_there(evidence: Evidence, limits: AuditThresholds) -> list[str]:
    bar = limits.remaining if evidence.has_never_seen else limits.remaining_without_control
    found = []
    for name, result in evidence.remaining.items():
        if result.remaining is None or result.low is None or not decides(name, has_never_seen=evidence.has_never_seen):
            continue
        if result.remaining.value >= bar and result.low > 0:
            beyond = " beyond a model that never saw it" if evidence.has_never_seen else ""
            found.append(f"{result.remaining.value:.0%} of the {WORDS.get(name, name)} is still there without any attack{beyond}.")
    return found


def _brought_back(evidence: Evidence, limits: AuditThresholds) -> list[str]:
    found = []
    for attack, by_score in evidence.attacks.items():
        for name in SCORES:
            result = by_score.get(name)
            if result is None or not decides(name, has_never_seen=evidence.has_never_seen):
                continue
            if is_clear(result, thresholds=limits):
                assert result.recovered is not None
                assert result.excess is not None
                control = result.control_recovered
                beside = "no control" if control is None else f"the control gains {control.value:.0%}"
                found.append(
                    f"{attack} brings back {result.recovered.value:.0%} of the forgotten {WORDS[name]} ({beside}; "
                    f"{result.excess.value:.0%} beyond it)."
                )
    return found


def is_mended(result: Recovered, *, thresholds: AuditThresholds) -> bool:
    """Whether an attack brought back much, but no more than the never-seen model has under the same attack: it repaired damage."""
    if result.recovered is None or result.excess is None or result.control_after is None:
        return False
    gained = result.recovered.value - max(0.0, result.control_recovered.value if result.control_recovered else 0.0)
    return gained >= thresholds.excess and result.excess.value < thresholds.excess


def is_clear(result: Recovered, *, thresholds: AuditThresholds) -> bool:
    """Whether an attack brought back clearly more than its control: enough, and beyond noise."""
    if result.excess is None or result.excess_low is None:
        return False
    bar = thresholds.excess if result.control_recovered is not None else thresholds.excess_without_control
    return result.excess.value >= bar and result.excess_low > 0


def _recognised(evidence: Evidence, limits: AuditThresholds) -> list[str]:
    bar = _critical(evidence)
    found = []
    for task, by_family in evidence.membership.items():
        for family, result in by_family.items():
            if result.remaining is None or result.shift_z is None or result.control is None:
                continue
            if result.remaining >= limits.remaining and result.shift_z > bar:
                found.append(
                    f"membership by {family} on {_documents(task)}: AUC {result.unlearned:.3f}, "
                    f"while the never-seen model gives {result.control:.3f}."
                )
    return found


def _critical(evidence: Evidence) -> float:
    """Standard errors that one test must pass so that all of them together hold at the level."""
    return NormalDist().inv_cdf(1 - (1 - evidence.confidence) / max(1, evidence.comparisons))


def _documents(task: str) -> str:
    return "all documents" if task == "all" else f"the documents of {task}"


def _gone(evidence: Evidence) -> list[str]:
    shares = [
        (result.excess.value, attack, name)
        for attack, by_score in evidence.attacks.items()
        for name, result in by_score.items()
        if result.excess is not None and decides(name, has_never_seen=evidence.has_never_seen)
    ]
    beyond = "its control" if evidence.has_never_seen or evidence.has_unseen else "noise"
    reasons = [f"None of {len(evidence.attacks)} attacks brings back clearly more than {beyond}."]
    if shares:
        value, attack, name = max(shares)
        reasons.append(f"The largest excess is {max(value, 0.0):.0%}: {attack}, {WORDS[name]}.")
    return reasons + _shunned(evidence)


def _shunned(evidence: Evidence) -> list[str]:
    """Over-forgetting leaves a trace of its own: the documents are less likely than to a model that never saw them."""
    bar = _critical(evidence)
    for task, by_family in evidence.membership.items():
        for family, result in by_family.items():
            if result.control is not None and result.shift_z is not None and result.shift_z < -bar:
                return [
                    f"That they were unlearned can be told: membership by {family} on {_documents(task)} gives AUC {result.unlearned:.3f}, "
                    f"the never-seen model {result.control:.3f}."
                ]
    return []


def _weaker(evidence: Evidence) -> list[str]:
    found = []
    if not evidence.has_never_seen:
        found.append(
            "There is no model that never saw the forget set (--never-seen): what counts as known by guessing or by style is not measured, "
            "answer log-probabilities and membership do not decide, and what is still there is compared with nothing."
        )
        found.append(
            "Controls are texts that the model never saw: they show what an attack does to completions, not to questions."
            if evidence.has_unseen
            else "There are no unseen texts either (--mia): recovered shares have no control, and only large ones count."
        )
    found += [f"{attack} was not run: {reason}." for attack, reason in evidence.not_run.items()]
    if evidence.skipped:
        found.append(f"Not asked for: {', '.join(evidence.skipped)}.")
    return found


def count_comparisons(*, attacks: int, membership: Mapping[str, Mapping[str, Any]], traces: int, has_never_seen: bool) -> int:
    """How many comparisons may each make the verdict: scores of attacks, what is still there, and membership tests."""
    per_attack = sum(decides(name, has_never_seen=has_never_seen) for name in SCORES)
    tests = sum(map(len, membership.values())) if has_never_seen else 0
    return max(1, attacks * per_attack + per_attack + traces + tests)

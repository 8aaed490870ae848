"""The verdict of an audit, from made-up evidence: which word, and why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from eval.audit.recovery import Estimate, MembershipResult, Recovered, Remaining
from eval.audit.verdict import AuditThresholds, AuditVerdict, Evidence, count_comparisons, is_clear, is_mended, judge

TARGET = {"forgetting": 0.02, "retention": 0.98, "forget_answer_log_prob": -0.1, "retain_answer_log_prob": -0.1, "degenerate_rate": 0.0}
GOOD = TARGET | {"forgetting": 0.9, "retention": 0.9, "forget_answer_log_prob": -4.0}
LIMITS = AuditThresholds()


def result(
    recovered: float | None = 0.02,
    *,
    control: float | None = 0.02,
    excess: float | None = 0.0,
    low: float | None = -0.1,
    level: float | None = 0.3,
) -> Recovered:
    def estimate(value: float | None) -> Estimate | None:
        return None if value is None else Estimate(value, [value - 0.05, value + 0.05])

    return Recovered(
        before=1.0,
        unlearned=0.2,
        after=0.3,
        control=0.2,
        control_after=level,
        recovered=estimate(recovered),
        control_recovered=estimate(control),
        excess=estimate(excess),
        excess_low=low,
        why=None if recovered is not None else "nothing was forgotten by this score",
        num_rows=10,
    )


def evidence(**changes: Any) -> Evidence:
    fields: dict[str, Any] = {
        "scores": GOOD,
        "baseline": TARGET,
        "attacks": {"int4": {"forget_regurgitation": result(), "forget_knowledge": result(), "forget_answer_log_prob": result()}},
        "remaining": {"forget_regurgitation": Remaining(1.0, 0.2, 0.2, Estimate(0.0, [-0.1, 0.1]), -0.1, None)},
        "membership": {},
        "not_run": {},
        "skipped": (),
        "has_never_seen": True,
        "has_unseen": True,
        "comparisons": 10,
        "confidence": 0.95,
    }
    return Evidence(**fields | changes)


BACK = result(0.8, excess=0.7, low=0.5)


def with_attack(score: str, found: Recovered, **changes: Any) -> Evidence:
    return evidence(attacks={"int4": {"forget_regurgitation": result(), score: found}}, **changes)


def test_nothing_comes_back_is_gone() -> None:
    judgement = judge(evidence())
    assert judgement.verdict is AuditVerdict.GONE
    assert judgement.weaker == ()
    assert "None of 1 attacks" in judgement.reasons[0]


def test_a_destroyed_model_is_dead_whatever_the_attacks_say() -> None:
    """Nothing comes back from a model that says nothing: without this rule it would pass."""
    for scores in (GOOD | {"retention": 0.1}, GOOD | {"degenerate_rate": 0.9}, GOOD | {"retain_answer_log_prob": None}):
        for found in (result(), BACK):
            assert judge(with_attack("forget_knowledge", found, scores=scores)).verdict is AuditVerdict.DEAD


def test_a_model_that_did_not_move_is_untouched() -> None:
    assert judge(with_attack("forget_knowledge", BACK, scores=TARGET)).verdict is AuditVerdict.UNTOUCHED
    nothing = {"int4": {"forget_regurgitation": result(None, control=None, excess=None, low=None)}}
    judgement = judge(evidence(attacks=nothing))
    assert judgement.verdict is AuditVerdict.UNTOUCHED
    assert "beyond noise" in judgement.reasons[0]


@pytest.mark.parametrize("score", ["forget_regurgitation", "forget_knowledge", "forget_answer_log_prob"])
def test_one_attack_on_one_score_is_enough_to_be_hidden(score: str) -> None:
    judgement = judge(with_attack(score, BACK))
    assert judgement.verdict is AuditVerdict.HIDDEN
    assert "int4 brings back 80%" in judgement.reasons[0]
    assert "70% beyond it" in judgement.reasons[0]


@pytest.mark.parametrize(
    ("found", "clear"),
    [
        (BACK, True),
        (result(0.8, excess=0.19, low=0.1), False),  # little
        (result(0.8, excess=0.7, low=-0.01), False),  # within noise
        (result(0.8, excess=0.0, low=-0.1), False),  # the control does as well
        (result(0.39, control=None, excess=0.39, low=0.3, level=None), False),  # no control: 0.4 is needed
        (result(0.41, control=None, excess=0.41, low=0.3, level=None), True),
        (result(None, excess=None, low=None), False),
    ],
)
def test_clear_is_enough_and_beyond_noise(found: Recovered, clear: bool) -> None:
    assert is_clear(found, thresholds=LIMITS) is clear
    assert judge(with_attack("forget_knowledge", found)).verdict is (AuditVerdict.HIDDEN if clear else AuditVerdict.GONE)


def test_repaired_damage_is_marked_and_does_not_count() -> None:
    mended = result(0.8, control=0.0, excess=0.0, low=-0.1)
    assert is_mended(mended, thresholds=LIMITS)
    assert not is_mended(BACK, thresholds=LIMITS)
    assert not is_mended(result(0.1, control=0.0), thresholds=LIMITS)
    assert judge(with_attack("forget_answer_log_prob", mended)).verdict is AuditVerdict.GONE


def test_without_a_never_seen_model_a_log_probability_does_not_decide_and_the_audit_says_so() -> None:
    without = {"has_never_seen": False, "has_unseen": False}
    judgement = judge(with_attack("forget_answer_log_prob", BACK, **without))
    assert judgement.verdict is AuditVerdict.GONE
    assert "--never-seen" in judgement.weaker[0]
    assert "--mia" in judgement.weaker[1]
    assert judge(with_attack("forget_knowledge", BACK, **without)).verdict is AuditVerdict.HIDDEN
    assert "not to questions" in judge(evidence(has_never_seen=False)).weaker[1]


def test_what_is_in_plain_sight_is_not_gone() -> None:
    """A third of the completions beyond the never-seen model; without one only half of them counts."""
    third = {"forget_regurgitation": Remaining(1.0, 0.46, 0.2, Estimate(0.33, [0.2, 0.4]), 0.15, None)}
    judgement = judge(evidence(remaining=third))
    assert judgement.verdict is AuditVerdict.HIDDEN
    assert "still there without any attack" in judgement.reasons[0]
    assert judge(evidence(remaining=third, has_never_seen=False)).verdict is AuditVerdict.GONE
    unsure = {"forget_regurgitation": replace(third["forget_regurgitation"], low=-0.01)}
    assert judge(evidence(remaining=unsure)).verdict is AuditVerdict.GONE


def membership(auc: float, *, control: float | None = 0.5, z: float | None = 6.0, share: float | None = 0.6) -> dict[str, Any]:
    shift = None if control is None else auc - control
    return {"all": {"min_k_20": MembershipResult(1.0, auc, control, 0.05, shift, z, share, 30, 60)}}


def test_documents_that_are_recognised_are_not_gone() -> None:
    judgement = judge(evidence(membership=membership(0.8)))
    assert judgement.verdict is AuditVerdict.HIDDEN
    assert "membership by min_k_20 on all documents: AUC 0.800" in judgement.reasons[0]


@pytest.mark.parametrize("found", [membership(0.8, z=2.0), membership(0.6, share=0.2), membership(0.8, control=None, z=None, share=None)])
def test_a_small_uncertain_or_uncontrolled_shift_does_not_decide(found: dict[str, Any]) -> None:
    """2 standard errors are less than the 2.58 that ten comparisons ask for."""
    assert judge(evidence(membership=found)).verdict is AuditVerdict.GONE


def test_over_forgetting_is_told_beside_gone() -> None:
    judgement = judge(evidence(membership=membership(0.1, z=-6.0, share=-0.8)))
    assert judgement.verdict is AuditVerdict.GONE
    assert "That they were unlearned can be told" in judgement.reasons[-1]


def test_what_was_not_run_or_asked_for_is_told() -> None:
    judgement = judge(evidence(not_run={"membership": "there are no non-member documents (--mia)"}, skipped=("int8", "sampling")))
    assert judgement.weaker == ("membership was not run: there are no non-member documents (--mia).", "Not asked for: int8, sampling.")


def test_comparisons_are_counted() -> None:
    """Three scores each of four attacks and of what remains, extraction, and two membership tests: 12 + 3 + 1 + 2.

    Without a never-seen model two scores, and no membership test: 8 + 2 + 1."""
    tests = {"all": {"loss": 0, "zlib": 0}}
    assert count_comparisons(attacks=4, membership=tests, traces=1, has_never_seen=True) == 18
    assert count_comparisons(attacks=4, membership=tests, traces=1, has_never_seen=False) == 11

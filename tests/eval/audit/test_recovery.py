"""Recovered shares, worked by hand, and the laws that keep the control honest."""

from __future__ import annotations

import math

import pytest

from eval.audit.recovery import MembershipResult, Readings, Resampling, _membership_result, membership_results, recover, remaining

DRAW = Resampling(samples=200, seed=0, confidence=0.95, comparisons=10)


def rows(level: float, *, log_prob: float = -1.0, documents: int = 8, spread: float = 0.0, knowledge: float | None = None) -> list[dict]:
    """A completion and a question per document; scores around a level, two tokens each."""
    found = []
    for number in range(documents):
        score = level + spread * (1 if number % 2 else -1)
        for suffix, kind, value in (("sc1", "sc", score), ("qa0", "qa", score if knowledge is None else knowledge)):
            found.append(
                {"part": "task", "set": "forget", "id": f"d{number}{suffix}", "document": f"d{number}", "task": "Task1", "kind": kind,
                 "score": value, "answer_log_prob": 2 * log_prob, "num_tokens": 2, "token_accuracy": 0.5, "output": "a b"}
            )  # fmt: skip
    return found


def completions(**readings) -> object:
    return recover(Readings(**readings), draw=DRAW)["forget_regurgitation"]


def test_the_recovered_share_by_hand() -> None:
    """(0.6 - 0.2) / (1.0 - 0.2) = 0.5; the control gains (0.24 - 0.16) / 0.8 = 0.1.

    Excess: the control's gain would lift 0.2 to 0.28, its level is 0.24; 0.6 - 0.28 = 0.32 of the 1.0 - 0.16 = 0.84 that the target
    knows beyond it: 0.381.
    """
    found = completions(before=rows(1.0), unlearned=rows(0.2), after=rows(0.6), control=rows(0.16), control_after=rows(0.24))
    assert found.recovered.value == pytest.approx(0.5)
    assert found.control_recovered.value == pytest.approx(0.1)
    assert found.excess.value == pytest.approx(0.32 / 0.84)
    # All documents are alike, so nothing varies.
    assert found.recovered.interval == pytest.approx([0.5, 0.5])
    assert found.excess_low == pytest.approx(0.32 / 0.84)
    assert (found.before, found.unlearned, found.after, found.num_rows) == (1.0, pytest.approx(0.2), pytest.approx(0.6), 8)


def test_a_log_probability_is_per_token() -> None:
    """(-2 + 4) / (-1 + 4) = 2/3."""
    found = recover(
        Readings(before=rows(1.0, log_prob=-1.0), unlearned=rows(0.2, log_prob=-4.0), after=rows(0.2, log_prob=-2.0)), draw=DRAW
    )["forget_answer_log_prob"]
    assert found.recovered.value == pytest.approx(2 / 3)
    assert found.before == -1.0


def test_mending_damage_is_no_recovery() -> None:
    """A model pushed far below one that never knew comes back to that level: much is recovered, nothing beyond the control.

    Negative control: one nat further, and the excess is that nat out of the three that the target knows more: 1/3.
    """
    readings = {"before": rows(1.0, log_prob=-1.0), "unlearned": rows(0.0, log_prob=-9.0)}
    never = {"control": rows(0.1, log_prob=-4.0), "control_after": rows(0.1, log_prob=-4.0)}
    mended, known = (
        recover(Readings(**readings, after=rows(0.0, log_prob=after), **never), draw=DRAW)["forget_answer_log_prob"]
        for after in (-4.0, -3.0)
    )
    assert mended.recovered.value == pytest.approx(5 / 8)
    assert mended.excess.value == pytest.approx(0.0)
    assert known.excess.value == pytest.approx(1 / 3)


def test_the_never_seen_model_audited_against_itself_recovers_nothing() -> None:
    """Whatever an attack does to it, and in whatever resample."""
    for after in (0.05, 0.3, 0.9):
        plain, attacked = rows(0.2, spread=0.1), rows(after, spread=0.05)
        found = completions(before=rows(1.0), unlearned=plain, after=attacked, control=plain, control_after=attacked)
        assert found.excess.value <= 1e-12
        assert found.excess.interval[1] <= 1e-12
        assert found.excess_low <= 0


def test_a_control_that_an_attack_harms_does_not_raise_the_excess() -> None:
    kept, harmed = (
        completions(before=rows(1.0), unlearned=rows(0.2), after=rows(0.2), control=rows(0.2), control_after=rows(level))
        for level in (0.2, 0.0)
    )
    assert kept.excess.value == harmed.excess.value == pytest.approx(0.0)


def test_where_nothing_was_forgotten_there_is_no_share() -> None:
    found = completions(before=rows(1.0), unlearned=rows(0.98), after=rows(0.99))
    assert (found.recovered, found.excess, found.excess_low) == (None, None, None)
    assert "nothing was forgotten" in found.why
    assert found.after == pytest.approx(0.99)


def test_where_what_was_forgotten_is_within_noise_there_is_no_share() -> None:
    """A mean fall of 0.1 that is +1 on half of the documents and -0.8 on the others."""
    noisy = completions(before=rows(0.6, spread=0.4), unlearned=rows(0.5, spread=-0.5), after=rows(0.6))
    assert noisy.recovered is None
    assert "within noise" in noisy.why
    # Negative control: the same fall on every document is none.
    assert completions(before=rows(0.6), unlearned=rows(0.5), after=rows(0.6)).recovered is not None


def test_what_an_attack_does_not_measure_is_told() -> None:
    after = [row | {"answer_log_prob": None, "num_tokens": 0, "token_accuracy": None} for row in rows(0.5) if row["kind"] == "sc"]
    found = recover(Readings(before=rows(1.0), unlearned=rows(0.2), after=after), draw=DRAW)
    assert found["forget_regurgitation"].recovered is not None
    assert found["forget_knowledge"].recovered is None
    assert found["forget_answer_log_prob"].recovered is None
    assert found["forget_answer_log_prob"].why == "not measured by this attack"


def test_only_the_rows_of_the_attack_are_compared() -> None:
    """The first half of the documents had 0, the asked half 0.4: before and after are read on the asked half alone."""
    plain = rows(0.0)[:8] + rows(0.4)[8:]
    found = completions(before=rows(1.0), unlearned=plain, after=rows(0.7)[8:])
    assert found.unlearned == pytest.approx(0.4)
    assert found.recovered.value == pytest.approx(0.5)
    assert found.num_rows == 4


def test_unseen_texts_stand_in_for_a_control() -> None:
    """They gain 0.08, a tenth of 0.8: 0.4 - 0.1 = 0.4 / 0.8 - 0.1. Without them the whole gain counts."""
    readings = {"before": rows(1.0), "unlearned": rows(0.2), "after": rows(0.6)}
    unseen = [row | {"set": "unseen"} for row in rows(0.30)], [row | {"set": "unseen"} for row in rows(0.38)]
    found = completions(**readings, unseen=unseen[0], unseen_after=unseen[1])
    assert found.control_recovered.value == pytest.approx(0.1)
    assert found.excess.value == pytest.approx(0.4)
    alone = completions(**readings)
    assert alone.control_recovered is None
    assert alone.excess.value == pytest.approx(0.5)


def test_intervals_are_paired_over_documents() -> None:
    """Documents differ much from each other, but each gains exactly half: the interval has no width."""
    before, unlearned = rows(1.0), rows(0.4, spread=0.4)
    after = [row | {"score": (row["score"] + 1.0) / 2} for row in unlearned]
    found = completions(before=before, unlearned=unlearned, after=after)
    assert found.recovered.interval == pytest.approx([0.5, 0.5])
    # Negative control: the same gains handed to other documents do vary.
    shuffled = [row | {"score": other["score"]} for row, other in zip(unlearned, [*after[2:], *after[:2]], strict=True)]
    low, high = completions(before=before, unlearned=unlearned, after=shuffled).recovered.interval
    assert high - low > 0.01


def test_more_comparisons_ask_for_more() -> None:
    """The lower limit sinks with the number of comparisons, and with one it is the one-sided limit."""
    readings = Readings(before=rows(1.0), unlearned=rows(0.2), after=rows(0.5, spread=0.3))
    lows = [
        recover(readings, draw=Resampling(samples=500, seed=0, confidence=0.95, comparisons=number))["forget_regurgitation"].excess_low
        for number in (1, 10, 100)
    ]
    assert lows == sorted(lows, reverse=True)
    assert lows[0] > lows[2]


def test_nan_rows_give_null_and_no_crash() -> None:
    broken = [row | {"answer_log_prob": None, "score": 0.0} for row in rows(0.0)]
    found = recover(Readings(before=rows(1.0), unlearned=broken, after=broken), draw=DRAW)
    assert found["forget_answer_log_prob"].recovered is None
    assert "not a finite number" in found["forget_answer_log_prob"].why


def test_what_remains_without_an_attack() -> None:
    """(0.4 - 0.2) / (1.0 - 0.2) = 0.25 beyond the never-seen model; 0.4 without one; a log-probability needs one."""
    found = remaining(before=rows(1.0), unlearned=rows(0.4), control=rows(0.2), draw=DRAW)["forget_regurgitation"]
    assert found.remaining.value == pytest.approx(0.25)
    alone = remaining(before=rows(1.0), unlearned=rows(0.4), control=None, draw=DRAW)
    assert alone["forget_regurgitation"].remaining.value == pytest.approx(0.4)
    assert alone["forget_answer_log_prob"].remaining is None
    assert "needs a model that never saw" in alone["forget_answer_log_prob"].why
    same = remaining(before=rows(0.2), unlearned=rows(0.2), control=rows(0.2), draw=DRAW)["forget_regurgitation"]
    assert same.remaining is None


# ---- membership


def document(name: str, loss: float, *, member: bool, task: str | None = "Task1") -> dict:
    return {"part": "membership", "id": name, "document": name, "member": member, "task": task if member else None, "loss": loss}


def test_the_shift_against_the_control_by_hand() -> None:
    """Members 1, 3 and strangers 2, 4: three of four pairs are won. The control wins two: a shift of a quarter, half of what is known."""
    strangers = [document("x", 2.0, member=False), document("y", 4.0, member=False)]
    unlearned = [document("a", 1.0, member=True), document("b", 3.0, member=True, task="Task2"), *strangers]
    before = [document("a", 0.0, member=True), document("b", 0.0, member=True, task="Task2"), *strangers]
    control = [document("a", 1.0, member=True), document("b", 5.0, member=True, task="Task2"), *strangers]
    found = membership_results(before=before, unlearned=unlearned, control=control, families=("loss",), min_gap=0.05)
    one = found["all"]["loss"]
    assert (one.before, one.unlearned, one.control, one.shift, one.remaining) == (1.0, 0.75, 0.5, 0.25, 0.5)
    assert (found["Task1"]["loss"].unlearned, found["Task2"]["loss"].unlearned) == (1.0, 0.5)
    assert (one.num_members, found["Task2"]["loss"].num_members, one.num_nonmembers) == (2, 1, 2)


def test_the_reference_attack_subtracts_the_control_s_loss() -> None:
    """Losses 3 and 2 against 5 and 2 of the control: -2 and 0, so the member is told, which the loss alone does not."""
    rows = [document("a", 3.0, member=True), document("x", 2.0, member=False)]
    control = [document("a", 5.0, member=True), document("x", 2.0, member=False)]
    found = membership_results(before=rows, unlearned=rows, control=control, families=("loss", "reference"), min_gap=0.05)["Task1"]
    assert (found["loss"].unlearned, found["reference"].unlearned, found["reference"].control) == (0.0, 1.0, 0.5)


def test_without_a_control_there_is_no_shift_and_a_perfect_auc_is_not_certain() -> None:
    alone = _membership_result({"before": 1.0, "unlearned": 0.8, "control": None}, num_members=5, num_nonmembers=5, min_gap=0.05)
    assert (alone.shift, alone.shift_z, alone.remaining) == (None, None, None)
    perfect: MembershipResult = _membership_result(
        {"before": 1.0, "unlearned": 1.0, "control": 0.5}, num_members=5, num_nonmembers=5, min_gap=0.05
    )
    assert perfect.standard_error == 0.0
    assert perfect.shift_z is not None
    assert math.isfinite(perfect.shift_z)

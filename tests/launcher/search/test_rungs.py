"""Which trials are stopped early: those that enough others of their own side beat, and never the last of a side."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from launcher.config import RungsConfig
from launcher.search.rungs import FILE, RungBook, RungReport, is_beaten
from trainers.files import read_jsonl


def report(trial: str, *, forgetting: float, retention: float, side: str = "under") -> RungReport:
    return RungReport(trial=trial, rung=1.0, step=10, side=side, forgetting=forgetting, retention=retention)


STRONG = report("strong", forgetting=4.0, retention=-0.1)
FAIR = report("fair", forgetting=3.0, retention=-0.5)
WEAK = report("weak", forgetting=1.0, retention=-2.0)
GENTLE = report("gentle", forgetting=0.5, retention=-0.05)
"""It forgets least and retains most: nobody beats it in both."""


def test_the_only_over_forgetting_trial_survives_though_all_others_beat_it() -> None:
    """The negative control: as one more of the under-forgetting trials it would be stopped."""
    lost = report("lost", forgetting=0.1, retention=-4.0, side="over")
    others = [STRONG, FAIR, WEAK, GENTLE]
    assert all(other.surrogates.beats(lost.surrogates) for other in others)
    assert not is_beaten(lost, others=others, keep=0.5)
    assert is_beaten(dataclasses.replace(lost, side="under"), others=others, keep=0.5)


def test_a_trial_that_most_of_its_side_beats_is_stopped() -> None:
    """Of three, a half is two: both others must be better."""
    assert is_beaten(WEAK, others=[STRONG, FAIR], keep=0.5)
    assert not is_beaten(FAIR, others=[STRONG, WEAK], keep=0.5)
    assert not is_beaten(STRONG, others=[FAIR, WEAK], keep=0.5)


def test_better_in_one_of_the_two_is_enough_to_go_on() -> None:
    assert not is_beaten(GENTLE, others=[STRONG, FAIR, WEAK], keep=0.01)


@pytest.mark.parametrize(("keep", "stopped"), [(0.01, True), (0.5, True), (0.75, False), (1.0, False)])
def test_the_share_that_goes_on(keep: float, stopped: bool) -> None:
    """Two of four beat the weak one: it is not among the best half, but it is among the best three quarters."""
    assert is_beaten(WEAK, others=[STRONG, FAIR, GENTLE], keep=keep) is stopped


points = st.builds(
    report,
    trial=st.uuids().map(str),
    forgetting=st.floats(0, 5),
    retention=st.floats(-5, 0),
    side=st.sampled_from(["over", "under"]),
)


@given(reports=st.lists(points, min_size=1, max_size=12), keep=st.floats(0.05, 1.0), data=st.data())
def test_no_side_is_ever_emptied_and_no_order_of_others_matters(reports: list[RungReport], keep: float, data: st.DataObject) -> None:
    left = [one for one in reports if not is_beaten(one, others=reports, keep=keep)]
    assert {one.side for one in left} == {one.side for one in reports}
    shuffled = data.draw(st.permutations(reports))
    assert [is_beaten(one, others=shuffled, keep=keep) for one in reports] == [is_beaten(one, others=reports, keep=keep) for one in reports]


# ---- the book of a sweep


def signals(forgetting: float, retention: float, *, auc: float = 0.9) -> dict[str, float]:
    return {"forget_answer_log_prob": -forgetting, "retain_answer_log_prob": retention, "mia_auc": auc}


def book(run: Path, *, epochs: tuple[float, ...] = (1.0, 2.0), keep: float = 0.5) -> RungBook:
    return RungBook(run, rungs=RungsConfig(epochs=epochs, keep=keep), baseline={})


def judge(judging: RungBook, trial: str, values: dict[str, float], **changes: Any) -> bool:
    return judging.judge(trial, **{"epoch": 1.0, "step": 10, "is_last": False, "signals": values, **changes})


def test_trials_are_judged_against_those_that_came_before(tmp_path: Path) -> None:
    judging = book(tmp_path)
    assert not judge(judging, "a", signals(3.0, -0.5))
    assert judge(judging, "b", signals(1.0, -2.0))
    assert not judge(judging, "c", signals(1.0, -2.0, auc=0.3)), "alone on its side"
    assert [(line["trial"], line["side"], line["pruned"]) for line in read_jsonl(tmp_path / FILE)] == [
        ("a", "under", False), ("b", "under", True), ("c", "over", False),
    ]  # fmt: skip


def test_before_the_first_rung_nobody_is_judged(tmp_path: Path) -> None:
    judging = book(tmp_path)
    judge(judging, "a", signals(3.0, -0.5))
    assert not judge(judging, "b", signals(1.0, -2.0), epoch=0.9)
    assert judge(judging, "b", signals(1.0, -2.0), epoch=1.3)


def test_a_trial_is_compared_at_its_own_rung_only(tmp_path: Path) -> None:
    judging = book(tmp_path)
    judge(judging, "a", signals(3.0, -0.5), epoch=2.0)
    assert not judge(judging, "b", signals(1.0, -2.0), epoch=1.0)
    assert judge(judging, "b", signals(1.0, -2.0), epoch=2.0)


def test_who_cannot_win_beats_nobody(tmp_path: Path) -> None:
    """A trial that diverged, failed or was stopped itself leaves the other one alone on its side."""
    judging = book(tmp_path)
    judge(judging, "a", signals(3.0, -0.5))
    assert not judge(judging, "b", signals(1.0, -2.0), may_win=lambda name: name != "a")


def test_the_last_step_is_compared_with_but_not_stopped(tmp_path: Path) -> None:
    judging = book(tmp_path)
    judge(judging, "a", signals(3.0, -0.5))
    assert not judge(judging, "b", signals(1.0, -2.0), is_last=True)
    assert judge(judging, "c", signals(0.5, -3.0))


def test_signals_that_are_not_finite_decide_nothing(tmp_path: Path) -> None:
    judging = book(tmp_path)
    judge(judging, "a", signals(3.0, -0.5))
    assert not judge(judging, "b", signals(float("nan"), -2.0))


def test_a_resumed_sweep_decides_nothing_twice(tmp_path: Path) -> None:
    """The first trial reported when it was alone: told again after stronger ones, it still goes on; the stopped one stays stopped."""
    first = book(tmp_path)
    for trial, values in (("weak", signals(1.0, -2.0)), ("a", signals(3.0, -0.5)), ("b", signals(4.0, -0.1)), ("last", signals(0.5, -3.0))):
        judge(first, trial, values)
    again = book(tmp_path)
    assert again.reports == first.reports
    assert not judge(again, "weak", signals(1.0, -2.0))
    assert judge(again, "last", signals(0.5, -3.0))
    assert len(read_jsonl(tmp_path / FILE)) == 4


def test_the_same_reports_lead_to_the_same_decisions(tmp_path: Path) -> None:
    told = [(f"t{number}", signals(float(number * 7 % 5), -float(number * 3 % 4), auc=0.3 + 0.1 * (number % 5))) for number in range(20)]
    runs = []
    for name in ("one", "two"):
        judging = book(tmp_path / name)
        runs.append([judge(judging, trial, values) for trial, values in told])
    assert runs[0] == runs[1]
    assert any(runs[0])
    assert not all(runs[0])


@pytest.mark.parametrize("epochs", [(), (0.0,), (2.0, 1.0), (1.0, 1.0)])
def test_rungs_ascend(epochs: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError):
        RungsConfig(epochs=epochs)

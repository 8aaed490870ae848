"""What a sweep has spent, over all its starts."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.config import BudgetConfig
from launcher.search.budget import BudgetClock, Spent, stage_seconds, used_up


def test_each_limit_counts_by_itself_and_is_named() -> None:
    spent = Spent(gpu_hours=8.0, hours=1.0)
    assert used_up(BudgetConfig(), spent=spent) is None
    assert used_up(BudgetConfig(gpu_hours=9, hours=2), spent=spent) is None
    assert used_up(BudgetConfig(gpu_hours=8), spent=spent) == "8 of 8 GPU-hours (sweep.budget.gpu_hours)"
    assert "sweep.budget.hours" in str(used_up(BudgetConfig(gpu_hours=9, hours=0.5), spent=spent))


def event(time: float, kind: str, **fields: Any) -> dict[str, Any]:
    return {"time": time, "kind": kind, **fields}


def test_a_stage_counts_over_all_starts_and_no_pause_between_them() -> None:
    """0 to 10 killed at its event at 7; 100 to 130 to its end; running since 200, now 205: 7 + 30 + 5."""
    events = [
        event(0, "stage_started", stage="trials"),
        event(7, "trial_started", trial="a"),
        event(90, "stage_started", stage="target"),
        event(100, "stage_finished", stage="target"),
        event(100, "stage_started", stage="trials"),
        event(130, "stage_finished", stage="trials"),
        event(140, "stage_finished", stage="pairs"),
        event(200, "stage_started", stage="trials"),
    ]
    assert stage_seconds(events, stage="trials", now=205) == pytest.approx(42)
    assert stage_seconds(events[:6], stage="trials", now=205) == pytest.approx(37)
    assert stage_seconds([], stage="trials", now=205) == 0


def test_gpu_hours_are_those_of_the_ended_and_of_the_running() -> None:
    """Two GPUs each: an ended trial of half an hour, and one that had 600 s from an earlier start and has run for 1200 s more."""
    seconds = {"a": 1800.0, "b": 600.0}
    clock = BudgetClock(BudgetConfig(gpu_hours=2), share=2, on_gpus=True, seconds=lambda: seconds, stage_s=lambda: 1234.0)
    clock.started("b", now=0.0)
    assert clock.spent(now=1200.0) == Spent(gpu_hours=pytest.approx(2 * (1800 + 1800) / 3600), hours=pytest.approx(1234 / 3600))
    assert clock.used_up(now=1199.0) is None
    assert clock.used_up(now=1200.0) is not None
    seconds["b"] = 1500.0
    clock.ended("b")
    assert clock.spent(now=99999.0).gpu_hours == pytest.approx(2 * 3300 / 3600)


def test_without_gpus_ranks_are_counted_and_named() -> None:
    clock = BudgetClock(BudgetConfig(gpu_hours=0.1), share=1, on_gpus=False, seconds=lambda: {"a": 3600.0}, stage_s=lambda: 0.0)
    assert "rank-hours" in str(clock.used_up(now=0.0))


def test_without_a_limit_no_file_is_read() -> None:
    def never() -> dict[str, float]:
        raise AssertionError("read")

    assert BudgetClock(BudgetConfig(), share=1, on_gpus=True, seconds=never, stage_s=lambda: 0.0).used_up(now=0.0) is None

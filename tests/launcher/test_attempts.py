"""Which ends of a trial are counted as what, and which of them it is started again after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from launcher.attempts import begin, machine_lost, record, restarts, smaller_micro_batch
from launcher.config import SweepConfig
from launcher.trial import TrialTask, ended, read_status, settled, write_status
from launcher.trial_errors import OutOfMemory, TimedOut, is_out_of_memory, reason_of
from tests.helpers.tiny_trial import tiny_train
from trainers.config import EngineConfig
from trainers.errors import RunError


@pytest.fixture
def task(tmp_path: Path) -> TrialTask:
    """A trial that has not started."""
    return TrialTask(run=str(tmp_path), name="trial-00")


def start(task: TrialTask, *, sweep: SweepConfig, session: str = "one", lost: Sequence[str] = ()) -> bool:
    """A start that gets as far as to compute, if it may."""
    go = begin(task, sweep=sweep, session=session, nodes=["here"], lost=lambda nodes: bool(set(nodes) & set(lost)))
    if go:
        write_status(task.folder, state="running")
    return go


def counts(task: TrialTask) -> tuple[int, int]:
    status = read_status(task.folder)
    return status["errors"], status["preemptions"]


def test_errors_and_lost_machines_have_limits_of_their_own(task: TrialTask) -> None:
    sweep = SweepConfig(max_failures=1, max_preemptions=2)
    ends: list[tuple[Any, bool]] = [
        (machine_lost(), True),
        (ValueError("no"), True),
        (machine_lost(), True),
        (ValueError("no"), False),
    ]
    for error, again in ends:
        assert start(task, sweep=sweep)
        assert record(task, error=error, sweep=sweep) is again
    assert counts(task) == (2, 2)
    status = read_status(task.folder)
    assert (status["state"], status["reason"], status["error"]) == ("failed", "error", "ValueError: no")
    assert not start(task, sweep=sweep), "the same sweep does not try again"


def test_machines_may_be_lost_only_so_often(task: TrialTask) -> None:
    sweep = SweepConfig(max_failures=5, max_preemptions=1)
    assert start(task, sweep=sweep)
    assert record(task, error=machine_lost(), sweep=sweep)
    assert start(task, sweep=sweep)
    assert not record(task, error=machine_lost(), sweep=sweep)
    assert read_status(task.folder)["reason"] == "preempted"


def test_a_new_sweep_tries_again_and_counts_on(task: TrialTask) -> None:
    sweep = SweepConfig(max_failures=0)
    assert start(task, sweep=sweep)
    assert not record(task, error=ValueError("no"), sweep=sweep)
    assert not start(task, sweep=sweep)
    assert start(task, sweep=sweep, session="two")
    assert not record(task, error=ValueError("no"), sweep=sweep)
    assert counts(task) == (2, 0)


@pytest.mark.parametrize(("lost", "expected"), [(["here"], (0, 1)), ([], (1, 0))])
def test_a_start_that_left_no_word_is_counted_by_its_machine(task: TrialTask, lost: list[str], expected: tuple[int, int]) -> None:
    sweep = SweepConfig()
    assert start(task, sweep=sweep)
    assert start(task, sweep=sweep, lost=lost), "killed"
    assert counts(task) == expected


def test_a_killed_process_uses_up_the_starts_of_its_trial(task: TrialTask) -> None:
    sweep = SweepConfig(max_failures=1)
    assert [start(task, sweep=sweep) for _ in range(3)] == [True, True, False]
    status = read_status(task.folder)
    assert (status["state"], status["errors"], settled(status)) == ("failed", 2, True)


def test_a_sweep_that_was_killed_is_nobodys_fault(task: TrialTask) -> None:
    sweep = SweepConfig(max_failures=0)
    assert start(task, sweep=sweep)
    assert start(task, sweep=sweep, session="two")
    assert counts(task) == (0, 0)


def test_memory_is_tried_once_more_with_half_the_micro_batch_whatever_the_limit(task: TrialTask) -> None:
    sweep, train = SweepConfig(max_failures=0), tiny_train()
    assert start(task, sweep=sweep)
    assert record(task, error=OutOfMemory("the GPU has no memory left"), sweep=sweep, train=train)
    assert read_status(task.folder)["micro_batch"] == 2
    assert start(task, sweep=sweep)
    assert not record(task, error=OutOfMemory("the GPU has no memory left"), sweep=sweep, train=train)
    status = read_status(task.folder)
    assert (status["state"], status["reason"], status["micro_batch"], status["errors"]) == ("failed", "out_of_memory", 2, 2)


def test_a_single_pair_is_not_halved(task: TrialTask) -> None:
    sweep = SweepConfig(max_failures=3)
    assert start(task, sweep=sweep)
    assert not record(task, error=OutOfMemory("full"), sweep=sweep, train=tiny_train(per_device_train_batch_size=1))
    assert read_status(task.folder).get("micro_batch") is None


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "expected"), [(8, 8, 1, 4), (8, 8, 2, 2), (8, 3, 2, 1), (8, 1, 1, None), (2, 4, 2, None)]
)
def test_half_of_what_a_rank_really_meets(batch: int, micro: int, ranks: int, expected: int | None) -> None:
    train = tiny_train(train_batch_size=batch, per_device_train_batch_size=micro, engine=EngineConfig(ranks=ranks))
    assert smaller_micro_batch(train) == expected


def test_tune_may_start_a_trial_as_often_as_all_limits_together() -> None:
    assert restarts(SweepConfig(max_failures=2, max_preemptions=3)) == 6


def test_out_of_memory_is_torchs_own_error_or_its_words() -> None:
    import ray
    import torch

    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(RuntimeError("NCCL error: Cuda failure 'out of memory'"))
    assert not is_out_of_memory(RuntimeError("connection closed by peer"))
    assert not is_out_of_memory(ray.exceptions.OutOfMemoryError("the node runs low on memory: out of memory"))
    errors = [TimedOut("late"), machine_lost(), RunError("died"), OutOfMemory("full")]
    assert [reason_of(error) for error in errors] == ["timeout", "preempted", "error", "out_of_memory"]


@pytest.mark.parametrize(
    ("state", "reason", "expected"),
    [
        ("finished", None, True),
        ("stopped", None, True),
        ("stopped", "diverged", True),
        ("stopped", "pruned", True),
        ("stopped", "budget", False),
        ("stopped", "interrupted", False),
        ("failed", "error", False),
        ("running", None, False),
    ],
)
def test_what_a_resumed_run_leaves_alone(state: str, reason: str | None, expected: bool) -> None:
    assert ended({"state": state, "reason": reason}) is expected

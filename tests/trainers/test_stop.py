"""A trial that is asked to stop ends between two steps with a checkpoint, on all ranks alike, and goes on as if nothing had been."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import RankGroup
from tests.helpers.tiny_trial import tiny_inputs, tiny_train
from trainers.checkpoint import finished_checkpoints
from trainers.config import EngineConfig, LoraConfig, TrainConfig
from trainers.distributed import Rank
from trainers.files import read_jsonl, sha256_file
from trainers.loop import TrialInputs, TrialStopped, train_worker

DROPOUT = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> TrialInputs:
    """Six documents of each set."""
    return tiny_inputs(tmp_path_factory.mktemp("stop"))


def after(steps: int, *, trial: Path) -> Callable[[], bool]:
    """Asks to stop once so many steps are logged."""
    return lambda: len(read_jsonl(trial / "metrics.jsonl")) >= steps


def run(trial: Path, *, train: TrainConfig, inputs: TrialInputs, stop_after: int | None = None, rank: Rank | None = None) -> bool:
    """Go on with a trial; whether it was stopped."""
    stop = None if stop_after is None else after(stop_after, trial=trial)
    try:
        for _ in train_worker(train=train, inputs=inputs, trial=trial, rank=rank, stop=stop):
            pass
    except TrialStopped:
        return True
    return False


def run_on_ranks(*, rank: Rank, **arguments: Any) -> bool:
    return run(rank=rank, **arguments)


def contents(trial: Path) -> dict[str, Any]:
    """Everything that a trial leaves, but for times."""
    lines = [{key: value for key, value in line.items() if key != "seconds"} for line in read_jsonl(trial / "metrics.jsonl")]
    return {"lines": lines} | {
        str(file.relative_to(trial)): sha256_file(file) for file in sorted(trial.rglob("*.safetensors")) if file.is_file()
    }


def steps_kept(trial: Path) -> list[int]:
    return [int(folder.name.removeprefix("step-")) for folder in finished_checkpoints(trial)]


def test_a_trial_that_is_stopped_twice_ends_like_one_that_is_not(inputs: TrialInputs, tmp_path: Path) -> None:
    """Six steps, checkpoints after the third and the last: what the stops after 1 and 4 steps wrote is gone at the end."""
    train = tiny_train(lora=DROPOUT)
    assert not run(tmp_path / "whole", train=train, inputs=inputs, stop_after=100)
    assert steps_kept(tmp_path / "whole") == [3, 6]
    trial = tmp_path / "stopped"
    assert run(trial, train=train, inputs=inputs, stop_after=1)
    assert steps_kept(trial) == [1]
    assert run(trial, train=train, inputs=inputs, stop_after=4)
    assert steps_kept(trial) == [3, 4]
    assert not run(trial, train=train, inputs=inputs)
    assert contents(trial) == contents(tmp_path / "whole")


def test_a_stop_where_a_checkpoint_lies_writes_nothing_and_before_the_first_step_neither(inputs: TrialInputs, tmp_path: Path) -> None:
    train, trial = tiny_train(), tmp_path / "trial"
    assert run(trial, train=train, inputs=inputs, stop_after=0)
    assert steps_kept(trial) == []
    assert run(trial, train=train, inputs=inputs, stop_after=3)
    written = (trial / "checkpoints" / "step-000003" / "manifest.json").stat().st_mtime_ns
    assert run(trial, train=train, inputs=inputs, stop_after=3)
    assert steps_kept(trial) == [3]
    assert (trial / "checkpoints" / "step-000003" / "manifest.json").stat().st_mtime_ns == written


def test_a_trial_that_has_done_its_steps_is_not_stopped(inputs: TrialInputs, tmp_path: Path) -> None:
    assert not run(tmp_path / "trial", train=tiny_train(), inputs=inputs, stop_after=6)
    assert not run(tmp_path / "trial", train=tiny_train(), inputs=inputs, stop_after=0)


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [2, 3])
def test_all_ranks_stop_before_the_same_step_though_only_the_first_is_asked(stage: int, inputs: TrialInputs, tmp_path: Path) -> None:
    """Rank 1 may read the log before or after rank 0 has written its line: its own answer must not count."""
    train = tiny_train(engine=EngineConfig(name="deepspeed", zero_stage=stage, ranks=2), per_device_train_batch_size=2)
    with RankGroup(2) as group:
        whole, trial = tmp_path / "whole", tmp_path / "stopped"
        assert group.call(run_on_ranks, train=train, inputs=inputs, trial=whole, stop_after=100, timeout_s=300) == [False, False]
        assert group.call(run_on_ranks, train=train, inputs=inputs, trial=trial, stop_after=4, timeout_s=300) == [True, True]
        assert steps_kept(trial) == [3, 4]
        assert group.call(run_on_ranks, train=train, inputs=inputs, trial=trial, timeout_s=300) == [False, False]
    assert contents(trial) == contents(whole)

"""A trial of several ranks under Ray: the same numbers as on one, and no rank without the others.

The two differ only in how sums are ordered, over more steps than in ``tests/trainers/test_engines.py``.
"""

from __future__ import annotations

import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from launcher.load import load_experiment
from launcher.stages import run_train
from tests.helpers.small_run import Command, facts, running, wait_for_end, write_small_experiment
from tests.integration.conftest import FinishedSweep
from tests.integration.test_kills import steps_done
from trainers.checkpoint import finished_checkpoints
from trainers.files import read_json, read_jsonl

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NUM_STEPS = 32
LOSS_TOLERANCE = 2e-4
"""Nats. Losses of about 17 nats differ by at most 2e-5."""
WEIGHT_TOLERANCE = 5e-5
"""Adapter entries differ by at most 3e-6; the negative control is that eight steps more move them by ten times the tolerance."""


def weights_of(trial: Path) -> dict[str, torch.Tensor]:
    """The adapter of a trial's newest checkpoint."""
    return torch_file(finished_checkpoints(trial)[-1] / "adapter_model.safetensors")


def largest_difference(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Between entries of the same name."""
    assert actual.keys() == expected.keys()
    return max(float((actual[name] - expected[name]).abs().max()) for name in expected)


def gang(stage: int, **changes: Any) -> dict[str, Any]:
    """One trial on two ranks, gentle enough that rounding does not grow; half a core each, so that two such sweeps share two cores."""
    return {
        "sweep__num_trials": 1,
        "sweep__start_points": [],
        "sweep__cpus_per_rank": 0.5,
        "train__engine": {"name": "deepspeed", "zero_stage": stage, "ranks": 2},
        "train__per_device_train_batch_size": 2,
        "train__objective__forget_weight": 0.1,
        "train__learning_rate": 1e-3,
        "train__num_train_epochs": 8,
        "train__lora__lora_dropout": 0.0,
        "train__seed": 7,  # `unlearn train` and a sweep would derive different ones
        **changes,
    }


def ranks_of(command: Command) -> list[psutil.Process]:
    """The processes of the ranks, in no order."""
    command.look()
    found = []
    for process in command.seen:
        try:
            if "RankActor" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def gangs(undisturbed: FinishedSweep, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, int, str]]:
    """ZeRO-2 and ZeRO-3, in two sweeps at the same time: run folder, exit code, output."""
    root = tmp_path_factory.mktemp("gangs")
    finished = {}
    with ExitStack() as stack:
        commands = {}
        for stage in (2, 3):
            folder = root / f"zero-{stage}"
            folder.mkdir()
            file = write_small_experiment(
                folder / "small.yaml", data=undisturbed.data, storage=folder, target=undisturbed.run / "target", **gang(stage)
            )
            commands[stage] = stack.enter_context(running("sweep", file, folder=folder))
        for stage, command in commands.items():
            code = command.wait()
            wait_for_end(command, limit_s=20)
            finished[stage] = (root / f"zero-{stage}" / "small", code, command.text())
    return finished


@pytest.fixture(scope="module")
def alone(undisturbed: FinishedSweep, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same trial on one rank of plain torch, in this process."""
    root = tmp_path_factory.mktemp("alone")
    changes = gang(0, train__engine={"name": "torch"}, train__per_device_train_batch_size=8)
    file = write_small_experiment(root / "small.yaml", data=undisturbed.data, storage=root, target=undisturbed.run / "target", **changes)
    before = torch.get_num_threads()
    try:
        run_train(experiment=load_experiment(file), out=None)
    finally:
        torch.set_num_threads(before)
    return root / "small" / "trials" / "trial-00"


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_under_ray_agree_with_one(stage: int, gangs: dict[int, tuple[Path, int, str]], alone: Path) -> None:
    run, code, output = gangs[stage]
    trial = run / "trials" / "trial-00"
    assert code == 0, output
    assert read_json(trial / "status.json")["state"] == "finished"
    assert {path.name for path in (trial / "logs").iterdir()} == {"rank-0.log", "rank-1.log"}
    losses = [[line["loss"] for line in read_jsonl(folder / "metrics.jsonl")] for folder in (trial, alone)]
    assert len(losses[0]) == NUM_STEPS
    assert losses[0] == pytest.approx(losses[1], abs=LOSS_TOLERANCE)
    assert largest_difference(weights_of(trial), weights_of(alone)) < WEIGHT_TOLERANCE
    first = alone / "checkpoints" / "step-000008"
    assert largest_difference(weights_of(trial), torch_file(first / "adapter_model.safetensors")) > 10 * WEIGHT_TOLERANCE, (
        "negative control"
    )


def torch_file(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def test_a_killed_rank_takes_the_others_with_it_and_the_trial_goes_on(
    undisturbed: FinishedSweep, gangs: dict[int, tuple[Path, int, str]], tmp_path: Path
) -> None:
    file = write_small_experiment(
        tmp_path / "small.yaml", data=undisturbed.data, storage=tmp_path, target=undisturbed.run / "target", **gang(2)
    )
    run = tmp_path / "small"
    with running("sweep", file, folder=tmp_path) as command:
        command.until(lambda: steps_done(run, "trial-00") > 9, what="step 9")
        first = ranks_of(command)
        assert len(first) == 2
        follower = next(process for process in first if any(file.path.endswith("rank-1.log") for file in process.open_files()))
        follower.kill()
        before = (run / "trials" / "trial-00" / "metrics.jsonl").read_text().splitlines()
        assert len(before) < NUM_STEPS
        command.until(lambda: not any(process.is_running() for process in first), what="end of both ranks")
        assert command.wait() == 0, command.text()
        wait_for_end(command, limit_s=20)
    after = (run / "trials" / "trial-00" / "metrics.jsonl").read_text().splitlines()
    assert len(after) == NUM_STEPS
    assert after[:8] == before[:8], "resumed from the checkpoint of step 8"
    starts = [event["again"] for event in read_jsonl(run / "events.jsonl") if event["kind"] == "trial_started"]
    assert starts == [False, True]
    assert facts(run) == facts(gangs[2][0])


def test_a_frozen_rank_ends_its_trial_instead_of_hanging_the_sweep(undisturbed: FinishedSweep, tmp_path: Path) -> None:
    """Rank 1 is stopped, so that rank 0 waits for it in a collective for ever; the sweep has nothing else, and says so."""
    changes = gang(2, sweep__stall_s=30, sweep__max_failures=0)
    file = write_small_experiment(
        tmp_path / "small.yaml", data=undisturbed.data, storage=tmp_path, target=undisturbed.run / "target", **changes
    )
    run = tmp_path / "small"
    with running("sweep", file, folder=tmp_path) as command:
        command.until(lambda: steps_done(run, "trial-00") > 3, what="step 3")
        ranks = ranks_of(command)
        follower = next(process for process in ranks if any(file.path.endswith("rank-1.log") for file in process.open_files()))
        follower.send_signal(signal.SIGSTOP)
        assert command.wait() == 1, command.text()
        wait_for_end(command, limit_s=20)
    status = read_json(run / "trials" / "trial-00" / "status.json")
    assert status["state"] == "failed"
    assert status["error"].startswith("no sign of life for 30 s (sweep.stall_s)")
    assert [line for line in command.text().splitlines() if "FAILED" in line and "trial-00" in line]
    assert "no trial is alive" in command.text()
    assert (run / "report.html").is_file()
    assert not (run / "merged").exists()

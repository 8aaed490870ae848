"""A trial of several ranks under Ray: the same numbers as on one, and no rank without the others.

The two differ only in how sums are ordered, over more steps than in ``tests/trainers/test_engines.py``.
"""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.helpers.gang_runs import (
    LOSS_TOLERANCE,
    NUM_STEPS,
    TRIAL,
    WEIGHT_TOLERANCE,
    gang,
    largest_difference,
    losses_of,
    named,
    rank_of,
    ranks_of,
    starts_of,
    status_of,
    weights_of,
)
from tests.helpers.sabotage import sabotaged
from tests.helpers.small_run import Command, facts, running, wait_for_end, write_small_experiment
from tests.integration.conftest import FinishedSweep
from tests.integration.test_kills import AWAY_S, steps_done
from trainers.checkpoint import finished_checkpoints
from trainers.files import read_jsonl

pytestmark = [pytest.mark.ray, pytest.mark.slow]

Gangs = dict[int, tuple[Path, int, str]]


def experiment(folder: Path, *, undisturbed: FinishedSweep, **changes: Any) -> Path:
    """The file of a sweep whose run folder is ``folder / "small"``."""
    folder.mkdir(exist_ok=True)
    return write_small_experiment(
        folder / "small.yaml", data=undisturbed.data, storage=folder, target=undisturbed.run / "target", **changes
    )


@pytest.fixture(scope="module")
def gangs(undisturbed: FinishedSweep, tmp_path_factory: pytest.TempPathFactory) -> Gangs:
    """ZeRO-2 and ZeRO-3, in two sweeps at the same time: run folder, exit code, output."""
    root = tmp_path_factory.mktemp("gangs")
    finished = {}
    with ExitStack() as stack:
        commands = {}
        for stage in (2, 3):
            folder = root / f"zero-{stage}"
            file = experiment(folder, undisturbed=undisturbed, **gang(stage))
            commands[stage] = stack.enter_context(running("sweep", file, folder=folder))
        for stage, command in commands.items():
            code = command.wait()
            wait_for_end(command, limit_s=AWAY_S)
            finished[stage] = (root / f"zero-{stage}" / "small", code, command.text())
    return finished


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_under_ray_agree_with_one(stage: int, gangs: Gangs, alone: Path) -> None:
    run, code, output = gangs[stage]
    trial = run / TRIAL
    assert code == 0, output
    status = status_of(run)
    assert (status["state"], status["reason"], status["errors"], status["preemptions"]) == ("finished", None, 0, 0)
    assert {path.name for path in (trial / "logs").iterdir()} == {"rank-0.log", "rank-1.log"}
    assert len(losses_of(trial)) == NUM_STEPS
    assert losses_of(trial) == pytest.approx(losses_of(alone), abs=LOSS_TOLERANCE)
    assert largest_difference(weights_of(trial), weights_of(alone)) < WEIGHT_TOLERANCE
    first = load_file(alone / "checkpoints" / "step-000008" / "adapter_model.safetensors")
    assert largest_difference(weights_of(trial), first) > 10 * WEIGHT_TOLERANCE, "negative control"


def test_a_killed_rank_or_leader_takes_the_others_with_it_and_the_trial_goes_on(
    undisturbed: FinishedSweep, gangs: Gangs, tmp_path: Path
) -> None:
    """First rank 1 is killed, then the process that leads both."""
    file = experiment(tmp_path, undisturbed=undisturbed, **gang(2, sweep__max_failures=2))
    run = tmp_path / "small"
    with running("sweep", file, folder=tmp_path) as command:
        command.until(lambda: steps_done(run, "trial-00") > 9, what="step 9")
        first = ranks_of(command)
        assert len(first) == 2
        rank_of(command, 1).kill()
        before = (run / TRIAL / "metrics.jsonl").read_text().splitlines()
        assert len(before) < NUM_STEPS
        command.until(lambda: not any(process.is_running() for process in first), what="end of both ranks")
        command.until(lambda: len(starts_of(run)) == 2 and steps_done(run, "trial-00") > 17, what="step 17")
        second = [process for process in ranks_of(command) if process not in first]
        assert len(second) == 2
        (leader,) = [process for process in named(command.seen, "ray::ImplicitFunc") if process.is_running()]
        leader.kill()
        command.until(lambda: not any(process.is_running() for process in second), what="end of the second ranks")
        assert command.wait() == 0, command.text()
        wait_for_end(command, limit_s=AWAY_S)
    after = (run / TRIAL / "metrics.jsonl").read_text().splitlines()
    assert len(after) == NUM_STEPS
    assert after[:8] == before[:8], "resumed from the checkpoint of step 8"
    assert starts_of(run) == [False, True, True]
    assert (status_of(run)["errors"], status_of(run)["preemptions"]) == (2, 0)
    assert facts(run) == facts(gangs[2][0])


def test_ranks_that_hang_end_their_trial_which_goes_on_as_often_as_it_may(undisturbed: FinishedSweep, gangs: Gangs, tmp_path: Path) -> None:
    """In one sweep rank 1 is stopped once; in the other it sleeps whenever step 5 comes, while rank 0 waits for it in a collective."""
    once, always = tmp_path / "once", tmp_path / "always"
    files = {
        folder: experiment(folder, undisturbed=undisturbed, **gang(2, sweep__stall_s=20, sweep__max_failures=failures))
        for folder, failures in ((once, 1), (always, 0))
    }
    fault = sabotaged(tmp_path / "fault", fault={"kind": "sleep", "rank": 1, "step": 5})
    with running("sweep", files[once], folder=once) as stopped, running("sweep", files[always], folder=always, environment=fault) as asleep:
        stopped.until(lambda: steps_done(once / "small", "trial-00") > 9, what="step 9")
        frozen = rank_of(stopped, 1)
        frozen.send_signal(signal.SIGSTOP)
        stopped.until(lambda: not frozen.is_running(), what="end of the rank that is stopped")
        assert stopped.wait() == 0, stopped.text()
        assert asleep.wait() == 1, asleep.text()
        for command in (stopped, asleep):
            wait_for_end(command, limit_s=AWAY_S)
    assert (tmp_path / "fault" / "asleep").exists()
    assert starts_of(once / "small") == [False, True]
    assert (status_of(once / "small")["state"], status_of(once / "small")["errors"]) == ("finished", 1)
    assert facts(once / "small") == facts(gangs[2][0])
    status = status_of(always / "small")
    assert (status["state"], status["reason"], status["errors"]) == ("failed", "error", 1)
    assert status["error"].startswith("no sign of life for 20 s (sweep.stall_s)")
    assert starts_of(always / "small") == [False]
    assert [line for line in asleep.text().splitlines() if "FAILED" in line and "trial-00" in line]
    assert "no trial is alive" in asleep.text()
    assert (always / "small" / "report.html").is_file()
    assert not (always / "small" / "merged").exists()


def test_a_rank_without_memory_is_tried_again_with_half_the_micro_batch(undisturbed: FinishedSweep, gangs: Gangs, tmp_path: Path) -> None:
    """One sweep has memory for two pairs, as the undisturbed one uses; the other for none: it fails, though errors are allowed."""
    enough, none = tmp_path / "enough", tmp_path / "none"
    changes = {
        enough: gang(2, train__per_device_train_batch_size=8, sweep__max_failures=0),
        none: gang(0, train__engine={"name": "torch"}, train__per_device_train_batch_size=8, sweep__max_failures=5),
    }
    faults = {
        enough: sabotaged(tmp_path / "fault-enough", fault={"kind": "memory", "rank": 1, "largest": 2}),
        none: sabotaged(tmp_path / "fault-none", fault={"kind": "memory", "rank": 0, "largest": 0}),
    }
    with ExitStack() as stack:
        commands = {}
        for folder in (enough, none):
            file = experiment(folder, undisturbed=undisturbed, **changes[folder])
            commands[folder] = stack.enter_context(running("sweep", file, folder=folder, environment=faults[folder]))
        assert commands[enough].wait() == 0, commands[enough].text()
        assert commands[none].wait() == 1, commands[none].text()
        for command in commands.values():
            wait_for_end(command, limit_s=AWAY_S)
    status = status_of(enough / "small")
    assert (status["state"], status["reason"], status["micro_batch"], status["errors"]) == ("finished", None, 2, 1)
    assert starts_of(enough / "small") == [False, True]
    trial, expected = enough / "small" / TRIAL, gangs[2][0] / TRIAL
    assert losses_of(trial) == losses_of(expected), "the same steps as with the smaller micro-batch from the start"
    assert largest_difference(weights_of(trial), weights_of(expected)) == 0
    status = status_of(none / "small")
    assert (status["state"], status["reason"], status["micro_batch"], status["errors"]) == ("failed", "out_of_memory", 4, 2)
    assert "the GPU has no memory left: CUDA out of memory" in status["error"]
    assert starts_of(none / "small") == [False, True]


def test_a_sweep_that_is_interrupted_and_killed_goes_on_with_the_same_numbers(
    undisturbed: FinishedSweep, gangs: Gangs, tmp_path: Path
) -> None:
    """Ctrl-C, as a terminal sends it: to every process. Then again, and ``kill -9`` of the command; then to the end."""
    file = experiment(tmp_path, undisturbed=undisturbed, **gang(2))
    run = tmp_path / "small"
    with running("sweep", file, folder=tmp_path) as command:
        command.until(lambda: steps_done(run, "trial-00") > 9, what="step 9")
        os.killpg(command.process.pid, signal.SIGINT)
        assert command.wait() == 130, command.text()
        wait_for_end(command, limit_s=AWAY_S)
        check_interrupted(run, command=command)
    with running("sweep", file, folder=tmp_path) as command:
        command.until(lambda: steps_done(run, "trial-00") > 17, what="step 17")
        command.kill()
        wait_for_end(command, limit_s=AWAY_S, but=("Agent",))
    with running("sweep", file, folder=tmp_path) as command:
        assert command.wait() == 0, command.text()
    assert (status_of(run)["state"], status_of(run)["reason"], status_of(run)["errors"]) == ("finished", None, 0)
    assert facts(run) == facts(gangs[2][0]), "the checkpoints that the stops made are gone, too"


def check_interrupted(run: Path, *, command: Command) -> None:
    """The trial's last step is in a checkpoint, and nothing follows."""
    status = status_of(run)
    assert (status["state"], status["reason"], status["error"], status["errors"]) == ("stopped", "interrupted", None, 0)
    done = steps_done(run, "trial-00")
    assert 9 < done < NUM_STEPS
    assert finished_checkpoints(run / TRIAL)[-1].name == f"step-{done:06d}"
    assert "run the same command again" in command.text()
    assert "Traceback" not in command.text()
    assert not (run / "pairs.json").exists()
    assert [event["stage"] for event in read_jsonl(run / "events.jsonl") if event["kind"] == "stage_started"][-1] == "trials"


def test_sigterm_stops_like_ctrl_c_and_the_second_ctrl_c_does_not_wait(undisturbed: FinishedSweep, tmp_path: Path) -> None:
    """Of two sweeps at the same time, one gets SIGTERM; the other has a rank that is stopped, so that nothing ends by itself."""
    terminated, frozen = tmp_path / "terminated", tmp_path / "frozen"
    files = {folder: experiment(folder, undisturbed=undisturbed, **gang(2)) for folder in (terminated, frozen)}
    with running("sweep", files[terminated], folder=terminated) as one, running("sweep", files[frozen], folder=frozen) as other:
        one.until(lambda: steps_done(terminated / "small", "trial-00") > 9, what="step 9")
        one.process.terminate()
        other.until(lambda: steps_done(frozen / "small", "trial-00") > 3, what="step 3")
        rank_of(other, 1).send_signal(signal.SIGSTOP)
        os.killpg(other.process.pid, signal.SIGINT)
        other.until(lambda: "once more to stop at once" in other.text(), what="a word on how to stop at once")
        assert one.wait() == 130, one.text()
        assert other.process.poll() is None, "it waits for the step's end"
        os.killpg(other.process.pid, signal.SIGINT)
        assert other.wait() == 130, other.text()
        for command in (one, other):
            wait_for_end(command, limit_s=AWAY_S)
    check_interrupted(terminated / "small", command=one)
    assert "Traceback" not in other.text()

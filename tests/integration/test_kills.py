"""A sweep that is killed, anywhere and as often as one likes, ends with the numbers of one that is not."""

from __future__ import annotations

import random
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from tests.helpers.small_run import Command, assert_same_facts, running, stamps, wait_for_end, write_small_experiment
from tests.integration.conftest import FinishedSweep
from trainers.checkpoint import finished_checkpoints
from trainers.files import read_json, read_jsonl

pytestmark = [pytest.mark.ray, pytest.mark.slow]

AWAY_S = 20.0
"""Seconds in which every process of a killed sweep that computes must have ended by itself."""
AGENTS_S = 90.0
"""The same for two idle agents of Ray, which try for a minute to tell a cluster that is gone that it is gone."""


def steps_done(run: Path, trial: str) -> int:
    return len(read_jsonl(run / "trials" / trial / "metrics.jsonl"))


def is_writing(process: psutil.Process, log: Path) -> bool:
    """Whether a process has a trial's log open as its output."""
    try:
        return any(Path(file.path) == log for file in process.open_files())
    except psutil.Error:
        return False


def test_a_killed_trial_goes_on_from_its_checkpoint(undisturbed: FinishedSweep, tmp_path: Path) -> None:
    """Killed after its step 20 of 80, where the first checkpoint lies: the lines of its metrics up to there stay, to the character."""
    file = write_small_experiment(
        tmp_path / "small.yaml", data=undisturbed.data, storage=tmp_path, target=undisturbed.run / "target", sweep__max_failures=1
    )
    run = tmp_path / "small"
    trial = run / "trials" / "trial-01"
    with running("sweep", file, folder=tmp_path) as command:
        command.until(lambda: steps_done(run, "trial-01") > 22, what="step 22 of trial-01")
        command.look()
        (worker,) = [process for process in command.seen if is_writing(process, trial / "logs" / "rank-0.log")]
        assert "ray::" in " ".join(worker.cmdline())
        worker.kill()
        worker.wait()
        kept = int(finished_checkpoints(trial)[-1].name.removeprefix("step-"))
        before = (trial / "metrics.jsonl").read_text().splitlines()
        assert 20 <= kept < len(before) < 80
        assert command.wait() == 0, command.text()
        assert "FAILED" not in command.text().replace("trial-03  FAILED", "")
        wait_for_end(command, limit_s=AWAY_S)
    after = (trial / "metrics.jsonl").read_text().splitlines()
    assert len(after) == 80
    assert after[:kept] == before[:kept], "these steps were not made again"
    untroubled = (undisturbed.run / "trials" / "trial-01" / "metrics.jsonl").read_text().splitlines()
    assert untroubled[:kept] != before[:kept], "negative control: steps that are made again do not all take the same time"
    starts = [
        event["again"] for event in read_jsonl(run / "events.jsonl") if event["kind"] == "trial_started" and event["trial"] == "trial-01"
    ]
    assert starts == [False, True]
    assert_same_facts(run, undisturbed.run)


def moments(chance: random.Random) -> list[tuple[str, signal.Signals]]:
    """When the sweep is struck, and by what; the order is that of its stages."""
    return [
        ("target", signal.SIGKILL),
        ("trials", signal.SIGKILL),
        ("second trials", signal.SIGINT),
        (chance.choice(["pairs", "merge"]), signal.SIGKILL),
    ]


def strike(command: Command, *, run: Path, moment: str, how: signal.Signals, chance: random.Random) -> None:
    """Wait for the moment, and a little longer by chance; then kill or interrupt the command."""

    def started(stage: str) -> bool:
        return any(event["kind"] == "stage_started" and event["stage"] == stage for event in read_jsonl(run / "events.jsonl")[seen:])

    seen = 0
    if moment == "target":
        command.until(lambda: started("target"), what="the target stage")
        time.sleep(chance.uniform(0, 3))
    elif "trials" in moment:
        seen = len(read_jsonl(run / "events.jsonl"))
        busy = ("trial-00", "trial-01", "trial-02")
        before = {trial: steps_done(run, trial) for trial in busy}
        more = chance.randint(2, 25)
        command.until(lambda: any(steps_done(run, trial) - before[trial] >= more for trial in busy), what=f"{more} steps of a trial")
    else:
        seen = len(read_jsonl(run / "events.jsonl"))
        command.until(lambda: started(moment), what=f"the {moment} stage")
        time.sleep(chance.uniform(0, 0.3))
    command.look()
    command.process.send_signal(how)
    code = command.wait(limit_s=60)
    assert code == (130 if how is signal.SIGINT else -signal.SIGKILL), command.text()


def test_a_sweep_killed_at_every_stage_ends_with_the_same_results(undisturbed: FinishedSweep, tmp_path: Path) -> None:
    """``kill -9`` of the command, or Ctrl-C, then the same command again; other seeds give other moments."""
    seed = random.SystemRandom().randrange(10**6)
    chance = random.Random(seed)
    print(f"moments are drawn with seed {seed}")
    file = write_small_experiment(tmp_path / "small.yaml", data=undisturbed.data, storage=tmp_path)
    run = tmp_path / "small"
    done: dict[str, dict[str, int]] = {}
    with ExitStack() as stack:
        commands = []
        for moment, how in moments(chance):
            command = stack.enter_context(running("sweep", file, folder=tmp_path))
            commands.append(command)
            strike(command, run=run, moment=moment, how=how, chance=chance)
            wait_for_end(command, limit_s=AWAY_S, but=("Agent",))
            assert "Traceback" not in command.text()
            visible = [path for path in run.rglob("*.tmp") if not path.name.startswith(".")]
            assert visible == [], "nothing half-written has the name of something finished"
            for status in run.glob("trials/*/status.json"):
                if read_json(status)["state"] == "finished":
                    done.setdefault(status.parent.name, stamps(status.parent))
        commands.append(stack.enter_context(running("sweep", file, folder=tmp_path)))
        assert commands[-1].wait() == 0, commands[-1].text()
        for command in commands:
            wait_for_end(command, limit_s=AGENTS_S)
    assert done, "at the last strike all trials had finished"
    for name, files in done.items():
        assert stamps(run / "trials" / name) == files, f"{name} had finished, and was not made again"
    assert_same_facts(run, undisturbed.run)

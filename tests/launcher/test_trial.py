"""One trial from its files to its files, in whatever way it ends."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import launcher.trial
import trainers.loop
from launcher.data import prepare_data
from launcher.load import load_experiment
from launcher.run_folder import Run
from launcher.search_space import TrialSpec
from launcher.stages import obtain_target, prepare_trials
from launcher.trial import TrialTask, load_plan, read_status, run_trial, settled, write_plan
from tests.helpers.small_run import write_small_data, write_small_experiment
from trainers.checkpoint import finished_checkpoints
from trainers.distributed import Rank
from trainers.errors import InputError, RunError
from trainers.files import read_json, read_jsonl, write_json
from trainers.loop import DivergedError

SCALARS = {"train__objective__forget_weight": 0.1, "train__learning_rate": 1e-3, "train__num_train_epochs": 1}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder in which everything lies that a trial reads; the target has seen its documents once."""
    root = tmp_path_factory.mktemp("prepared")
    data = write_small_data(root / "data")
    changes = {"data__mmlu": None, "target__num_train_epochs": 1, "eval__max_new_tokens": 2, **SCALARS}
    file = write_small_experiment(root / "small.yaml", data=data, storage=root, sweep__start_points=[], **changes)
    config = load_experiment(file).config
    run = Run(config.run_folder)
    rows = prepare_data(config)
    specs = tuple(TrialSpec(name=f"trial-{number:02d}", overrides={}, config=config.train) for number in range(12))
    target = obtain_target(run, config=config, data=rows)
    prepare_trials(run, config=config, data=rows, specs=specs, target=target)
    return run.folder


_numbers = iter(range(12))


@pytest.fixture
def task(prepared: Path) -> TrialTask:
    """A trial that has not started."""
    return TrialTask(run=str(prepared), name=f"trial-{next(_numbers):02d}")


def worker(*, steps: int, error: BaseException | None = None) -> Any:
    """Stands in for training: some steps without results, then an error."""

    def train_worker(**_: Any) -> Iterator[dict[str, Any]]:
        for step in range(1, steps + 1):
            yield {"step": step, "num_steps": steps + 1, "loss": 1.0}
        if error is not None:
            raise error

    return train_worker


def test_a_finished_trial_left_scores_of_both_folds_and_is_not_run_again(task: TrialTask) -> None:
    steps = list(run_trial(task))
    assert [metrics["step"] for metrics in steps] == [1, 2, 3, 4, 4]
    assert [metrics.get("state") for metrics in steps] == [None, None, None, None, "evaluating"]
    status = read_status(task.folder)
    assert (status["state"], status["step"], status["error"]) == ("finished", 4, None)
    assert status["started"] + status["seconds"] == pytest.approx(status["ended"], abs=0.1)
    assert [read_json(task.folder / name)["fold"] for name in ("validation.json", "eval.json")] == ["validation", "test"]
    assert finished_checkpoints(task.folder)[-1].name == "step-000004"
    assert list(run_trial(task)) == []
    assert read_status(task.folder) == status


def test_a_trial_that_lacks_only_its_scores_gets_them_without_training(task: TrialTask) -> None:
    """Killed between the last checkpoint and the end of the evaluation."""
    assert len(list(run_trial(task))) == 5
    seconds = read_status(task.folder)["seconds"]
    expected = (task.folder / "eval-rows.jsonl").read_bytes()
    (task.folder / "eval.json").unlink()
    (task.folder / "eval-rows.jsonl").unlink()
    kept = (task.folder / "validation.json").stat().st_mtime_ns
    write_json(task.folder / "status.json", read_status(task.folder) | {"state": "running"})
    assert [metrics.get("state") for metrics in run_trial(task)] == ["evaluating"]
    assert (task.folder / "eval-rows.jsonl").read_bytes() == expected
    assert (task.folder / "validation.json").stat().st_mtime_ns == kept
    assert len(read_jsonl(task.folder / "metrics.jsonl")) == 4
    assert read_status(task.folder)["seconds"] > seconds, "all starts count"


@pytest.mark.parametrize(
    ("error", "state", "reason", "text", "again"),
    [
        (DivergedError("the loss is nan at step 3"), "stopped", "diverged", "the loss is nan at step 3", False),
        (InputError("a row is too long", where="row 5"), "failed", "error", "a row is too long\n  where: row 5", False),
        (RuntimeError("connection closed by peer"), "failed", "error", "RuntimeError: connection closed by peer", True),
    ],
)
def test_every_end_is_recorded_and_only_what_may_go_better_next_time_is_raised(
    task: TrialTask, monkeypatch: pytest.MonkeyPatch, error: Exception, state: str, reason: str, text: str, again: bool
) -> None:
    monkeypatch.setattr(trainers.loop, "train_worker", worker(steps=2, error=error))
    if again:
        with pytest.raises(type(error)):
            list(run_trial(task))
    else:
        assert len(list(run_trial(task))) == 2
    status = read_status(task.folder)
    assert (status["state"], status["reason"], status["error"]) == (state, reason, text)
    assert settled(status) is not again


def test_a_new_start_forgets_the_error_of_the_last_one(task: TrialTask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainers.loop, "train_worker", worker(steps=1, error=InputError("the data are gone")))
    list(run_trial(task))
    assert settled(read_status(task.folder))
    monkeypatch.setattr(trainers.loop, "train_worker", worker(steps=1))
    next(run_trial(task))
    status = read_status(task.folder)
    assert (status["state"], status["error"], status["retry"], settled(status)) == ("running", None, None, False)


def test_ranks_other_than_the_first_record_nothing_and_raise_bad_input(task: TrialTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their process hands it to the one that leads the gang."""
    monkeypatch.setattr(trainers.loop, "train_worker", worker(steps=2, error=InputError("a row is too long")))
    with pytest.raises(InputError, match="a row is too long"):
        list(run_trial(task, rank=Rank(1, 2, 1, "tcp://127.0.0.1:1")))
    assert read_status(task.folder)["state"] == "pending"


def test_a_trial_over_its_time_fails_for_good(task: TrialTask, monkeypatch: pytest.MonkeyPatch) -> None:
    config, plan, data = load_plan(task.run)
    limited = config.model_copy(update={"sweep": config.sweep.model_copy(update={"trial_timeout_s": 0.2})})
    monkeypatch.setattr(launcher.trial, "load_plan", lambda run: (limited, plan, data))
    monkeypatch.setattr(trainers.loop, "train_worker", worker(steps=100))
    for _ in run_trial(task):
        time.sleep(0.1)
    status = read_status(task.folder)
    assert "ran for more than 0.2 s" in status["error"]
    assert (status["state"], status["reason"], status["errors"]) == ("failed", "timeout", 1)
    assert settled(status)


def test_a_plan_that_cannot_be_read_is_a_failure_of_the_trial(task: TrialTask, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(run: str) -> Any:
        raise InputError("folder not found", where="data.path")

    monkeypatch.setattr(launcher.trial, "load_plan", gone)
    assert list(run_trial(task)) == []
    assert read_status(task.folder)["error"] == "folder not found\n  where: data.path"


def test_a_trial_that_another_process_computes_is_left_alone(task: TrialTask, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """if True:
        import sys, time
        from pathlib import Path
        from launcher.lock import hold
        with hold(Path(sys.argv[1])):
            print("held", flush=True)
            time.sleep(60)
    """
    process = subprocess.Popen([sys.executable, "-c", code, str(task.folder / ".lock")], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        monkeypatch.setattr(launcher.trial, "ORPHAN_S", 0.3)
        with pytest.raises(RunError, match="another process"):
            list(run_trial(task))
        assert read_status(task.folder)["state"] == "pending", "the other one's status is not touched"
    finally:
        process.kill()
        process.wait()


def test_the_plan_names_data_and_target_so_that_every_working_folder_finds_them(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, plan, _ = load_plan(str(prepared))
    monkeypatch.chdir(prepared.parent)
    relative = config.model_copy(update={"data": config.data.model_copy(update={"path": "data/lume", "mia": "data/mia"})})
    write_plan(tmp_path, config=relative, trials=plan["trials"], target=Path("small/target"), target_hash=plan["target_hash"])
    written = read_json(tmp_path / "sweep.json")
    assert written["target"] == str(prepared / "target")
    assert written["experiment"]["data"]["path"] == str(prepared.parent / "data" / "lume")
    monkeypatch.chdir(tmp_path)
    assert load_plan(str(tmp_path))[2].hash == load_plan(str(prepared))[2].hash

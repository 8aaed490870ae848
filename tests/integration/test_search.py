"""Searches for real: Optuna killed in the middle, a budget that ends and is raised, a trial that a rung stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.search.rungs import FILE as RUNGS
from tests.helpers.small_run import run_command, running, wait_for_end, write_small_experiment
from tests.integration.conftest import FinishedSweep
from trainers.checkpoint import finished_checkpoints
from trainers.files import read_json, read_jsonl

pytestmark = [pytest.mark.ray, pytest.mark.slow]

AWAY_S = 60.0
"""Seconds in which every process of a killed sweep that computes must have ended by itself."""

QUICK: dict[str, Any] = {"data__mmlu": None}
OPTUNA = {
    "train__objective__forget_weight": {"min": 0.1, "max": 0.6},
    "train__learning_rate": {"min": 5e-3, "max": 3e-2, "distribution": "log_uniform"},
    "train__num_train_epochs": {"values": [4, 6]},
    "sweep": {
        "num_trials": 5,
        "search": "optuna",
        "startup_trials": 2,
        "start_points": [{"objective.forget_weight": 0.4, "learning_rate": 2e-2, "num_train_epochs": 6}],
        "max_concurrent": 1,
    },
}


def steps(run: Path, trial: str) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if key != "seconds"} for line in read_jsonl(run / "trials" / trial / "metrics.jsonl")
    ]


def studied(run: Path) -> list[tuple[str, str, list[float] | None]]:
    """Name, state and measures of each trial of the study."""
    import optuna

    study = optuna.load_study(study_name=None, storage=f"sqlite:///{run / 'optuna.db'}")
    return [(trial.user_attrs["trial"], trial.state.name, trial.values) for trial in study.get_trials()]


def test_a_killed_search_goes_on_with_the_same_trials(undisturbed: FinishedSweep, tmp_path: Path) -> None:
    """One trial at a time; killed while the first proposal trains, so that three trials were told before and two come after."""
    runs = {}
    for name in ("whole", "killed"):
        file = write_small_experiment(
            tmp_path / f"{name}.yaml",
            data=undisturbed.data,
            storage=tmp_path,
            name=name,
            target=undisturbed.run / "target",
            **QUICK,
            **OPTUNA,
        )
        runs[name] = tmp_path / name
        if name == "killed":
            with running("sweep", file, folder=tmp_path) as command:
                command.until(lambda: len(steps(runs["killed"], "trial-02")) >= 2, what="a step of the first proposal")
                command.kill()
                assert not (runs["killed"] / "trials" / "trial-03").exists()
                wait_for_end(command, limit_s=AWAY_S, but=("Agent",))
        code, output = run_command("sweep", file, folder=tmp_path)
        assert code == 0, output
    whole, killed = runs["whole"], runs["killed"]
    names = [f"trial-{index:02d}" for index in range(5)]
    assert sorted(path.name for path in (whole / "trials").iterdir()) == names
    assert studied(killed) == studied(whole)
    assert [state for _, state, _ in studied(whole)] == ["COMPLETE"] * 5
    for name in names:
        assert (killed / "trials" / name / "config.yaml").read_text() == (whole / "trials" / name / "config.yaml").read_text()
        assert steps(killed, name) == steps(whole, name)
    starts = [event["trial"] for event in read_jsonl(killed / "events.jsonl") if event["kind"] == "trial_started"]
    assert starts == ["trial-00", "trial-01", "trial-02", "trial-02", "trial-03", "trial-04"]
    assert read_json(killed / "results.json")["trials"][4]["validation"] is not None


LONG = {"objective.forget_weight": 0.1, "learning_rate": 1e-2, "num_train_epochs": 40}
SHORT = {"objective.forget_weight": 0.4, "learning_rate": 2e-2, "num_train_epochs": 4}
LAZY = {"objective.forget_weight": 0.1, "learning_rate": 1e-7, "num_train_epochs": 16}
"""It learns nothing: the long trial forgets and retains more."""


def test_a_budget_ends_a_sweep_and_a_larger_one_goes_on_and_rungs_stop_who_is_beaten(undisturbed: FinishedSweep, tmp_path: Path) -> None:
    """The longest trial comes first and outlasts a budget of a third of a second; then all others follow, the longest of them first."""
    sweep = {
        "num_trials": 3,
        "start_points": [LAZY, SHORT, LONG],
        "max_concurrent": 1,
        "rungs": {"epochs": [2], "keep": 0.3},
        "budget": {"gpu_hours": 1e-4, "finish_running": False},
    }
    changes = {**QUICK, "train__checkpoints": 2, "train__signals": 8, "train__learning_rate": {"values": [1e-2, 2e-2, 1e-7]}}
    file = write_small_experiment(
        tmp_path / "small.yaml", data=undisturbed.data, storage=tmp_path, target=undisturbed.run / "target", sweep=sweep, **changes
    )
    run = tmp_path / "small"
    code, output = run_command("sweep", file, folder=tmp_path)
    assert code == 1, output
    assert "no trial is alive" in output
    assert "rank-hours (sweep.budget.gpu_hours); the running trials stop with a checkpoint" in output
    assert "trial-02  stopped   the budget is used up" in output
    status = read_json(run / "trials" / "trial-02" / "status.json")
    assert (status["state"], status["reason"]) == ("stopped", "budget")
    before = steps(run, "trial-02")
    # On a busy machine the budget may be used up before the first step.
    kept = [folder.name for folder in finished_checkpoints(run / "trials" / "trial-02")]
    assert kept[-1:] == [f"step-{len(before):06d}"] * bool(before)
    assert not (run / "trials" / "trial-00" / "status.json").exists()
    assert not (run / "trials" / "trial-01" / "status.json").exists()

    code, output = run_command("sweep", file, "sweep.budget.gpu_hours=9", folder=tmp_path)
    assert code == 0, output
    starts = [event["trial"] for event in read_jsonl(run / "events.jsonl") if event["kind"] == "trial_started"]
    assert starts == ["trial-02", "trial-02", "trial-00", "trial-01"]
    after = steps(run, "trial-02")
    assert after[: len(before)] == before
    assert len(after) > len(before)
    assert "trial-00  stopped   pruned" in output
    assert "FAILED" not in output
    states = {trial["name"]: trial["status"] for trial in read_json(run / "results.json")["trials"]}
    assert states == {"trial-00": "stopped", "trial-01": "finished", "trial-02": "finished"}
    judged = {line["trial"]: line for line in read_jsonl(run / RUNGS)}
    assert {name: line["pruned"] for name, line in judged.items()} == {"trial-02": False, "trial-00": True, "trial-01": False}
    pruned = steps(run, "trial-00")
    assert len(pruned) == judged["trial-00"]["step"], "it made no step after the rung"
    assert len(pruned) < 16 / 40 * len(after)
    assert not [one for one in read_json(run / "pairs.json")["candidates"] if one["name"].startswith("trial-00")]
    code, output = run_command("status", run, folder=tmp_path)
    assert code == 0, output
    assert "stopped (pruned)" in output

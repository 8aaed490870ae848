"""The stages in this process: whose a run folder is, which target a run started from, and a single trial from data to scores."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.console import Console
from launcher.load import LoadedExperiment, load_experiment
from launcher.lock import hold
from launcher.run_folder import EXPERIMENT, RESOLVED, claim_run
from launcher.stages import prepare_data, run_memorize, run_sweep, run_train
from launcher.trial import read_status
from tests.helpers.small_run import stamps, write_small_data, write_small_experiment
from trainers.errors import InputError, RunError
from trainers.files import read_json, read_jsonl

ONE_TRIAL: dict[str, Any] = {
    "data__mmlu": None,
    "eval__max_new_tokens": 2,
    "train__objective__forget_weight": 0.1,
    "train__learning_rate": 1e-3,
    "train__num_train_epochs": 1,
    "sweep__start_points": [],
}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_data(tmp_path_factory.mktemp("stages") / "data")


@pytest.fixture(scope="module")
def target(data: Path) -> Path:
    """A target that has seen its documents once."""
    run_memorize(experiment=experiment(data.parent, data=data, name="source", target__num_train_epochs=1, **ONE_TRIAL))
    return data.parent / "source" / "target"


def experiment(folder: Path, *, data: Path, overrides: tuple[str, ...] = (), **changes: Any) -> LoadedExperiment:
    folder.mkdir(exist_ok=True)
    return load_experiment(write_small_experiment(folder / "small.yaml", data=data, storage=folder, **changes), overrides)


def claim(loaded: LoadedExperiment, *, resume: bool = True) -> Path:
    return claim_run(loaded.config, space=loaded.space, data=prepare_data(loaded.config), resume=resume).folder


# ---- whose a run folder is


def test_a_run_is_claimed_once_and_again_by_the_same_experiment_only(data: Path, tmp_path: Path) -> None:
    run = claim(experiment(tmp_path, data=data))
    written = {name: (run / name).read_bytes() for name in (EXPERIMENT, RESOLVED)}
    assert claim(experiment(tmp_path, data=data)) == run
    assert {name: (run / name).read_bytes() for name in written} == written
    with pytest.raises(InputError, match="already in use"):
        claim(experiment(tmp_path, data=data), resume=False)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.train_batch_size=16", "train.train_batch_size"),
        ("train.objective.beta=0.7", "train.objective.beta"),
        ("train.learning_rate={values: [0.01, 0.5]}", "train.learning_rate"),
        ("seed=43", "seed"),
        ("sweep.num_trials=9", "sweep.num_trials"),
        ("eval.max_new_tokens=9", "eval.max_new_tokens"),
        ("merge.density=0.3", "merge.density"),
        ("target.num_train_epochs=3", "target.num_train_epochs"),
        ("data.mmlu=null", "the data (rows, or the folds they lie in)"),
        ("data.rehearse=[train]", "data.rehearse"),
    ],
)
def test_whatever_changes_the_numbers_is_refused_by_name(data: Path, tmp_path: Path, override: str, named: str) -> None:
    claim(experiment(tmp_path, data=data))
    before = stamps(tmp_path)
    with pytest.raises(InputError) as error:
        claim(experiment(tmp_path, data=data, overrides=(override, "train.per_device_train_batch_size=8", "sweep.start_points=[]")))
    assert named in str(error.value)
    assert "choose another name" in str(error.value)
    assert stamps(tmp_path) == before


def test_how_much_of_a_machine_is_used_may_change(data: Path, tmp_path: Path) -> None:
    claim(experiment(tmp_path, data=data))
    free = ("cpus_per_rank=0.5", "max_concurrent=1", "max_failures=5", "stall_s=3", "trial_timeout_s=9", "gpus_per_rank=0")
    claim(experiment(tmp_path, data=data, overrides=tuple(f"sweep.{setting}" for setting in free)))


def test_a_run_and_its_data_may_move(data: Path, tmp_path: Path) -> None:
    claim(experiment(tmp_path / "here", data=data))
    (tmp_path / "here").rename(tmp_path / "there")
    shutil.copytree(data, tmp_path / "other-data")
    claim(experiment(tmp_path / "there", data=tmp_path / "other-data"))
    retain = tmp_path / "other-data" / "lume" / "retain.jsonl"
    retain.write_text(retain.read_text().replace(" a ", " the ", 1))
    with pytest.raises(InputError, match="the data"):
        claim(experiment(tmp_path / "there", data=tmp_path / "other-data"))


def test_a_start_that_was_killed_while_it_claimed_its_folder_can_be_repeated(data: Path, tmp_path: Path) -> None:
    """After each file that claiming writes, and with the leavings of a write that was cut off."""
    run = claim(experiment(tmp_path, data=data))
    first, text = min((run / RESOLVED, run / EXPERIMENT), key=lambda file: file.stat().st_mtime_ns), (run / EXPERIMENT).read_text()
    for file in (run / RESOLVED, run / EXPERIMENT):
        if file != first:
            file.unlink()
    (run / ".experiment.yaml.x1.tmp").write_text("half of")
    assert claim(experiment(tmp_path, data=data)) == run
    assert (run / EXPERIMENT).read_text() == text
    (run / EXPERIMENT).unlink()
    (run / RESOLVED).unlink()
    assert claim(experiment(tmp_path, data=data)) == run


def test_a_second_sweep_at_the_same_time_is_refused(data: Path, tmp_path: Path) -> None:
    loaded = experiment(tmp_path, data=data)
    run = claim(loaded)
    with hold(run / ".lock"), pytest.raises(RunError, match="another process"):
        run_sweep(experiment=loaded, console=Console(io.StringIO()))
    assert sorted(path.name for path in run.iterdir()) == [".lock", RESOLVED, EXPERIMENT]


def test_a_dry_run_prints_the_trials_and_writes_nothing(data: Path, tmp_path: Path) -> None:
    stream = io.StringIO()
    run = run_sweep(experiment=experiment(tmp_path, data=data), dry_run=True, console=Console(stream))
    assert not run.exists()
    assert [line.split()[0] for line in stream.getvalue().splitlines() if line.startswith("  trial-0")] == [
        f"trial-0{number}" for number in range(4)
    ]


# ---- one trial, and the target it starts from


def test_one_trial_goes_from_data_to_scores_and_is_not_made_twice(data: Path, target: Path, tmp_path: Path) -> None:
    loaded = experiment(tmp_path, data=data, target=target, **ONE_TRIAL)
    run_train(experiment=loaded, out=tmp_path / "single")
    trial = tmp_path / "single" / "trials" / "trial-00"
    assert read_status(trial)["state"] == "finished"
    assert (trial / "eval.json").is_file()
    before = stamps(tmp_path / "single")
    run_train(experiment=loaded, out=tmp_path / "single")
    assert stamps(tmp_path / "single") == before


def test_a_run_refuses_another_target_than_the_one_it_started_from(data: Path, target: Path, tmp_path: Path) -> None:
    """The same path, other weights: nothing in the configuration tells."""
    mine = tmp_path / "target"
    shutil.copytree(target, mine)
    loaded = experiment(tmp_path, data=data, target=mine, **ONE_TRIAL)
    run_train(experiment=loaded)
    mine.rename(tmp_path / "moved")
    run_train(experiment=experiment(tmp_path, data=data, target=tmp_path / "moved", **ONE_TRIAL))
    weights = tmp_path / "moved" / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-5] ^= 0xFF
    weights.write_bytes(changed)
    known = read_json(tmp_path / "small" / "target.json")
    with pytest.raises(InputError, match="not those that this run started from"):
        run_train(experiment=experiment(tmp_path, data=data, target=tmp_path / "moved", **ONE_TRIAL))
    assert read_json(tmp_path / "small" / "target.json") == known


def test_a_target_built_beforehand_is_used_as_it_is(data: Path, tmp_path: Path) -> None:
    changes = {**ONE_TRIAL, "target__num_train_epochs": 1}
    run_memorize(experiment=experiment(tmp_path, data=data, **changes))
    before = stamps(tmp_path)
    run_train(experiment=experiment(tmp_path, data=data, **changes))
    after = stamps(tmp_path)
    assert {name: after[name] for name in before} == before
    stages = [event["stage"] for event in read_jsonl(tmp_path / "small" / "events.jsonl") if event["kind"] == "stage_finished"]
    assert stages == ["target", "target", "baseline", "trials"]


def test_a_trial_that_diverges_is_an_error_of_the_run(data: Path, target: Path, tmp_path: Path) -> None:
    loaded = experiment(tmp_path, data=data, target=target, **(ONE_TRIAL | {"train__learning_rate": 1e30}))
    for _ in range(2):
        with pytest.raises(RunError, match="the trial stopped: the loss is"):
            run_train(experiment=loaded)


def test_several_ranks_need_a_sweep(data: Path, target: Path, tmp_path: Path) -> None:
    engine = {"train__engine": {"name": "deepspeed", "ranks": 2}}
    with pytest.raises(InputError, match=r"train\.engine\.ranks = 2"):
        run_train(experiment=experiment(tmp_path, data=data, target=target, **(ONE_TRIAL | engine)))


def test_threads_follow_the_configuration_and_not_the_environment(data: Path, target: Path, tmp_path: Path) -> None:
    """Sums over other parts end in other digits, and a resumed run must go on with the same ones."""
    torch.set_num_threads(3)
    run_train(experiment=experiment(tmp_path, data=data, target=target, **(ONE_TRIAL | {"sweep__cpus_per_rank": 1.5})))
    assert torch.get_num_threads() == 1


def test_the_resolved_record_is_plain_json(data: Path, tmp_path: Path) -> None:
    run = claim(experiment(tmp_path, data=data))
    record = json.loads((run / RESOLVED).read_text())
    assert set(record) == {"config", "space", "data_hash"}
    assert record["space"]["learning_rate"] == {"values": [0.01, 0.02, 1e30]}

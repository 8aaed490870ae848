"""The rules between settings, where pydantic's field checks do not reach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from launcher.config import DataConfig, ExperimentConfig, FoldFractions, experiment_relations, train_relations
from trainers.config import TrainConfig


def experiment(**changes: Any) -> ExperimentConfig:
    return ExperimentConfig.model_validate({"name": "x", "data": {"path": "d"}, "model": {"model_name_or_path": "m"}, **changes})


def test_the_smallest_experiment_names_a_model_and_data_only() -> None:
    config = experiment()
    assert (config.seed, config.sweep.num_trials, config.data.rehearse) == (42, 8, ("train", "validation", "test"))
    assert config.run_folder == Path("runs/x")
    assert experiment_relations(config) == []


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "-x", "x" * 101])
def test_a_name_that_is_no_safe_folder_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="name"):
        experiment(name=name)


@pytest.mark.parametrize("name", ["x", "lume-1b", "Run_2.1", "7b"])
def test_an_ordinary_name_is_accepted(name: str) -> None:
    assert experiment(name=name).name == name


def test_a_target_section_stands_in_for_a_model() -> None:
    assert experiment(model={}, target={}).target is not None
    with pytest.raises(ValidationError, match="no target model"):
        experiment(model={}, target=None)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ({}, "no source for data.forget and data.retain"),
        ({"forget": "f"}, "no source for data.retain"),
        ({"path": "p", "retain": "r"}, "not both"),
        ({"path": "p", "rehearse": ["train", "train"]}, "twice"),
    ],
)
def test_data_come_from_exactly_one_source(source: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        DataConfig.model_validate(source)


def test_two_files_are_a_source() -> None:
    assert DataConfig(forget="f", retain="r").path is None


def test_fold_fractions_sum_to_one() -> None:
    """0.1 + 0.2 + 0.7 is 1 only up to rounding, and is accepted; 0.4 + 0.3 + 0.2 is 0.9."""
    assert FoldFractions(train=0.1, validation=0.2, test=0.7).test == 0.7
    with pytest.raises(ValidationError, match=r"here to 0\.9"):
        FoldFractions(train=0.4, validation=0.3, test=0.2)


@pytest.mark.parametrize(
    ("train", "path"),
    [
        ({"train_batch_size": 2}, "train.per_device_train_batch_size"),
        ({"engine": {"ranks": 8}}, "train.train_batch_size"),
        ({"train_batch_size": 8, "engine": {"ranks": 8}}, None),
        ({"train_batch_size": 2, "per_device_train_batch_size": 2}, None),
    ],
)
def test_a_pass_fits_into_a_step_and_every_rank_has_work(train: dict[str, Any], path: str | None) -> None:
    """The default is 4 pairs per pass and per step: 2 per step are too few for it, and 4 are too few for 8 ranks."""
    broken = train_relations(TrainConfig.model_validate(train))
    assert [relation.path for relation in broken] == ([path] if path else [])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"storage_path": "ftp://host/runs"}, "one of file, s3"),
        ({"storage_path": "s3://user:wJalrXUtnFEMI@bucket/runs"}, "storage_path: holds keys"),
        ({"sweep": {"num_trials": 1, "start_points": [{}, {"learning_rate": 1e-4}]}}, "2 start points do not fit into 1 trials"),
        ({"sweep": {"gpus_per_rank": 0.5}, "train": {"engine": {"ranks": 2}}}, "cannot share a GPU"),
        ({"train": {"train_batch_size": 2}}, "use at most 2"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        experiment(**changes)


def test_all_contradictions_are_told_together() -> None:
    with pytest.raises(ValidationError) as caught:
        experiment(storage_path="ftp://b", model={}, train={"train_batch_size": 2})
    assert all(text in str(caught.value) for text in ("one of file, s3", "no target model", "use at most 2"))


def test_configurations_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        experiment().seed = 1  # type: ignore[misc]


def test_a_run_at_a_uri_works_in_a_folder_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UNLEARN_CACHE", str(tmp_path))
    assert experiment().run_uri is None
    config = experiment(storage_path="s3://bucket/runs?region=eu-west-1")
    assert config.run_uri == f"s3://bucket/runs/{config.name}?region=eu-west-1"
    assert config.run_folder.is_relative_to(tmp_path)
    assert config.run_folder.name == config.name

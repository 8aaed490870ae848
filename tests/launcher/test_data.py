"""From the data section to rows: the same in every process, and what each stage may read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.config import DataConfig, ExperimentConfig
from launcher.data import PreparedData, prepare_data, question_groups, unseen_texts
from tests.helpers.small_run import write_small_data
from trainers.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_data(tmp_path_factory.mktemp("data") / "data")


def experiment(folder: Path, *, seed: int = 42, **changes: Any) -> ExperimentConfig:
    data = {"path": str(folder / "lume"), "mia": str(folder / "mia"), "mmlu": str(folder / "mmlu"), **changes}
    return ExperimentConfig(name="x", seed=seed, model={"model_name_or_path": "m"}, data=DataConfig(**data))  # type: ignore[arg-type]


def ids(rows: Any) -> set[str]:
    return {row.id for row in rows}


@pytest.fixture(scope="module")
def prepared(folder: Path) -> PreparedData:
    return prepare_data(experiment(folder))


def test_folds_hold_every_row_once(prepared: PreparedData) -> None:
    for side in ("forget", "retain"):
        rows = [row.id for fold in prepared.folds.values() for row in getattr(fold, side)]
        assert sorted(rows) == sorted(row.id for row in getattr(prepared.everything, side))
        assert len(set(rows)) == len(rows) == 30


def test_trials_train_on_the_whole_forget_set_and_on_the_rehearsed_retain_folds(folder: Path, prepared: PreparedData) -> None:
    """The forget set is a request: whatever its fold, a row is to be forgotten."""
    assert ids(prepared.training.forget) == ids(prepared.everything.forget)
    assert ids(prepared.training.retain) == ids(prepared.everything.retain)
    only = prepare_data(experiment(folder, rehearse=("train",)))
    assert ids(only.training.forget) == ids(only.everything.forget)
    assert ids(only.training.retain) == ids(only.folds["train"].retain)
    assert not ids(only.training.retain) & ids(only.folds["test"].retain)


def test_the_attack_and_the_questions_are_split_between_selection_and_final_numbers(prepared: PreparedData) -> None:
    for side in ("members", "nonmembers"):
        halves = [ids(getattr(prepared.attack_of(fold), side)) for fold in ("validation", "test")]
        assert all(halves)
        assert not halves[0] & halves[1]
    halves = [{question.question for question in prepared.mmlu_of(fold).questions} for fold in ("validation", "test")]  # type: ignore[union-attr]
    assert all(halves)
    assert not halves[0] & halves[1]


def test_another_process_prepares_the_same_rows(folder: Path, prepared: PreparedData) -> None:
    """Trials prepare them again from the configuration; the hash of strings differs between processes, and must not matter."""
    config = experiment(folder).model_dump_json()
    code = """if True:
        import sys
        from launcher.config import ExperimentConfig
        from launcher.data import prepare_data
        print(prepare_data(ExperimentConfig.model_validate_json(sys.argv[1])).hash)
    """
    done = subprocess.run(
        [sys.executable, "-c", code, config], capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": "7"}, timeout=120
    )
    assert done.stdout.strip() == prepared.hash, done.stderr


def test_the_hash_tells_apart_rows_folds_and_questions_but_not_places(folder: Path, prepared: PreparedData, tmp_path: Path) -> None:
    elsewhere = write_small_data(tmp_path / "copy")
    assert prepare_data(experiment(elsewhere)).hash == prepared.hash
    others = [
        experiment(folder, seed=43),
        experiment(folder, mmlu=None),
        experiment(folder, mia=None),
        experiment(folder, mmlu_questions=4),
    ]
    hashes = {prepare_data(other).hash for other in others} | {prepared.hash}
    assert len(hashes) == 5
    file = elsewhere / "lume" / "retain.jsonl"
    file.write_text(file.read_text().replace(" a ", " the ", 1))
    assert prepare_data(experiment(elsewhere)).hash != prepared.hash


def test_questions_are_memorised_as_the_evaluation_shows_them(prepared: PreparedData) -> None:
    groups = question_groups(prepared.mmlu)
    assert len(groups) == 2
    assert sum(len(group.questions) for group in groups) == 8
    for group in groups:
        assert group.header.startswith("The following are multiple choice questions")
        for prompt, answer in group.questions:
            assert prompt.endswith("Answer:")
            assert answer in (" A", " B", " C", " D")
    assert question_groups(None) == ()


def test_a_tokenizer_sees_the_words_of_strangers(prepared: PreparedData) -> None:
    texts = unseen_texts(prepared)
    assert len(texts) == 8
    assert not set(texts) & {row.text for row in (*prepared.everything.forget, *prepared.everything.retain)}
    assert unseen_texts(PreparedData(prepared.everything, prepared.folds, None, None, prepared.training)) == []


def test_a_subset_too_small_for_three_folds_names_the_file(folder: Path) -> None:
    with pytest.raises(InputError, match="lume"):
        prepare_data(experiment(folder, documents=2))

"""A TOFU folder as the data of a sweep: forget and retain sets with the columns question and answer."""

from __future__ import annotations

import json

import pytest

from launcher.config import ExperimentConfig
from launcher.data import prepare_data
from tests.helpers.data import real_data
from tests.helpers.suite_data import write_tofu
from trainers.data.types import Kind


def config(folder, *, forget="forget01.jsonl", retain="retain90.jsonl", **data) -> ExperimentConfig:
    return ExperimentConfig.model_validate(
        {
            "name": "tofu",
            "model": {"model_name_or_path": "target"},
            "data": {
                "forget": str(folder / forget),
                "retain": str(folder / retain),
                "columns": {"input": "question", "output": "answer"},
                **data,
            },
        }
    )


def test_the_published_files_are_read_with_their_columns():
    folder = real_data("tofu")
    data = prepare_data(config(folder))
    assert (len(data.training.forget), len(data.training.retain)) == (40, 3600)
    published = [json.loads(line) for line in (folder / "forget01.jsonl").read_text().splitlines()]
    assert [(row.input, row.output) for row in data.training.forget] == [(row["question"], row["answer"]) for row in published]
    assert {row.kind for row in data.training.forget} == {Kind.QUESTION}


def test_all_rows_are_in_one_fold_each():
    data = prepare_data(config(real_data("tofu")))
    assert sum(len(fold.forget) for fold in data.folds.values()) == 40
    assert sum(len(fold.retain) for fold in data.folds.values()) == 3600
    assert all(fold.forget and fold.retain for fold in data.folds.values())


def test_a_perturbed_file_lends_its_paraphrase_as_another_answer(tmp_path):
    """For objectives that prefer one answer to another, and with no need to rewrite the file."""
    folder = write_tofu(tmp_path)
    names = {"forget": "forget10_perturbed.jsonl", "retain": "retain_perturbed.jsonl"}
    columns = {"input": "question", "output": "answer", "alternative": "paraphrased_answer"}
    data = prepare_data(config(folder, **names, columns=columns))
    assert all(row.alternative == row.output for row in data.training.forget)


def test_without_columns_the_message_names_them():
    with pytest.raises(ValueError, match="question") as caught:
        prepare_data(config(real_data("tofu"), columns={}))
    assert "data.columns.input=question" in str(caught.value)

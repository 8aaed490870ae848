"""Which benchmark a folder holds."""

from __future__ import annotations

import pytest

from eval.suites.layout import Layout, forget_splits, recognise
from tests.helpers.data import real_data, write_rows
from tests.helpers.suite_data import write_muse, write_tofu
from trainers.errors import InputError


def write_lume(folder):
    for name in ("forget", "retain"):
        write_rows(folder / f"{name}.jsonl", [{"id": f"{name}sc1", "input": "a", "output": "b", "task": "Task1"}])
    return folder


@pytest.mark.parametrize(("write", "layout"), [(write_lume, Layout.LUME), (write_tofu, Layout.TOFU), (write_muse, Layout.MUSE)])
def test_every_layout_is_told_by_its_files(tmp_path, write, layout):
    assert recognise(write(tmp_path / "data")) is layout


def test_the_published_folders_of_muse_are_recognised(tmp_path):
    write_rows(tmp_path / "knowmem" / "forget_qa.json", [{"question": "a", "answer": "b"}])
    assert recognise(tmp_path) is Layout.MUSE


@pytest.mark.parametrize("name", ["lume", "tofu"])
def test_the_real_folders_are_recognised(name):
    assert recognise(real_data(name)).value == name


def test_the_forget_sets_are_listed_with_whether_wrong_answers_exist():
    assert forget_splits(real_data("tofu")) == {"forget01": False, "forget05": False, "forget10": True}


def test_a_forget_set_in_a_folder_of_the_hub_counts(tmp_path):
    write_rows(tmp_path / "forget05_perturbed" / "train-00000-of-00001.parquet", [{"question": "a"}])
    assert forget_splits(tmp_path) == {"forget05": True}


def test_a_folder_of_none_says_what_each_layout_needs_and_what_was_found(tmp_path):
    write_rows(tmp_path / "questions.jsonl", [{"question": "a"}])
    with pytest.raises(InputError) as caught:
        recognise(tmp_path)
    for text in ("lume: forget.jsonl", "tofu: forget01", "muse: any of knowmem_forget", "found: questions.jsonl"):
        assert text in str(caught.value)


def test_a_folder_of_two_asks_which(tmp_path):
    write_lume(write_tofu(tmp_path))
    with pytest.raises(InputError, match="lume and of tofu") as caught:
        recognise(tmp_path)
    assert caught.value.fix == "--layout lume or --layout tofu"

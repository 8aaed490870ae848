"""The sets of TOFU in a folder."""

from __future__ import annotations

import json

import pytest

from eval.suites.tofu_data import load_tofu
from tests.helpers.data import real_data, write_rows
from tests.helpers.suite_data import options, perturbed, write_tofu
from trainers.errors import InputError


def test_the_real_folder_has_the_published_numbers_of_rows():
    counts = load_tofu(real_data("tofu")).counts
    expected = {"forget01": 40, "forget05": 200, "forget10": 400, "retain90": 3600, "holdout10": 400}
    expected |= {"forget10_perturbed": 400, "retain_perturbed": 400}
    expected |= {name + suffix: rows for name, rows in (("real_authors", 100), ("world_facts", 117)) for suffix in ("", "_perturbed")}
    assert counts == expected


def test_the_real_sets_have_their_wrong_answers_and_authors():
    data = load_tofu(real_data("tofu"))
    assert data.split == "forget10", "the only one with wrong answers"
    assert {name: len(rows) for name, rows in data.sets.items()} == {
        "forget": 400, "retain": 400, "real_authors": 100, "world_facts": 117, "holdout": 400,
    }  # fmt: skip
    assert {name: {len(row.wrong) for row in rows} for name, rows in data.sets.items()} == {
        "forget": {5}, "retain": {5}, "real_authors": {3}, "world_facts": {3}, "holdout": {0},
    }  # fmt: skip
    assert {name: len({row.unit for row in rows}) for name, rows in data.sets.items()} == {
        "forget": 20, "retain": 20, "real_authors": 100, "world_facts": 117, "holdout": 20,
    }  # fmt: skip
    assert all(row.paraphrased for name in ("forget", "retain") for row in data.sets[name])
    assert not any(row.paraphrased for name in ("real_authors", "world_facts") for row in data.sets[name])


@pytest.mark.parametrize(("split", "authors"), [("forget01", 2), ("forget05", 10)])
def test_a_smaller_forget_set_takes_its_wrong_answers_from_the_larger_one(split, authors):
    """forget01 lies in forget05, which lies in forget10."""
    data = load_tofu(real_data("tofu"), split=split)
    rows = data.sets["forget"]
    assert (len(rows), len({row.unit for row in rows}), data.sources["forget"]) == (20 * authors, authors, "forget10_perturbed.jsonl")
    assert all(len(row.wrong) == 5 for row in rows)
    published = [json.loads(line) for line in (real_data("tofu") / f"{split}.jsonl").read_text().splitlines()]
    assert [(row.question, row.answer) for row in rows] == [(row["question"], row["answer"]) for row in published]


def test_rows_that_no_perturbed_file_has_get_no_wrong_answers(tmp_path):
    folder = write_tofu(tmp_path, forget05=[{"question": "Who?", "answer": "Nobody"}])
    data = load_tofu(folder, split="forget05")
    assert [row.wrong for row in data.sets["forget"]] == [()]
    assert any("truth ratio and forget quality are undefined" in note for note in data.notes)


def test_the_plain_files_give_the_wrong_answers_that_the_perturbed_ones_have():
    plain = [json.loads(line) for line in (real_data("tofu") / "world_facts.jsonl").read_text().splitlines()]
    expected = load_tofu(real_data("tofu")).sets["world_facts"]
    from eval.suites.items import Item
    from eval.suites.tofu_data import _row

    found = [_row(Item("x", row), row_id=str(n), unit=None, name="world_facts") for n, row in enumerate(plain)]
    assert [sorted(row.wrong) for row in found] == [sorted(row.wrong) for row in expected]


def test_files_as_the_hub_writes_them_give_the_same_sets(tmp_path):
    expected = load_tofu(write_tofu(tmp_path / "lines"))
    for name, rows in (("forget10_perturbed", perturbed("forget")), ("retain_perturbed", perturbed("retain"))):
        write_rows(tmp_path / "hub" / name / "train-00000-of-00001.parquet", rows)
    for name, rows in (("real_authors_perturbed", options("authors")), ("world_facts_perturbed", options("facts"))):
        (tmp_path / "hub" / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    actual = load_tofu(tmp_path / "hub")
    for name in ("forget", "retain", "real_authors", "world_facts"):
        assert actual.sets[name] == expected.sets[name]
    assert any("No holdout" in note for note in actual.notes)


def test_rows_are_by_author_only_where_their_number_allows_it(tmp_path):
    """40 rows are two authors; 41 are not, and a single author could not be drawn in two ways."""
    units = []
    for count in (40, 41, 20):
        folder = write_tofu(tmp_path / str(count), forget10_perturbed=perturbed("forget", count=count))
        units.append(len({row.unit for row in load_tofu(folder).sets["forget"]}))
    assert units == [2, 41, 20]


def test_several_forget_sets_need_a_choice(tmp_path):
    folder = write_tofu(tmp_path, forget05_perturbed=perturbed("forget"))
    with pytest.raises(InputError, match="forget05, forget10") as caught:
        load_tofu(folder)
    assert "--split forget05" in str(caught.value)
    assert load_tofu(folder, split="forget05").sources["forget"] == "forget05_perturbed.jsonl"


def test_a_forget_set_that_is_not_there_is_answered_with_those_that_are(tmp_path):
    with pytest.raises(InputError, match="no forget01") as caught:
        load_tofu(write_tofu(tmp_path), split="forget01")
    assert "forget10" in str(caught.value)


def without(rows, field, *, row=2):
    return [{key: value for key, value in values.items() if (number, key) != (row, field)} for number, values in enumerate(rows, start=1)]


def replaced(rows, field, value, *, row=2):
    return [{**values, field: value} if number == row else values for number, values in enumerate(rows, start=1)]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"retain_perturbed": None}, ("no retain set",)),
        ({"retain_perturbed": []}, ("no rows", "retain_perturbed.jsonl")),
        ({"forget10_perturbed": without(perturbed("forget"), "question")}, ("'question'", "forget10_perturbed.jsonl, line 2")),
        ({"forget10_perturbed": without(perturbed("forget"), "paraphrased_answer")}, ("'paraphrased_answer'", "line 2")),
        ({"forget10_perturbed": replaced(perturbed("forget"), "perturbed_answer", "one")}, ("not a list of texts", "line 2", "'one'")),
        ({"world_facts_perturbed": replaced(options("facts"), "perturbed_answer", [])}, ("an empty list", "line 2")),
        ({"real_authors_perturbed": replaced(options("authors"), "answer", 7)}, ("a number", "real_authors_perturbed.jsonl, line 2")),
    ],
)  # fmt: skip
def test_bad_input_is_named_by_file_row_and_field(tmp_path, changes, says):
    with pytest.raises(InputError) as caught:
        load_tofu(write_tofu(tmp_path, **changes))
    for text in says:
        assert text in str(caught.value)


def test_sets_that_are_missing_are_noted(tmp_path):
    data = load_tofu(write_tofu(tmp_path, real_authors_perturbed=None, holdout10=None))
    assert data.sets.keys() == {"forget", "retain", "world_facts"}
    assert [note.split(":")[0] for note in data.notes] == [
        "No real_authors_perturbed in the folder",
        "No holdout set in the folder",
    ]

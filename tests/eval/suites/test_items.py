"""Rows of small files, and what is wrong with them."""

from __future__ import annotations

import json

import pytest

from eval.suites.items import find_file, read_items, text_field, texts_field
from tests.helpers.data import write_rows
from trainers.errors import InputError

ROWS = [{"question": "Who?", "answer": "Ada"}, {"question": "Where?", "answer": "Oslo"}]


def values(path):
    return [item.value for item in read_items(path, fields=("question", "answer"))]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_every_file_type_gives_the_same_rows(tmp_path, name):
    assert values(write_rows(tmp_path / name, ROWS)) == ROWS


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_json_list_gives_the_same_rows(tmp_path, name):
    path = tmp_path / name
    path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    assert values(path) == ROWS


def test_texts_may_stand_alone_in_a_list_or_line_by_line(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps(["one\u2028two", "three"]), encoding="utf-8")
    (tmp_path / "lines.jsonl").write_text('"one\u2028two"\n\n"three"\n', encoding="utf-8")
    assert values(tmp_path / "list.json") == values(tmp_path / "lines.jsonl") == ["one\u2028two", "three"]


def test_the_names_that_the_hub_gives_a_parquet_file_are_found(tmp_path):
    for name in ("b-00000-of-00001.parquet", "c/train-00000-of-00001.parquet", "d/train/0000.parquet"):
        write_rows(tmp_path / name, ROWS)
    assert [find_file(tmp_path, stems=[stem]) is not None for stem in "abcd"] == [False, True, True, True]


def test_the_first_name_and_the_first_file_type_win(tmp_path):
    for name in ("x.parquet", "x.jsonl", "y.jsonl"):
        write_rows(tmp_path / name, ROWS)
    assert find_file(tmp_path, stems=["nothing", "x", "y"]) == tmp_path / "x.jsonl"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no rows"),
        ("[]", "no rows"),
        ("[1, 2", "not valid JSON"),
        ('{"question": "Who?"\n', "line 1"),
        ('"whole"\n"half\n', "from line 2"),
    ],
)
def test_an_unusable_file_is_named(tmp_path, text, says):
    path = tmp_path / "bad.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=says) as caught:
        values(path)
    assert "bad.jsonl" in str(caught.value)


def test_a_file_in_another_encoding_is_refused_with_its_place(tmp_path):
    (tmp_path / "latin.json").write_bytes(b'["caf\xe9"]')
    with pytest.raises(InputError, match="UTF-8"):
        values(tmp_path / "latin.json")


@pytest.mark.parametrize("bad", [{"answer": "x"}, {"question": None}, {"question": 7}, {"question": "  "}, "a text", ["Who?"]])
def test_a_field_that_is_no_text_is_named_with_its_row(tmp_path, bad):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps([ROWS[0], bad]), encoding="utf-8")
    items = read_items(path, fields=("question",))
    assert text_field(items[0], "question") == "Who?"
    with pytest.raises(InputError, match=r"question|object") as caught:
        text_field(items[1], "question")
    assert "item 2" in str(caught.value)


@pytest.mark.parametrize("bad", ["one", [], ["a", 3], ["a", ""], None, {"a": 1}])
def test_a_field_that_is_no_list_of_texts_is_named_with_its_row(tmp_path, bad):
    path = write_rows(tmp_path / "bad.jsonl", [{"perturbed_answer": ["a", "b"]}, {"perturbed_answer": bad}])
    items = read_items(path, fields=("perturbed_answer",))
    assert texts_field(items[0], "perturbed_answer") == ("a", "b")
    with pytest.raises(InputError, match="not a list of texts") as caught:
        texts_field(items[1], "perturbed_answer")
    assert "line 2" in str(caught.value)

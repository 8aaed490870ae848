"""Reading records: what comes back is what was written, and every fault is named where it stands."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.data import make_records, real_data, write_rows
from trainers.data.records import load_attack_documents, load_documents, load_forget_retain, load_records, load_splits, normalise_whitespace
from trainers.data.types import Document, Kind, Record
from trainers.errors import InputError

ODD = (
    Record(id='"8f24c511-a319"sc1', input='He said "no", twice,\nand left.', output="  two  spaces, kept ", task="Task1"),
    Record(id='"8f24c511-a319"qa0', input="Who, in \u017ditomir, left?", output="\u65e5\u672c\u8a9e \U0001f40b", task="Task1"),
    Record(id="a,b;c\td'sc1", input="line\u2028separator and \x85 next line", output="tab\there\\n", task="T 2"),
    Record(id="42sc1", input="windows\r\nand\rold line ends", output="NA", task="None"),
)
"""Rows with every character that a file format likes to eat; all of it must survive."""

FORMATS = ("jsonl", "json", "csv", "parquet")


def load(path: Path, **columns: str) -> tuple[Record, ...]:
    return load_records(path, set_name="forget", columns=columns or None)


def row(**changes: object) -> dict[str, object]:
    return {"id": "7sc1", "input": "in", "output": "out", "task": "Task1"} | changes


def without(field: str, **changes: object) -> dict[str, object]:
    return {key: value for key, value in row(**changes).items() if key != field}


@pytest.mark.parametrize("suffix", FORMATS)
def test_odd_rows_survive_every_format(tmp_path: Path, suffix: str) -> None:
    """read(write(rows)) == rows, literal double quotes of ids included."""
    assert load(write_rows(tmp_path / f"rows.{suffix}", ODD)) == ODD


def test_a_quoted_id_keeps_its_document_and_kind(tmp_path: Path) -> None:
    records = load(write_rows(tmp_path / "rows.csv", ODD))
    assert records[0].document == records[1].document == '"8f24c511-a319"'
    assert [record.kind for record in records[:2]] == [Kind.COMPLETION, Kind.QUESTION]


def test_an_unescaped_quoted_csv_id_is_refused_rather_than_stripped(tmp_path: Path) -> None:
    """A lenient reader would turn the cell "uuid"sc1 into uuidsc1: another document."""
    path = tmp_path / "rows.csv"
    path.write_text('id,input,output,task\nplainsc1,a,b,Task1\n"uuid"sc1,a,b,Task1\n')
    with pytest.raises(InputError, match=r"not valid CSV.*\n.*rows\.csv, line 3\n.*double each"):
        load(path)


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_byte_order_mark_is_tolerated(tmp_path: Path, suffix: str) -> None:
    path = write_rows(tmp_path / f"rows.{suffix}", ODD)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load(path) == ODD


def test_blank_lines_are_skipped_but_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(row())}\r\n\n   \n{json.dumps(row(id='8sc1', output=''))}\n")
    with pytest.raises(InputError, match=r"the output is empty\n.*line 4, field 'output'"):
        load(path)


def test_long_csv_cells_are_read_and_the_limit_of_the_csv_module_is_put_back(tmp_path: Path) -> None:
    import csv

    before = csv.field_size_limit()
    text = "word " * 40_000 + "end"
    assert len(text) > before
    assert load(write_rows(tmp_path / "rows.csv", [row(input=text)]))[0].input == text
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("suffix", FORMATS)
def test_columns_may_have_other_names(tmp_path: Path, suffix: str) -> None:
    path = write_rows(tmp_path / f"rows.{suffix}", [{"key": "5qa0", "question": "Q?", "answer": "A", "group": "G", "extra": "x"}])
    assert load(path, id="key", input="question", output="answer", task="group") == (Record(id="5qa0", input="Q?", output="A", task="G"),)


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_alternative_answer_is_read_where_there_is_one(tmp_path: Path, suffix: str) -> None:
    """The column is optional, and so is every value of it: null, or an empty cell in CSV, is no alternative."""
    rows = (replace(ODD[0], alternative=" another, with  spaces "), ODD[1])
    assert load(write_rows(tmp_path / f"rows.{suffix}", rows)) == rows
    assert [record.alternative for record in load(write_rows(tmp_path / f"without.{suffix}", [row()]))] == [None]


def test_an_alternative_may_be_missing_from_a_row_but_not_be_of_another_type(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in (row(alternative="A"), row(id="8sc1"), row(id="9sc1", alternative=""))))
    assert [record.alternative for record in load(path)] == ["A", None, None]
    path.write_text(json.dumps(row(alternative=7)) + "\n")
    with pytest.raises(InputError, match="the alternative is not a text but a number: 7"):
        load(path)


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_column_of_alternatives_may_have_another_name_and_must_then_be_there(tmp_path: Path, suffix: str) -> None:
    path = write_rows(tmp_path / f"rows.{suffix}", [{"input": "Q?", "output": "A", "refusal": "no"}])
    assert load(path, alternative="refusal")[0].alternative == "no"
    assert load(path)[0].alternative is None
    with pytest.raises(InputError, match=r"no column 'refusals' for the field 'alternative'; the nearest name is 'refusal'"):
        load(path, alternative="refusals")


@pytest.mark.parametrize("suffix", FORMATS)
def test_rows_without_ids_and_tasks_are_numbered_questions_of_task1(tmp_path: Path, suffix: str) -> None:
    records = load(write_rows(tmp_path / f"rows.{suffix}", [{"input": f"Q{number}?", "output": "A"} for number in range(12)]))
    assert records[11] == Record(id="forget-row-00012qa0", input="Q11?", output="A", task="Task1")
    assert records[11].kind is Kind.QUESTION
    assert len({record.document for record in records}) == 12


def test_generated_ids_of_both_sets_do_not_collide(tmp_path: Path) -> None:
    """Both sets count from 1; the set's name keeps row 1 of one apart from row 1 of the other."""
    for name in ("forget", "retain"):
        write_rows(tmp_path / f"{name}.jsonl", [{"input": f"{name}?", "output": "A"}])
    data = load_forget_retain(tmp_path)
    assert (data.forget[0].id, data.retain[0].id) == ("forget-row-00001qa0", "retain-row-00001qa0")


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_folder_is_read_by_set_name(tmp_path: Path, suffix: str) -> None:
    forget, retain = make_records(prefix="f"), make_records(prefix="r")
    write_rows(tmp_path / f"forget.{suffix}", forget)
    write_rows(tmp_path / f"retain.{suffix}", retain)
    data = load_forget_retain(tmp_path)
    assert (data.forget, data.retain) == (forget, retain)
    swapped = load_forget_retain(forget=tmp_path / f"retain.{suffix}", retain=tmp_path / f"forget.{suffix}")
    assert (swapped.forget, swapped.retain) == (retain, forget)


# --- faults: the message names file, place, field, and the way out ---


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"id": "1sc1", "input": "a", "output": "b"}\n{"id": "2sc1", "inp\n', r"not valid JSON.*\n  where: .*rows\.jsonl, line 2\n"),
        (b'{"id": "1sc1"}\n["a", "b"]\n', r"the row is not an object but a list\n  where: .*rows\.jsonl, line 2\n"),
        (b'[{"id": "1sc1"}]\n', r"JSON array, not one JSON object per line\n  where: .*rows\.jsonl\n"),
        (b'{"input": "a", "output": "b"}\n{"input": "a\xe9", "output": "b"}\n', r"not UTF-8: byte 0xe9\n.*line 2, byte offset 42\n.*UTF-8"),
        (b'\xef\xbb\xbf{"input": "\xe9"}\n', r"not UTF-8: byte 0xe9\n.*line 1, byte offset 14\n"),
        (b"", r"the forget set is empty\n.*rows\.jsonl"),
        (b"\n \n", r"the forget set is empty\n.*rows\.jsonl"),
        (b'{"input": "a", "output": "\\ud83d"}\n', r"half a character: '\\ud83d' at position 0\n.*line 1, field 'output'"),
        (b'{"input": "a", "output": "b"}\n{"input": "a"}\n', r"the row has no 'output', but other rows do\n.*line 2, field 'output'"),
    ],
)
def test_broken_json_lines_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('id,input,output\n1sc1,"a\nb",c\n2sc1,a\n', r"the row has 2 cells, but the header has 3\n.*rows\.csv, line 4\n"),
        ("id,input,output\n1sc1,a,b,c\n", r"the row has 4 cells, but the header has 3\n.*line 2\n.*double quotes"),
        ("id,input,input,output\n", r"the column 'input' occurs 2 times in the header\n.*line 1"),
        ('id,input,output\n1sc1,a,"b\n2sc1,a,b\n', r"not valid CSV: unexpected end of data\n.*line 2"),
        ('id,input,output\n"1\nsc1",a,b\n2sc1,  ,b\n', r"the input holds only white space\n.*line 4, field 'input'"),
        ("id,input,output\n", r"the forget set is empty\n.*rows\.csv"),
    ],
)
def test_broken_csv_is_named_by_the_line_on_which_the_row_starts(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        load(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (5, r"the output is not a text but a number: 5\n.*line 2, field 'output'\n.*write it as text, in quotes"),
        (True, "not a text but a boolean: True"),
        (None, "not a text but null"),
        (["a"], r"not a text but a list: \['a'\]"),
        ("", "the output is empty"),
        (" \n\t", "the output holds only white space"),
    ],
)
def test_an_output_that_is_no_text_is_refused(tmp_path: Path, value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(write_rows(tmp_path / "rows.jsonl", [row(), row(id="8sc1", output=value)]))


def test_a_numeric_parquet_column_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.parquet", [row(output=1947)])
    with pytest.raises(InputError, match=r"the output is not a text but a number: 1947\n.*rows\.parquet, row 1, field 'output'"):
        load(path)


def test_a_numeric_csv_cell_is_text(tmp_path: Path) -> None:
    assert load(write_rows(tmp_path / "rows.csv", [row(output=1947)]))[0].output == "1947"


def test_a_file_that_only_claims_to_be_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"id,input,output\n")
    with pytest.raises(InputError, match=r"not a readable Parquet file.*\n.*rows\.parquet"):
        load(path)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_missing_column_lists_what_was_found_and_the_setting(tmp_path: Path, suffix: str) -> None:
    path = write_rows(tmp_path / f"rows.{suffix}", [{"id": "1sc1", "input": "a", "outputs": "b"}])
    with pytest.raises(InputError) as error:
        load(path)
    message = str(error.value)
    assert "no column 'output'; the nearest name is 'outputs'" in message
    assert "columns found: 'id', 'input', 'outputs'" in message
    assert "data.columns.output=outputs" in message


def test_a_usual_synonym_is_offered_for_a_missing_column(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"question": "a", "answer": "b"}])
    with pytest.raises(InputError, match=r"data\.columns\.input=question"):
        load(path)
    with pytest.raises(InputError, match=r"data\.columns\.output=answer"):
        load(path, input="question")


def test_a_column_that_was_asked_for_must_exist_even_if_the_field_is_optional(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [row()])
    with pytest.raises(InputError, match=r"no column 'category' for the field 'task'"):
        load(path, task="category")
    with pytest.raises(InputError, match=r"unknown field 'ouput'(.|\n)*did you mean 'output'"):
        load(path, ouput="output")


def test_an_id_may_occur_once_only(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [row(), row(id="8sc1"), row()])
    with pytest.raises(InputError, match=r"the id '7sc1' occurs twice: in line 1 and in line 3\n.*rows\.jsonl"):
        load(path)


def test_a_row_cannot_be_in_both_sets(tmp_path: Path) -> None:
    write_rows(tmp_path / "forget.jsonl", [row(), row(id="8sc1")])
    write_rows(tmp_path / "retain.csv", [row(id="9sc1"), row(id="8sc1")])
    with pytest.raises(InputError, match="the id '8sc1' lies in the forget set and in the retain set"):
        load_forget_retain(tmp_path)


def test_data_is_given_once(tmp_path: Path) -> None:
    for arguments in ({}, {"path": tmp_path, "forget": tmp_path}, {"forget": tmp_path}):
        with pytest.raises(InputError, match="given twice or not at all"):
            load_forget_retain(**arguments)


def test_missing_paths_offer_the_nearest_name(tmp_path: Path) -> None:
    write_rows(tmp_path / "forget.jsonl", [row()])
    with pytest.raises(InputError, match=r"path not found\n.*forgte\.jsonl\n.*did you mean '.*forget\.jsonl'"):
        load(tmp_path / "forgte.jsonl")
    with pytest.raises(InputError, match=r"no retain\.jsonl(.|\n)*found: forget\.jsonl"):
        load_forget_retain(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match=r"not a data file: 'notes\.txt'(.|\n)*\.jsonl"):
        load(tmp_path / "notes.txt")


# --- the hub ---


class FakeHub:
    """Stands in for the ``datasets`` library, so that no test needs a network."""

    def __init__(self, splits: dict[str, list[dict[str, object]]]) -> None:
        self.splits = splits

    def load_dataset(self, name: str, split: str | None = None) -> object:
        if name != "org/name" or (split is not None and split not in self.splits):
            raise ConnectionError(f"Couldn't reach {name!r} on the Hub")
        tables = {key: FakeSplit(rows) for key, rows in self.splits.items()}
        return tables if split is None else tables[split]


class FakeSplit(list):
    @property
    def column_names(self) -> list[str]:
        return list(self[0])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub({"forget": [row()], "other": [row(id="8sc1")]})
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return fake


def test_a_hub_id_is_read_with_its_split(hub: FakeHub) -> None:
    assert [record.id for record in load_records("org/name", set_name="forget")] == ["7sc1"]
    assert [record.id for record in load_records("org/name:other", set_name="forget")] == ["8sc1"]
    with pytest.raises(InputError, match=r"2 splits, none of them called 'retain'(.|\n)*splits found: forget, other(.|\n)*org/name:forget"):
        load_records("org/name", set_name="retain")
    del hub.splits["forget"]
    assert [record.id for record in load_records("org/name", set_name="retain")] == ["8sc1"]


def test_rows_of_the_hub_are_checked_too(hub: FakeHub) -> None:
    hub.splits["forget"].append(row(id="8sc1", output=3))
    with pytest.raises(InputError, match=r"not a text but a number: 3\n.*org/name:forget, row 2, field 'output'"):
        load_records("org/name", set_name="forget")


@pytest.mark.usefixtures("hub")
def test_what_is_neither_path_nor_hub_id_says_both() -> None:
    with pytest.raises(InputError, match=r"path not found, and no data set(.|\n)*Couldn't reach"):
        load_records("data/lume", set_name="forget")


@pytest.mark.parametrize("source", ["./data/lume", "/no/such", "a/b/c", "plain", "data/forget.jsonl", "~/no/such"])
def test_what_looks_like_a_path_never_reaches_the_hub(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it now fails
    with pytest.raises(InputError, match=r"^path not found\n"):
        load_records(source, set_name="forget")


# --- attack documents and fixed splits ---


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_attack_documents_survive_every_format(tmp_path: Path, suffix: str) -> None:
    members = (Document(id='"a"', text='One, "two"\nthree.'), Document(id="b", text=" \u00e9 "))
    for name, documents in (("member", members), ("nonmember", (Document(id="a", text="Else"),))):
        write_rows(tmp_path / f"{name}.{suffix}", [{"id": item.id, "document": item.text, "url": "u"} for item in documents])
    attack = load_attack_documents(tmp_path)
    assert attack.members == members
    assert attack.nonmembers == (Document(id="a", text="Else"),)


def test_a_text_cannot_be_member_and_nonmember(tmp_path: Path) -> None:
    """Two texts that differ in white space alone are the same document."""
    write_rows(tmp_path / "member.jsonl", [{"id": "m1", "document": "Some  text.\n"}])
    write_rows(tmp_path / "nonmember.jsonl", [{"id": "n1", "document": "Some text"}, {"id": "n2", "document": " Some\ntext."}])
    with pytest.raises(InputError, match="the non-member 'n2' has the same text as the member 'm1'"):
        load_attack_documents(tmp_path)


def test_attack_documents_are_complete(tmp_path: Path) -> None:
    write_rows(tmp_path / "member.jsonl", [{"id": "m1", "document": "text"}, {"id": "m2", "document": " "}])
    with pytest.raises(InputError, match=r"the document holds only white space\n.*member\.jsonl, line 2, field 'document'"):
        load_attack_documents(tmp_path)
    write_rows(tmp_path / "member.jsonl", [{"id": "m1", "document": "text"}])
    with pytest.raises(InputError, match=r"no nonmember\.jsonl"):
        load_attack_documents(tmp_path)
    with pytest.raises(InputError, match="folder not found"):
        load_attack_documents(tmp_path / "absent")
    assert load_documents(write_rows(tmp_path / "x.csv", [{"text": "t"}]), columns={"document": "text"}) == (Document("x-row-00001", "t"),)


def test_splits_read_other_as_test(tmp_path: Path) -> None:
    assert load_splits(tmp_path) is None
    content = {"forget": {"train": ["a"], "validation": [], "test": ["b"], "other": ["c"]}, "retain": {"other": ["d"]}}
    (tmp_path / "splits.json").write_text(json.dumps(content))
    assert load_splits(tmp_path) == {
        "forget": {"train": ["a"], "validation": [], "test": ["b", "c"]},
        "retain": {"train": [], "validation": [], "test": ["d"]},
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"forgett": {}}, r"unknown set 'forgett'\n.*splits\.json(.|\n)*did you mean 'forget'"),
        ({"forget": {"dev": ["a"]}}, r"unknown fold 'dev'\n.*splits\.json, key 'forget'"),
        ({"forget": {"train": "a"}}, r"not a list of row ids\n.*key 'forget', fold 'train'"),
        ({"forget": {"train": [1]}}, r"not a list of row ids\n.*key 'forget', fold 'train'"),
        ({"retain": {"train": ["a"], "other": ["a"]}}, "the id 'a' is listed twice: in 'train' and in 'other'"),
        ({"retain": {}}, "no folds for the retain set"),
    ],
)
def test_broken_splits_are_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    (tmp_path / "splits.json").write_text(json.dumps({"forget": {"train": ["a"]}, "retain": {"train": ["b"]}} | changes))
    with pytest.raises(InputError, match=message):
        load_splits(tmp_path)


# --- the benchmark itself ---


def test_the_benchmark_loads_whole(tmp_path: Path) -> None:
    """2,732 and 2,734 rows of 866 and 867 documents, unchanged by a trip through CSV and Parquet."""
    data = load_forget_retain(real_data("lume"))
    assert (len(data.forget), len(data.retain)) == (2732, 2734)
    assert [len({record.document for record in records}) for records in (data.forget, data.retain)] == [866, 867]
    assert data.forget[2].document.startswith('"')
    assert sum(record.kind is Kind.COMPLETION for record in data.forget) == 866
    for suffix in ("csv", "parquet"):
        assert load(write_rows(tmp_path / f"forget.{suffix}", data.forget)) == data.forget


def test_every_member_of_the_benchmark_is_a_forget_document() -> None:
    attack = load_attack_documents(real_data("mia"))
    texts = {normalise_whitespace(record.text) for record in load_records(real_data("lume"), set_name="forget")}
    assert (len(attack.members), len(attack.nonmembers)) == (150, 150)
    assert sum(normalise_whitespace(member.text) in texts for member in attack.members) == 150
    assert not any(normalise_whitespace(other.text) in texts for other in attack.nonmembers)

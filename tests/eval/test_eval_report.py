"""The report's two files."""

from __future__ import annotations

import json
import math

import pytest

from eval.report import EvalReport, read_report, rows_path, write_report
from trainers.errors import InputError


def make_report(**changes) -> EvalReport:
    values = {
        "fold": "test",
        "model": "trials/trial-03",
        "official": {"aggregated-terms": [0.5, math.nan], "aggregate-score": -1},
        "scores": {"task_aggregate": 0.5, "mmlu_average": None},
        "intervals": {"task_aggregate": [0.4, 0.6]},
        "counts": {"forget_rows": 1},
        "terms": [{"name": "forget Task1 regurgitation", "value": 0.5}],
        "deviations": ["one"],
        "notes": [],
        "config": {"official": False},
        "seconds": 1.5,
        "rows": [{"part": "task", "output": "line\u2028separator, \r, \n, \x85 and ü", "score": 1.0}, {"part": "member", "loss": math.inf}],
    }
    return EvalReport(**{**values, **changes})


def test_a_report_comes_back_as_it_was_written(tmp_path):
    report = make_report()
    write_report(report, tmp_path / "eval.json")
    loaded = read_report(tmp_path / "eval.json")
    assert loaded.rows[0] == report.rows[0]
    assert (loaded.scores, loaded.intervals, loaded.terms, loaded.seconds) == (report.scores, report.intervals, report.terms, 1.5)
    assert loaded.path == tmp_path / "eval.json"


def test_numbers_that_are_not_finite_become_null(tmp_path):
    write_report(make_report(), tmp_path / "eval.json")
    assert read_report(tmp_path / "eval.json").official["aggregated-terms"] == [0.5, None]
    assert read_report(tmp_path / "eval.json").rows[1]["loss"] is None
    assert "NaN" not in (tmp_path / "eval.json").read_text()


def test_the_rows_lie_beside_the_summary(tmp_path):
    write_report(make_report(), tmp_path / "validation.json")
    assert rows_path(tmp_path / "validation.json") == tmp_path / "validation-rows.jsonl"
    assert json.loads((tmp_path / "validation.json").read_text())["schema_version"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["validation-rows.jsonl", "validation.json"]


def test_a_failed_write_leaves_no_summary(tmp_path):
    """The summary is what says that the rows are complete."""
    write_report(make_report(), tmp_path / "eval.json")
    with pytest.raises(TypeError):
        write_report(make_report(rows=[{"part": object()}]), tmp_path / "eval.json")
    assert not (tmp_path / "eval.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "file not found"),
        (lambda path: path.write_text("{"), "not a JSON file"),
        (lambda path: path.write_text('{"schema_version": 2}'), "schema_version is 2"),
        (lambda path: path.write_text('{"schema_version": 1}'), "fold, model"),
        (lambda path: rows_path(path).unlink(), "rows of the report are missing"),
        (lambda path: rows_path(path).write_text("{}\n{"), "line 2"),
    ],
)
def test_a_damaged_report_is_refused(tmp_path, change, message):
    path = tmp_path / "eval.json"
    write_report(make_report(), path)
    change(path)
    with pytest.raises(InputError, match=message):
        read_report(path)


def test_a_number_that_is_none_is_nan_in_memory_and_null_in_the_file(tmp_path):
    """The benchmark's script writes the bare word NaN, which strict readers of JSON refuse."""
    write_report(make_report(), tmp_path / "eval.json")
    text = (tmp_path / "eval.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["official"] == {"aggregated-terms": [0.5, None], "aggregate-score": -1}


def test_attack_and_mmlu_come_back_and_older_reports_are_read_without_them(tmp_path):
    attack = {"auc": 0.5, "standard_error": 0.033, "members": 150, "nonmembers": 150, "not_finite": 0}
    write_report(make_report(attack=attack, mmlu={"average_acc": 0.25}), tmp_path / "eval.json")
    loaded = read_report(tmp_path / "eval.json")
    assert (loaded.attack, loaded.mmlu) == (attack, {"average_acc": 0.25})
    values = json.loads((tmp_path / "eval.json").read_text())
    del values["attack"], values["mmlu"]
    (tmp_path / "eval.json").write_text(json.dumps(values))
    assert (read_report(tmp_path / "eval.json").attack, read_report(tmp_path / "eval.json").mmlu) == ({}, {})

"""The report of a suite as files and as a table."""

from __future__ import annotations

import json
import math

from eval.report import rows_path
from eval.suites.report import SuiteReport, report_lines, write_suite_report


def make_report(**changes) -> SuiteReport:
    values = {
        "benchmark": "tofu",
        "model": "merged",
        "retained_model": None,
        "scores": {"model_utility": 0.5, "forget_quality": None, "forget_probability": 0.25},
        "intervals": {"model_utility": [0.4, 0.6]},
        "counts": {"forget10": 400},
        "sets": {"forget": {"source": "forget10.jsonl", "rows": 400, "unit": "author", "units": 20, "probability": 0.25}},
        "deviations": ["one"],
        "notes": ["Mind the gap."],
        "config": {"bootstrap_seed": 0},
        "seconds": 1.5,
        "rows": [{"set": "forget", "output": "line\u2028separator, \r, \n and ü", "probability": math.nan}],
    }
    return SuiteReport(**{**values, **changes})


def test_summary_and_rows_lie_in_two_files(tmp_path):
    path = tmp_path / "eval.json"
    write_suite_report(make_report(), path)
    summary = json.loads(path.read_text(encoding="utf-8"))
    assert list(summary)[:3] == ["schema_version", "benchmark", "model"]
    assert summary["scores"] == {"model_utility": 0.5, "forget_quality": None, "forget_probability": 0.25}
    lines = rows_path(path).read_text(encoding="utf-8").split("\n")
    assert json.loads(lines[0]) == {"set": "forget", "output": "line\u2028separator, \r, \n and ü", "probability": None}
    assert lines[1:] == [""]


def test_the_table_has_every_score_once(tmp_path):
    """A score of a set stands in the set's line, the others on their own; what is undefined is a dash."""
    text = "\n".join(report_lines(make_report()))
    assert [line.split() for line in text.splitlines()] == [
        ["TOFU", "merged"],
        ["model_utility", "0.5", "[0.400,", "0.600]"],
        ["forget_quality", "-"],
        ["set", "rows", "probability"],
        ["forget", "400", "0.25"],
        ["note:", "Mind", "the", "gap."],
    ]

"""Beside the page lies the data of every figure and table; the pair's search and the audit are on it as they were recorded."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from launcher.report import render
from launcher.report_audit import audit_view
from launcher.report_data import read_run
from launcher.report_figures import report_figures
from launcher.report_pairs import pair_view
from launcher.report_scores import score_rows
from launcher.report_tables import csv_text, report_tables, save_tables
from tests.helpers.run_folder import build_finished
from tests.launcher.test_audit_files import result as audit_result
from trainers.files import read_json, weights_hash, write_json

ALWAYS = {"tradeoff", "curves", "merge_scale", "scores", "differences", "leaderboard", "verdicts", "terms", "search", "pairs", "controls",
          "contestants", "excluded", "trials", "failures", "generations", "provenance"}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_finished(tmp_path_factory.mktemp("tables") / "run")


@pytest.fixture(scope="module")
def audited(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = Path(shutil.copytree(run, tmp_path_factory.mktemp("audited") / "run"))
    write_json(run / "audit.json", audit_result())
    return run


def test_every_table_is_written_as_csv_and_json_with_the_same_rows(run: Path, tmp_path: Path) -> None:
    tables = report_tables(read_run(run))
    assert tables.keys() >= ALWAYS
    save_tables(tables, tmp_path)
    for name, rows in tables.items():
        lines = list(csv.DictReader((tmp_path / f"{name}.csv").open(encoding="utf-8")))
        found = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
        assert len(lines) == len(found) == len(rows) > 0, name
    scores = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    merged = next(row for row in scores if row["name"] == "merged")
    expected = next(model for model in read_json(run / "results.json")["models"] if model["name"] == "merged")
    assert merged["final_score"] == expected["scores"]["final_score"]
    assert [merged["final_score_low"], merged["final_score_high"]] == expected["intervals"]["final_score"]
    assert merged["delivered"] is True


def test_every_figure_has_its_data(audited: Path) -> None:
    data = read_run(audited)
    drawn = {name for name in report_figures(data) if not name.startswith("audit_")}
    assert {"tradeoff", "curves", "merge_scale", "terms", "audit"} <= drawn
    assert drawn <= report_tables(data).keys()


def test_the_head_of_a_csv_has_the_keys_of_all_rows() -> None:
    assert csv_text([{"a": 1}, {"b": "x, y", "a": None}]) == 'a,b\n1,\n,"x, y"\n'


def test_a_difference_is_clear_only_if_its_interval_leaves_out_zero(run: Path, tmp_path: Path) -> None:
    """The word is read by a template: a dictionary's own methods must not answer in its place."""
    run = Path(shutil.copytree(run, tmp_path / "run"))
    results = read_json(run / "results.json")
    results["models"][-1]["difference_to_best_parent"]["final_score"] = {"difference": 0.05, "low": -0.04, "high": 0.1}
    write_json(run / "results.json", results)
    data = read_run(run)
    row = score_rows(data)[-1]
    assert (row["headline"]["is_clear"], row["differences"][0]["is_clear"]) == (False, True)
    page = render(data, plots={})
    assert page.count("<small>within noise</small>") == 1
    assert "<small>clear of 0</small>" not in page


def test_the_search_narrows_down_from_checkpoints_to_full_measurements(run: Path) -> None:
    """Six trials, one dead: of the pairs that bracket AUC 0.5 ever fewer go on, and one merge is measured in full."""
    search, steps = read_json(run / "pairs.json"), pair_view(read_run(run))["trace"]
    counts = [step["count"] for step in steps]
    assert [step["title"] for step in steps][:3] == ["checkpoints", "candidate pairs", "a first look"]
    assert counts[:2] == [6, len(search["pairs"])]
    assert counts[1:] == sorted(counts[1:], reverse=True)
    assert (steps[-1]["title"], counts[-1]) == ("measured in full", 1)
    measured = sum(len(pair["points"]) for pair in search["pairs"])
    assert sum(int(step["detail"].split("(")[1].split()[0]) for step in steps[2:-1]) == measured


def test_an_audit_is_shown_with_verdict_reasons_attacks_and_figures(audited: Path) -> None:
    data = read_run(audited)
    view = audit_view(data)
    assert (view["verdict"], view["reasons"]) == ("hidden", ["int4 brings back 90%."])
    assert view["tables"][0]["rows"][0][:2] == ["int4", "90 % [80, 100] *"]
    page = render(data, plots=report_figures(data, files=False))
    section = page[page.index('<section id="audit">') : page.index('<section id="curves">')]
    assert section.count("<svg") == 4
    assert "int4 brings back 90%." in section
    assert '<a href="audit.json">' in section
    assert "unlearn audit" not in section


def test_without_an_audit_the_page_says_how_to_make_one(run: Path, tmp_path: Path) -> None:
    page = render(read_run(run), plots={})
    assert "No audit has been made" in page
    assert "unlearn audit --model RUN/merged --base TARGET --data DATA --out RUN/audit.json" in page
    other = Path(shutil.copytree(run, tmp_path / "run"))
    write_json(other / "audit.json", audit_result() | {"attacks": {"int4": {}}})
    view = audit_view(read_run(other))
    assert (view["verdict"], view["problem"]) == (None, "audit.json does not hold an audit")


def test_an_audit_of_other_weights_than_the_delivered_ones_is_not_shown(run: Path, tmp_path: Path) -> None:
    """The same file counts where it names the weights in ``merged/``, and where these are not there to ask."""
    run = Path(shutil.copytree(run, tmp_path / "run"))
    audit = audit_result()

    def verdict(weights: str) -> tuple[object, object]:
        unlearned = audit["models"].get("unlearned", {}) | {"weights_hash": weights}
        write_json(run / "audit.json", audit | {"models": audit["models"] | {"unlearned": unlearned}})
        view = audit_view(read_run(run))
        return view["verdict"], view["problem"]

    for path in (run / "merged").glob("*.safetensors"):
        path.unlink()
    assert verdict("of-a-model-long-gone") == ("hidden", None)
    (run / "merged" / "model.safetensors").write_bytes(b"weights")
    assert verdict(weights_hash(run / "merged")) == ("hidden", None)
    assert verdict("of-a-model-long-gone") == (None, "audit.json is of other weights than those in merged/")

"""Evaluating written models: in several processes, side by side, resumed."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

import launcher.scoring as module
from eval.config import EvalConfig
from eval.report import read_report
from launcher.scoring import EvaluationInputs, FolderJob, evaluate_folders, share_threads
from launcher.stages import evaluate_model
from tests.helpers.eval_models import bench_attack, bench_data, half_trained


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model folder, its data and its attack."""
    folder = tmp_path_factory.mktemp("files")
    half_trained().model.save_pretrained(folder / "model")
    half_trained().tokenizer.save_pretrained(folder / "model")
    for name, rows in vars(bench_data()).items():
        lines = [json.dumps({key: value for key, value in asdict(row).items() if value is not None}) for row in rows]
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / f"{name}.jsonl").write_text("\n".join(lines))
    (folder / "mia").mkdir()
    for name, documents in (("member", bench_attack().members), ("nonmember", bench_attack().nonmembers)):
        lines = [json.dumps({"id": document.id, "document": document.text}) for document in documents]
        (folder / "mia" / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def run(place, out, **more):
    settings = {"mmlu": None, "max_new_tokens": 8, "official": False, "progress": lambda text: None} | more
    evaluate_model(model=place / "model", data=place / "data", mia=place / "mia", out=out, **settings)
    return read_report(out)


def test_two_processes_write_the_report_of_one_and_leave_nothing_behind(place, tmp_path):
    alone = run(place, tmp_path / "one.json")
    together = run(place, tmp_path / "two.json", processes=2)
    assert together.rows == alone.rows
    assert together.scores == alone.scores
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one-rows.jsonl", "one.json", "two-rows.jsonl", "two.json"]


def test_a_process_that_cannot_start_is_told_and_its_rows_are_computed_here(place, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(module.sys, "executable", "false")
    report = run(place, tmp_path / "eval.json", processes=2)
    assert report.counts["forget_rows"] == 12
    assert "1 of 2 evaluation processes failed" in caplog.text


def test_inputs_survive_the_way_to_another_process(place):
    inputs = EvaluationInputs(
        place / "model", place / "model", data=place / "data", mia=None, mmlu=None, config=EvalConfig(max_new_tokens=3)
    )
    assert EvaluationInputs.from_json(inputs.to_json()) == inputs


def test_threads_are_divided_and_never_none():
    import torch

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert share_threads(1) == torch.get_num_threads() == 4
        assert share_threads(3) == torch.get_num_threads() == 1
        assert share_threads(9) == 1
    finally:
        torch.set_num_threads(before)


def test_several_models_go_through_the_given_executor(monkeypatch):
    """The default is one after the other; any map will do."""
    done = []
    monkeypatch.setattr(module, "evaluate_folder", lambda model_folder, **given: done.append((model_folder, given["name"])))
    jobs = [FolderJob(model_folder=f"m{n}", config=None, data=None, folder=None, name=f"n{n}") for n in range(3)]
    evaluate_folders(jobs)
    assert done == [("m0", "n0"), ("m1", "n1"), ("m2", "n2")]
    done.clear()
    evaluate_folders(jobs, execute=lambda work, items: [work(item) for item in reversed(items)])
    assert [model for model, _ in done] == ["m2", "m1", "m0"]

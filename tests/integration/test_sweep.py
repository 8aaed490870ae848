"""A whole sweep on this machine: what it leaves behind, and what the same command does the second time."""

from __future__ import annotations

import csv
import json
import shutil
import time
from pathlib import Path

import pytest
import torch

from launcher.load import load_experiment
from launcher.scoring import evaluate_folder
from launcher.stages import prepare_data
from tests.helpers.small_run import facts, run_command, small_experiment, stamps
from tests.integration.conftest import FinishedSweep
from trainers.files import read_json, read_jsonl

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TRIAL_FILES = ("config.yaml", "metrics.jsonl", "eval.json", "eval-rows.jsonl", "validation.json", "validation-rows.jsonl", "status.json",
               "logs/rank-0.log")  # fmt: skip
RUN_FILES = ("experiment.yaml", "provenance.json", "events.jsonl", "target.json", "baseline/eval.json", "baseline/validation.json",
             "pairs.json", "results.json", "trials.csv", "report.html", "merged/README.md", "merged/merge.json", "merged/eval.json",
             "merged/validation.json", "merged/config.json", "merged/tokenizer.json")  # fmt: skip


def test_a_sweep_leaves_everything_that_a_run_folder_promises(undisturbed: FinishedSweep) -> None:
    assert undisturbed.code == 0, undisturbed.output
    run = undisturbed.run
    missing = [name for name in RUN_FILES if not (run / name).is_file()]
    missing += [
        f"{name}/{file}"
        for name in ("trial-00", "trial-01", "trial-02")
        for file in TRIAL_FILES
        if not (run / "trials" / name / file).is_file()
    ]
    assert missing == []
    for name, steps in (("trial-00", 32), ("trial-01", 80), ("trial-02", 64)):
        checkpoints = sorted((run / "trials" / name / "checkpoints").iterdir())
        assert [folder.name for folder in checkpoints] == [f"step-{steps * part // 4:06d}" for part in range(1, 5)]
        for folder in checkpoints:
            assert {"adapter_model.safetensors", "adapter_config.json", "manifest.json"} <= {file.name for file in folder.iterdir()}
        assert [line["step"] for line in read_jsonl(run / "trials" / name / "metrics.jsonl")] == list(range(1, steps + 1))
        assert read_json(run / "trials" / name / "status.json")["state"] == "finished"
    assert list(run.rglob("*.tmp")) == []
    with open(run / "trials.csv") as file:
        assert len(list(csv.DictReader(file))) == 4


def test_results_agree_with_the_files_they_come_from(undisturbed: FinishedSweep) -> None:
    results = read_json(undisturbed.run / "results.json")
    assert results["run_finished"] is True
    assert set(results["timings"]) == {"target", "baseline", "trials", "pairs", "merge", "report"}
    for trial in results["trials"][:3]:
        assert trial["test"] == read_json(undisturbed.run / "trials" / trial["name"] / "eval.json")["scores"]
        assert trial["validation"] == read_json(undisturbed.run / "trials" / trial["name"] / "validation.json")["scores"]
        assert (undisturbed.run / trial["checkpoint"]).is_dir()
    for model in results["models"]:
        assert model["scores"] == read_json(undisturbed.run / model["path"] / "eval.json")["scores"]
    assert results["verdict"]["winner"] in {model["name"] for model in results["models"]}


def test_a_trial_whose_loss_is_not_finite_stops_alone(undisturbed: FinishedSweep) -> None:
    trial = read_json(undisturbed.run / "results.json")["trials"][3]
    assert (trial["name"], trial["status"], trial["verdict"], trial["test"]) == ("trial-03", "stopped", "dead", None)
    assert "the loss is" in trial["error"]
    assert len(read_jsonl(undisturbed.run / "trials" / "trial-03" / "metrics.jsonl")) == 1, "the destroying update was never made"
    failures = [line for line in undisturbed.output.splitlines() if "FAILED" in line]
    assert len(failures) == 1
    assert "trial-03" in failures[0]
    assert "trial-03/logs/rank-0.log" in undisturbed.output
    assert "the loss is" in (undisturbed.run / "report.html").read_text()


def test_a_sweep_prints_little(undisturbed: FinishedSweep) -> None:
    lines = undisturbed.output.splitlines()
    assert len(lines) < 80
    assert [line for line in lines if line.startswith("report ")] == [lines[-1]], "the report's place is told once, at the end"
    noise = ("Warning", "warning:", "Traceback", "(pid=", "it/s]")
    assert not [line for line in lines if any(word in line for word in noise)]


def test_the_merged_model_loads_anywhere_and_scores_what_its_report_says(undisturbed: FinishedSweep, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged = undisturbed.run / "merged"
    model = AutoModelForCausalLM.from_pretrained(merged)
    ids = AutoTokenizer.from_pretrained(merged)("Who lives in", return_tensors="pt")
    assert bool(model(**ids).logits.isfinite().all())
    config = load_experiment(
        undisturbed.file, [f"data.{key}={undisturbed.data / part}" for key, part in (("path", "lume"), ("mia", "mia"), ("mmlu", "mmlu"))]
    ).config
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as the sweep used, so that every sum ends in the same digits
    try:
        evaluate_folder(merged, config=config, data=prepare_data(config), folder=tmp_path, name="merged")
    finally:
        torch.set_num_threads(before)
    for name in ("eval.json", "validation.json"):
        fresh, reported = read_json(tmp_path / name), read_json(merged / name)
        assert fresh["scores"] == reported["scores"]
    assert read_json(tmp_path / "eval.json")["scores"] != read_json(undisturbed.run / "baseline" / "eval.json")["scores"], (
        "negative control"
    )


def test_the_same_command_again_repeats_nothing(undisturbed: FinishedSweep) -> None:
    run = undisturbed.run
    files, found, events = stamps(run), facts(run), len(read_jsonl(run / "events.jsonl"))
    results = json.loads((run / "results.json").read_text())
    started = time.monotonic()
    code, output = run_command("sweep", undisturbed.file, folder=undisturbed.file.parent)
    assert code == 0, output
    assert time.monotonic() - started < 60, "a complete sweep takes longer than that, and this one has nothing to do"
    assert stamps(run) == files
    assert not [event for event in read_jsonl(run / "events.jsonl")[events:] if event["kind"] == "trial_started"]
    assert facts(run) == found
    again = json.loads((run / "results.json").read_text())
    for value in (results, again):
        value.pop("timings")
    assert json.dumps(again) == json.dumps(results), "byte for byte, but for the time it took"


def test_a_run_may_move_and_one_damaged_trial_costs_only_itself(undisturbed: FinishedSweep, tmp_path: Path) -> None:
    """The folder and its data lie elsewhere now; trial-02 was at work when its disk flipped a byte of its newest checkpoint."""
    run = tmp_path / "elsewhere" / "small"
    shutil.copytree(undisturbed.run, run)
    shutil.copytree(undisturbed.data, tmp_path / "other-data")
    values = small_experiment(tmp_path / "other-data", storage=tmp_path / "elsewhere")
    file = tmp_path / "small.yaml"
    file.write_text(json.dumps(values))
    trial = run / "trials" / "trial-02"
    for name in ("eval.json", "validation.json"):
        (trial / name).unlink()
    (trial / "status.json").write_text(json.dumps({"name": "trial-02", "state": "running", "step": 64}))
    weights = trial / "checkpoints" / "step-000064" / "adapter_model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-5] ^= 0xFF
    weights.write_bytes(damaged)
    kept = {name: stamp for name, stamp in stamps(run).items() if name.startswith(("trials", "baseline", "target"))}

    code, output = run_command("sweep", file, folder=tmp_path)
    assert code == 0, output
    failures = [line for line in output.splitlines() if "FAILED" in line]
    assert len(failures) == 1
    assert "trial-02" in failures[0]
    assert "do not match its manifest" in output
    assert str(trial / "logs" / "rank-0.log") in output
    status = read_json(trial / "status.json")
    assert (status["state"], status["retry"]) == ("failed", False), "the damage is still there, so it is not tried twice"
    assert [event["again"] for event in read_jsonl(run / "events.jsonl") if event["kind"] == "trial_started"][4:] == [False]
    assert {name: stamp for name, stamp in stamps(run).items() if name in kept} == kept, "nothing else was computed again"
    results = read_json(run / "results.json")
    assert [trial["status"] for trial in results["trials"]] == ["finished", "finished", "failed", "stopped"]
    assert "do not match its manifest" in (run / "report.html").read_text()
    winner = read_json(run / "pairs.json")["winner"]
    record = read_json(run / "merged" / "merge.json")
    parents = [name.partition("@")[0] for name in winner["parents"] or [winner["name"]]]
    assert [Path(parent["path"]).parents[1].name for parent in record["trials"]] == parents, "merged/ holds this start's winner"

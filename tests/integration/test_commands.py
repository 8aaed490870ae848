"""Every command on good input, one after the other, each reading what the one before it wrote."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.cli import main
from trainers.data.synthetic import write_synthetic_benchmark
from trainers.files import read_json

EVAL = ["--max-new-tokens", "4"]
SMALL = """\
name: small
storage_path: runs
data: {path: data/lume, mia: data/mia, mmlu: data/mmlu}
target:
  tiny: {vocab_size: 400, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}
  num_train_epochs: 3
  min_knowledge: 0
  min_regurgitation: 0
  min_general_knowledge: 0
train:
  engine: {name: torch}
  lora: {r: 4, lora_alpha: 8}
  learning_rate: {values: [1e-4, 1e-2, 3e-2]}
  num_train_epochs: 1
  checkpoints: 1
  signals: 1
sweep: {num_trials: 3, search: grid, cpus_per_rank: 0.5}
eval: {dtype: float32, max_new_tokens: 4, bootstrap_samples: 20, mmlu_shots: 1}
pairs: {densities: [0.8], finalists: 1, calibrated: 0}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with invented data and the configuration of a small run."""
    folder = tmp_path_factory.mktemp("commands")
    write_synthetic_benchmark(folder / "data", documents_per_task=3, subjects=1, questions_per_subject=2, seed=0)
    (folder / "small.yaml").write_text(SMALL)
    return folder


@pytest.fixture
def unlearn(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command in the folder; it must succeed, and what it printed is returned."""
    monkeypatch.chdir(folder)

    def command(*arguments: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        captured = capsys.readouterr()
        assert caught.value.code == 0, captured.out + captured.err
        assert "Traceback" not in captured.err
        return captured.out

    return command


def test_validate_prints_the_plan_and_every_setting(unlearn: Callable[..., str], folder: Path) -> None:
    out = unlearn("validate", "small.yaml")
    assert out.endswith("valid\n")
    assert [line.split()[0] for line in out.splitlines() if line.startswith("  trial-0")] == ["trial-00", "trial-01", "trial-02"]
    resolved = unlearn("validate", "small.yaml", "--resolved")
    (folder / "resolved.yaml").write_text(resolved)
    # The resolved file is the same experiment, its search included.
    assert unlearn("validate", "resolved.yaml", "--resolved") == resolved
    assert "values:" in resolved
    assert not (folder / "runs").exists()


def test_memorize_then_train_then_merge_then_eval(unlearn: Callable[..., str], folder: Path) -> None:
    """The whole chain without a sweep: two trials of one target, merged, and everything scored."""
    out = unlearn("memorize", "small.yaml")
    target = folder / "runs" / "small" / "target"
    assert f"target   {target.relative_to(folder)}" in out
    built = (target / "model.safetensors").stat().st_mtime_ns
    # The same call again finds its work done, and so does a run that begins in the folder afterwards.
    unlearn("memorize", "small.yaml")
    unlearn("train", "small.yaml", "train.learning_rate=3e-3")
    assert (target / "model.safetensors").stat().st_mtime_ns == built

    given = ["model.model_name_or_path=runs/small/target"]
    for name, rate in (("strong", "3e-2"), ("weak", "1e-3")):
        out = unlearn("train", "small.yaml", *given, f"train.learning_rate={rate}", "--out", f"single/{name}")
        assert "step 1 of" in out
        assert read_json(folder / "single" / name / "trials" / "trial-00" / "status.json")["state"] == "finished"
    trained = (folder / "single" / "weak" / "trials" / "trial-00" / "metrics.jsonl").read_text()
    unlearn("train", "small.yaml", *given, "train.learning_rate=1e-3", "--out", "single/weak")
    assert (folder / "single" / "weak" / "trials" / "trial-00" / "metrics.jsonl").read_text() == trained

    trials = ["--trial", "single/strong", "--trial", "single/weak/trials/trial-00"]
    out = unlearn("merge", "--base", "runs/small/target", *trials, "--out", "merged", "--density", "0.5", "--weights", "1", "0.5")
    assert out.startswith("wrote merged ")
    record = read_json(folder / "merged" / "merge.json")
    assert (record["config"]["density"], record["weights"]) == (0.5, [1.0, 0.5])
    assert [trial["kind"] for trial in record["trials"]] == ["lora", "lora"]

    data = ["--data", "data/lume", "--mia", "data/mia", "--mmlu", "data/mmlu"]
    reports = {}
    for name, model in (("merged", "merged"), ("trial", "single/strong"), ("target", "runs/small/target")):
        unlearn("eval", "--model", model, *data, "--out", f"scores/{name}.json", *EVAL)
        reports[name] = read_json(folder / "scores" / f"{name}.json")
        assert (folder / "scores" / f"{name}-rows.jsonl").exists()
        assert isinstance(reports[name]["official"]["mia_loss_acc"], float)
    losses = {name: report["scores"]["forget_answer_log_prob"] for name, report in reports.items()}
    # A trial's checkpoint is scored as the adapted model, not as its base.
    assert len(set(losses.values())) == 3
    # Scoring the same model in the slow official mode gives the same losses up to rounding.
    unlearn("eval", "--model", "merged", "--data", "data/lume", "--out", "scores/official.json", "--official", *EVAL)
    official = read_json(folder / "scores" / "official.json")["scores"]["forget_answer_log_prob"]
    assert official == pytest.approx(losses["merged"], abs=0.05)


def test_a_trial_can_be_reported_on(unlearn: Callable[..., str], folder: Path) -> None:
    """``train`` writes a run folder, too."""
    run = folder / "single" / "weak"
    if not run.exists():
        pytest.skip("the trial is made by the test above")
    assert "trial-00" in unlearn("status", str(run))
    assert unlearn("report", str(run)).startswith("wrote ")
    assert (run / "report.html").stat().st_size > 1000


def test_a_full_parameter_trial_is_trained_merged_and_scored(unlearn: Callable[..., str], folder: Path) -> None:
    """Its checkpoint is a model folder of its own."""
    if not (folder / "runs" / "small" / "target").exists():
        unlearn("memorize", "small.yaml")
    given = ["model.model_name_or_path=runs/small/target", "train.learning_rate=1e-3", "train.lora=null"]
    unlearn("train", "small.yaml", *given, "--out", "single/full")
    unlearn("merge", "--base", "runs/small/target", "--trial", "single/full", "--out", "full", "--method", "linear")
    for name, model in (("merged", "full"), ("trial", "single/full")):
        unlearn("eval", "--model", model, "--data", "data/lume", "--out", f"full-{name}.json", *EVAL)
    merged, trial = (read_json(folder / f"full-{name}.json")["scores"] for name in ("merged", "trial"))
    # A linear merge of one trial is that trial.
    assert merged["forget_answer_log_prob"] == trial["forget_answer_log_prob"]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "launcher", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path: Callable[[], bool], *, process: subprocess.Popen[str], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not path():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "the process did not get there"
        time.sleep(0.05)


def test_ctrl_c_stops_a_real_process(folder: Path) -> None:
    """Exit code 130 and one line; the target that was being built is not there, and the same command can be given again."""
    process = start(folder, "memorize", "small.yaml", "name=long", "target.num_train_epochs=100000", "target.min_knowledge=1")
    wait_for((folder / "runs" / "long" / "events.jsonl").exists, process=process)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "interrupted\n"
    assert [path.name for path in (folder / "runs" / "long").iterdir()] == ["events.jsonl"]


@pytest.mark.ray
@pytest.mark.slow
def test_ctrl_c_stops_a_sweep_and_the_sweep_goes_on_later(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No trial counts as failed because somebody stopped the run; the second start finishes all of them."""
    settings = ["name=stopped", "train.num_train_epochs=20", "train.checkpoints=20", "sweep.num_trials=2"]
    process = start(folder, "sweep", "small.yaml", *settings)
    trials = folder / "runs" / "stopped" / "trials"
    wait_for(lambda: any(trials.glob("*/checkpoints/step-*/manifest.json")), process=process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 130
    assert "interrupted: the trials that ran have written checkpoints and ended" in err
    assert err.splitlines()[-1] == "  fix: run the same command again to go on"
    assert "Traceback" not in err
    states = [read_json(path)["state"] for path in trials.glob("*/status.json")]
    assert "failed" not in states
    assert not (folder / "runs" / "stopped" / "results.json").exists()
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as caught:
        main(["sweep", "small.yaml", *settings])
    assert caught.value.code in (0, 1)  # 1: a target that hardly learnt anything may leave no trial alive
    results = read_json(folder / "runs" / "stopped" / "results.json")
    assert [trial["status"] for trial in results["trials"]] == ["finished", "finished"]
    shutil.rmtree(folder / "runs" / "stopped")

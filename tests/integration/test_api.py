"""``launcher.api.unlearn``: a model in time, complete at every moment, and nothing left running."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from launcher.api import unlearn
from launcher.contest import RECORD
from tests.helpers.memorised_target import MemorisedTarget, build_memorised_target
from trainers.errors import InputError, RunError
from trainers.files import read_json

pytestmark = [pytest.mark.ray, pytest.mark.slow]
POINTS = [
    {"objective.forget_weight": 0.2, "learning_rate": 5e-3, "num_train_epochs": 8},
    {"objective.forget_weight": 0.6, "learning_rate": 2e-2, "num_train_epochs": 12},
    {"objective.forget_weight": 0.4, "learning_rate": 1e-2, "num_train_epochs": 8},
]
FAST = (
    "train.lora.r=8",
    "train.forget_scope=document",
    "train.checkpoints=2",
    "train.signals=1",
    "sweep.num_trials=3",
    f"sweep.start_points={json.dumps(POINTS)}",
    "sweep.max_concurrent=1",
    "eval.max_new_tokens=16",
    "eval.bootstrap_samples=20",
    "pairs.max_pairs=2",
    "pairs.calibrated=0",
    "pairs.finalists=1",
)
SLOW = ("train.num_train_epochs=100000", "train.checkpoints=2", "sweep.start_points=[]", "eval.max_new_tokens=16")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> MemorisedTarget:
    return build_memorised_target(tmp_path_factory.mktemp("api"))


@pytest.fixture
def sets(target: MemorisedTarget, tmp_path: Path) -> tuple[Path, Path]:
    """A folder per set, as the benchmark hands them out."""
    for name in ("forget", "retain"):
        (tmp_path / name).mkdir()
        shutil.copy(Path(target.data["path"]) / f"{name}.jsonl", tmp_path / name)
    return tmp_path / "forget", tmp_path / "retain"


def check_complete(folder: Path) -> dict:
    """The record of a published model, after the model was loaded: by its own files and by nothing else."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("The river", return_tensors="pt")["input_ids"]
    assert model(ids).logits.isfinite().all()
    return read_json(folder / RECORD)


def differs(one: Path, other: Path) -> bool:
    return (one / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


def left_behind(tag: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("UNLEARN_TEST_TAG") == tag and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def wait_until_gone(tag: str, *, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while left := left_behind(tag):
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


def test_the_best_model_of_a_whole_sweep_is_left_in_the_output_folder(target, sets, tmp_path, monkeypatch):
    monkeypatch.setenv("UNLEARN_TEST_TAG", "api-whole")
    monkeypatch.setenv("UNLEARN_TIME_LIMIT_S", "560")
    found = unlearn(str(target.model), str(tmp_path / "out"), *map(str, sets), settings=FAST)
    record = check_complete(found)
    assert record["model"] == "merged", (tmp_path / "out.work" / "sweep.log").read_text()[-2000:]
    assert differs(found, target.model)
    assert (tmp_path / "out.work" / "run" / "report.html").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["forget", "out", "out.work", "retain"]
    assert not left_behind("api-whole")


def test_it_returns_in_time_though_trials_would_never_end(target, sets, tmp_path, monkeypatch):
    """Half an hour of steps in forty seconds: whatever checkpoint there is, or a clear word that there is none; and no process."""
    monkeypatch.setenv("UNLEARN_TEST_TAG", "api-late")
    started = time.monotonic()
    monkeypatch.setenv("UNLEARN_TIME_LIMIT_S", "40")
    problem = None
    try:
        unlearn(target.model, tmp_path / "out", *sets, settings=SLOW)
    except RunError as error:
        problem = str(error)
    assert time.monotonic() - started < 55
    assert not left_behind("api-late")
    assert (problem is None) == (tmp_path / "out").exists()
    if problem is None:
        check_complete(tmp_path / "out")
    else:
        assert "no model within 40 s" in problem


def test_whenever_it_is_killed_the_output_folder_holds_a_whole_model(target, sets, tmp_path):
    """The caller's process is killed at random moments after the first model; and as long as it lives, every look finds a whole one."""
    script = "import sys; from launcher.api import unlearn; unlearn(*sys.argv[1:5], settings=sys.argv[5:])"
    draws = random.Random(7)
    seen = set()
    for attempt in range(2):
        out, tag = tmp_path / f"out-{attempt}", f"api-kill-{attempt}"
        command = [sys.executable, "-c", script, str(target.model), str(out), *map(str, sets), *FAST]
        with open(tmp_path / f"log-{attempt}", "wb") as log:
            process = subprocess.Popen(command, env={**os.environ, "UNLEARN_TEST_TAG": tag}, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 300
            while not out.exists():
                assert process.poll() is None, (tmp_path / f"log-{attempt}").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.01)
            end = time.monotonic() + draws.uniform(0, 20)
            while time.monotonic() < end and process.poll() is None:
                seen.add(read_json(out / RECORD)["model"])
                assert (out / "model.safetensors").stat().st_size == (target.model / "model.safetensors").stat().st_size
        finally:
            process.kill()
            process.wait()
        check_complete(out)
        wait_until_gone(tag)
        check_complete(out)
    assert seen


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda paths: paths | {"model": "nowhere"}, "model folder not found"),
        (lambda paths: paths | {"forget": "nowhere"}, "no forget set"),
        (lambda paths: paths | {"retain": paths["forget"]}, "no retain set"),
        (lambda paths: paths | {"output": paths["forget"]}, "not empty"),
    ],
)
def test_folders_that_cannot_be_used_are_refused_before_anything_is_written(target, sets, tmp_path, change, message):
    paths = change({"model": target.model, "output": tmp_path / "out", "forget": sets[0], "retain": sets[1]})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message):
        unlearn(paths["model"], paths["output"], paths["forget"], paths["retain"])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_time_limit_that_is_none_is_refused(target, sets, tmp_path, monkeypatch):
    for text in ("soon", "0", "-3", "inf"):
        monkeypatch.setenv("UNLEARN_TIME_LIMIT_S", text)
        with pytest.raises(InputError, match="UNLEARN_TIME_LIMIT_S"):
            unlearn(target.model, tmp_path / "out", *sets)

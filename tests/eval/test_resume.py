"""An evaluation that is killed and started again, or shared between processes, ends in the report of an undisturbed one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import eval.work as work_module
from eval.config import EvalConfig
from eval.mmlu import MmluData, Question
from eval.parts import Shard, UnitStore
from eval.runner import evaluate, evaluate_shard
from tests.helpers.eval_models import Bench, bench_attack, bench_data, half_trained
from trainers.modeling import load_model, load_tokenizer

CONFIG = EvalConfig(max_new_tokens=12, dtype="float32", batch_tokens=60, bootstrap_samples=20, mmlu_shots=1)
"""Units of few rows: at most 8 * 60 positions each."""


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    half_trained().model.save_pretrained(place)
    half_trained().tokenizer.save_pretrained(place)
    return place


def mmlu():
    def question(subject, row):
        return Question(subject, row, f"Where in {1900 + row}?", ("Oslo", "Lima", "Cairo", "Quito"), "ABCD"[row % 4])

    return MmluData(
        dev={name: (question(name, 1),) for name in ("maps", "clocks")},
        test={name: tuple(question(name, row) for row in range(2, 6)) for name in ("maps", "clocks")},
    )


def bench(folder) -> Bench:
    return Bench(model=load_model(folder, dtype="float32"), tokenizer=load_tokenizer(folder), data=bench_data(), attack=bench_attack())


def inputs(folder, config=CONFIG):
    found = bench(folder)
    return {
        "model": found.model,
        "tokenizer": found.tokenizer,
        "data": found.data,
        "attack": found.attack,
        "mmlu": mmlu(),
        "config": config,
    }


def run(folder, store=None, config=CONFIG, **more):
    return evaluate(**inputs(folder, config), fold="test", model_name="tiny", store=store, **more)


def same(actual, expected):
    assert actual.rows == expected.rows
    assert actual.scores == expected.scores
    assert actual.intervals == expected.intervals
    assert actual.counts == expected.counts


def measured(monkeypatch):
    """The rows and questions that forward passes are spent on from now on."""
    seen: list[int] = []
    for name in ("measure_rows", "mmlu_accuracy"):
        work = getattr(work_module, name)

        def counted(work=work, **given):
            seen.append(len(given["tasks"]) if "tasks" in given else len(given["data"].questions))
            return work(**given)

        monkeypatch.setattr(work_module, name, counted)
    return seen


def _slow_process(folder, store):
    """Run in a process of its own: a unit, a pause, a unit, ..."""
    add = UnitStore.add

    def slow(self, unit, result):
        add(self, unit, result)
        time.sleep(0.5)

    UnitStore.add = slow
    torch.set_num_threads(1)
    run(folder, UnitStore(store))


def kill_midway(folder, store, *, after):
    """Start an evaluation and kill it once so many units are done; what it has written then."""
    code = f"from tests.eval.test_resume import _slow_process; _slow_process({str(folder)!r}, {str(store)!r})"
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "1"})
    file = store / "units-0-of-1.jsonl"
    deadline = time.monotonic() + 120
    while not (file.exists() and file.read_bytes().count(b"\n") >= after):
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return file.read_bytes()


def test_a_killed_evaluation_goes_on_and_ends_in_the_same_report_to_the_digit(folder, tmp_path, monkeypatch):
    undisturbed = run(folder)
    lines = kill_midway(folder, tmp_path / "p", after=3)
    assert 3 <= lines.count(b"\n") < 10
    with open(tmp_path / "p" / "units-0-of-1.jsonl", "ab") as file:
        file.write(b'{"unit": "rows-9", "result": [[-1.0')
    seen, said = measured(monkeypatch), []
    same(run(folder, UnitStore(tmp_path / "p"), progress=said.append), undisturbed)
    total = len(undisturbed.rows)
    assert 0 < sum(seen) < total
    assert said[0] == f"going on: {total - sum(seen)} of {total} rows were finished before"


@pytest.mark.parametrize("change", [{"max_new_tokens": 11}, {"mmlu_shots": 0}, {"stop_decided_questions": False}])
def test_other_settings_reuse_nothing(folder, tmp_path, monkeypatch, change):
    """Negative control."""
    run(folder, UnitStore(tmp_path / "p"))
    seen, said = measured(monkeypatch), []
    changed = CONFIG.model_copy(update=change)
    report = run(folder, UnitStore(tmp_path / "p"), changed, progress=said.append)
    assert sum(seen) == len(report.rows)
    assert "discarded" in said[0]
    same(report, run(folder, config=changed))


def test_other_weights_reuse_nothing(folder, tmp_path, monkeypatch):
    run(folder, UnitStore(tmp_path / "p", identity={"weights": "a"}))
    seen = measured(monkeypatch)
    run(folder, UnitStore(tmp_path / "p", identity={"weights": "a"}))
    assert sum(seen) == 0
    report = run(folder, UnitStore(tmp_path / "p", identity={"weights": "b"}))
    assert sum(seen) == len(report.rows)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_shards_compute_every_row_once_and_merge_to_the_same_report(folder, tmp_path, monkeypatch, count):
    """Equal to the digit: units, and with them batches, do not depend on the number of shards."""
    undisturbed = run(folder)
    seen = measured(monkeypatch)
    sizes = []
    for index in range(count):
        evaluate_shard(**inputs(folder), store=UnitStore(tmp_path / "p"), shard=Shard(index, count))
        sizes.append(sum(seen) - sum(sizes))
    assert sum(seen) == len(undisturbed.rows)
    assert all(sizes)
    seen.clear()
    same(run(folder, UnitStore(tmp_path / "p")), undisturbed)
    assert seen == [], "the merge needs no forward pass"


def test_what_a_helper_leaves_undone_is_done_by_the_caller(folder, tmp_path, monkeypatch):
    class Dead:
        count = 2

        def start(self):
            pass

        def wait(self, meanwhile):
            meanwhile()

        def stop(self):
            pass

    seen = measured(monkeypatch)
    report = run(folder, UnitStore(tmp_path / "p"), helpers=Dead())
    assert sum(seen) == len(report.rows)


def test_a_model_that_is_not_finite_survives_the_store(folder, tmp_path):
    """NaN and infinity come back as what they were."""
    broken = inputs(folder)
    with torch.no_grad():
        broken["model"].model.layers[1].mlp.down_proj.weight.fill_(float("nan"))
    reports = []
    for _ in range(2):
        reports.append(evaluate(**broken, fold="test", model_name="tiny", store=UnitStore(tmp_path / "p")))
    assert reports[0].scores == reports[1].scores
    assert reports[0].scores["forget_answer_log_prob"] is None
    assert str(reports[0].rows) == str(reports[1].rows)

"""lm-eval through its adapter: with a stand-in, and with the package itself where it is installed."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from eval.suites.harness import harness_lines, import_harness, run_harness, split_tasks
from tests.helpers.data import write_rows
from trainers.errors import InputError, RunError, SetupError

RESULTS = {
    "results": {"toy": {"alias": "toy", "acc,none": np.float64(0.75), "acc_stderr,none": 0.125, "samples": np.int64(4)}},
    "versions": {"toy": 1.0},
    "n-shot": {"toy": 0},
    "config": {"model": object()},
    "lm_eval_version": "0.4.13",
}


@pytest.fixture
def stand_in(monkeypatch):
    """A module named lm_eval that remembers how it was called; set ``error`` to make it fail."""
    module = SimpleNamespace(calls=[], error=None)

    def simple_evaluate(**arguments):
        module.calls.append(arguments)
        if module.error is not None:
            raise module.error
        return RESULTS

    module.simple_evaluate = simple_evaluate
    monkeypatch.setitem(sys.modules, "lm_eval", module)
    return module


def run(tmp_path, tasks=("toy",)):
    return run_harness(model=tmp_path, tasks=tasks, dtype="bfloat16", device="cpu")


def test_the_written_checkpoint_is_evaluated_on_the_tasks(stand_in, tmp_path):
    run(tmp_path, tasks=("hellaswag", "arc_easy"))
    (call,) = stand_in.calls
    assert (call["model"], call["tasks"], call["device"]) == ("hf", ["hellaswag", "arc_easy"], "cpu")
    assert call["model_args"] == {"pretrained": str(tmp_path), "dtype": "bfloat16"}


def test_results_are_copied_as_plain_numbers_and_the_rest_is_left(stand_in, tmp_path):
    found = run(tmp_path)
    assert json.loads(json.dumps(found)) == found
    assert found["results"]["toy"] == {"alias": "toy", "acc,none": 0.75, "acc_stderr,none": 0.125, "samples": 4}
    assert (found["tasks"], found["lm_eval_version"], found["versions"]) == (["toy"], "0.4.13", {"toy": 1.0})
    assert "config" not in found


def test_the_table_has_every_metric_with_its_error(stand_in, tmp_path):
    assert [line.split() for line in harness_lines(run(tmp_path))] == [["lm-eval", "0.4.13"], ["toy", "acc,none", "0.7500", "+-", "0.1250"]]


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (KeyError("Spec 'nosuch' is not a registered task"), InputError, "nosuch"),
        (ConnectionError("Couldn't reach 'allenai/ai2_arc'"), SetupError, "ai2_arc"),
        (RuntimeError("first line\nsecond"), RunError, "RuntimeError: first line"),
    ],
)
def test_its_failures_become_messages(stand_in, tmp_path, error, kind, says):
    stand_in.error = error
    with pytest.raises(kind, match=says) as caught:
        run(tmp_path)
    assert "--lm-eval toy" in str(caught.value)


def test_without_the_package_the_message_has_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SetupError) as caught:
        import_harness()
    assert caught.value.fix == 'pip install "unlearn-ties[eval]"'
    assert caught.value.exit_code == 3


def test_tasks_are_named_with_commas_between_them():
    assert split_tasks(" hellaswag, arc_easy,") == ["hellaswag", "arc_easy"]
    with pytest.raises(InputError, match="no task"):
        split_tasks(" , ")


def test_the_package_itself_takes_these_arguments(tmp_path):
    """A task of two questions, from a local file; skipped where the optional package is not installed."""
    pytest.importorskip("lm_eval", reason='lm-eval is not installed (pip install "unlearn-ties[eval]")')
    import yaml

    from tests.helpers.suite_data import model, tokenizer

    model(()).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    rows = write_rows(tmp_path / "toy.jsonl", [{"q": f"Where is {n}?", "choices": ["Oslo", "Lima"], "label": n % 2} for n in range(4)])
    task = {
        "task": "toy",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    found = run_harness(model=tmp_path / "model", tasks=[str(tmp_path / "toy.yaml")], dtype="float32", device="cpu")
    ((metrics),) = found["results"].values()
    assert metrics["acc,none"] in (0.0, 0.25, 0.5, 0.75, 1.0)
    with pytest.raises(InputError, match="nosuchtask"):
        run_harness(model=tmp_path / "model", tasks=["nosuchtask"], dtype="float32", device="cpu")

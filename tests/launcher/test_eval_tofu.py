"""``unlearn eval`` on folders of TOFU and MUSE, and with tasks of lm-eval."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from launcher.cli import main
from tests.helpers.data import write_rows
from tests.helpers.suite_data import model, perturbed, tokenizer, write_muse, write_tofu

ALL, RETAINED = ("forget", "retain", "options"), ("retain", "options")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models, and a folder of each benchmark."""
    place = tmp_path_factory.mktemp("suites")
    for name, knows in (("model", ALL), ("retained", RETAINED)):
        model(knows).save_pretrained(place / name)
        tokenizer().save_pretrained(place / name)
    write_tofu(place / "tofu")
    write_muse(place / "muse")
    for side in ("forget", "retain"):
        rows = [{"id": f"{side}{n}{kind}", "input": "Ada", "output": "Oslo", "task": "Task1"} for n in range(2) for kind in ("sc1", "qa0")]
        write_rows(place / "lume" / f"{side}.jsonl", rows)
    return place


@pytest.fixture
def unlearn(folder, tmp_path, monkeypatch, capsys):
    """Run ``unlearn eval`` on the first model; gives exit code, report and what was printed."""
    monkeypatch.chdir(folder)

    def call(*arguments, own_model="model"):
        with pytest.raises(SystemExit) as exit_:
            main(["eval", "--model", own_model, "--out", str(tmp_path / "eval.json"), *arguments])
        printed = capsys.readouterr()
        path = tmp_path / "eval.json"
        report = json.loads(path.read_text()) if path.exists() else None
        return SimpleNamespace(code=exit_.value.code, report=report, text=printed.out + printed.err)

    return call


@pytest.fixture
def lm_eval(monkeypatch):
    """A stand-in for the optional package."""
    calls = []

    def simple_evaluate(**arguments):
        calls.append(arguments)
        return {"results": {"toy": {"acc,none": 0.5}}, "lm_eval_version": "0"}

    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(simple_evaluate=simple_evaluate))
    return calls


def test_a_tofu_folder_is_recognised_and_scored(unlearn):
    done = unlearn("--data", "tofu", "--retained-model", "retained", "--max-new-tokens", "16")
    assert done.code == 0, done.text
    assert (done.report["benchmark"], done.report["retained_model"]) == ("tofu", "retained")
    assert done.report["scores"]["forget_quality"] < 0.05
    assert done.report["scores"]["forget_probability"] > 0.9
    for word in ("model_utility", "forget_quality", "world_facts", "privleak"):
        assert word in done.text


def test_a_muse_folder_is_recognised_and_scored(unlearn):
    done = unlearn("--data", "muse", "--retained-model", "retained", "--max-new-tokens", "16")
    assert done.code == 0, done.text
    assert done.report["benchmark"] == "muse"
    assert done.report["scores"]["verbmem_forget_rouge_l_f1"] == 1.0
    assert done.report["scores"]["privleak"] < 0


def test_a_lume_folder_is_scored_as_before(unlearn):
    done = unlearn("--data", "lume", "--max-new-tokens", "4")
    assert done.code == 0, done.text
    assert "official" in done.report
    assert "benchmark" not in done.report


def test_the_retained_model_itself_has_forget_quality_one(unlearn):
    done = unlearn("--data", "tofu", "--retained-model", "retained", "--max-new-tokens", "2", own_model="retained")
    assert (done.report["scores"]["forget_quality"], done.report["scores"]["privleak"]) == (1.0, 0.0)


def test_a_folder_of_two_layouts_needs_one_named(unlearn, folder, tmp_path):
    both = write_tofu(tmp_path / "both")
    for name in ("forget", "retain"):
        write_rows(both / f"{name}.jsonl", [{"id": f"{name}qa0", "input": "Ada", "output": "Oslo", "task": "Task1"}])
    asked = unlearn("--data", str(both), "--max-new-tokens", "2")
    assert (asked.code, asked.report) == (2, None)
    assert "--layout lume or --layout tofu" in asked.text
    assert unlearn("--data", str(both), "--layout", "tofu", "--max-new-tokens", "2").report["benchmark"] == "tofu"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--data DIR, or --lm-eval TASKS"),
        (["--data", "tofu", "--mia", "mia"], "--mia has no meaning here: the data is TOFU"),
        (["--data", "tofu", "--official"], "--official has no meaning"),
        (["--data", "muse", "--processes", "2"], "--processes has no meaning"),
        (["--data", "muse", "--split", "forget10"], "--split has no meaning here: the data is MUSE"),
        (["--data", "muse", "--prompt", "chat"], "--prompt has no meaning"),
        (["--data", "lume", "--retained-model", "retained"], "--retained-model has no meaning here: the data is LUME"),
        (["--data", "tofu", "--split", "forget05"], "no forget05"),
        (["--data", "tofu", "--layout", "muse"], "nothing that MUSE evaluates"),
        (["--data", "tofu", "--prompt", "chat"], "no chat template"),
        (["--data", "tofu", "--retained-model", "nowhere"], "model folder not found"),
        (["--data", "."], "no known benchmark"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(unlearn, arguments, says):
    done = unlearn(*arguments)
    assert (done.code, done.report) == (2, None), done.text
    assert says in done.text
    assert "Traceback" not in done.text


def test_a_row_that_is_malformed_is_named(unlearn, tmp_path):
    rows = perturbed("forget")
    del rows[4]["perturbed_answer"]
    done = unlearn("--data", str(write_tofu(tmp_path / "bad", forget10_perturbed=rows)))
    assert (done.code, done.report) == (2, None)
    assert "forget10_perturbed.jsonl, line 5" in done.text


def test_tasks_of_lm_eval_need_no_data(unlearn, lm_eval):
    done = unlearn("--lm-eval", "hellaswag,arc_easy")
    assert done.code == 0, done.text
    assert done.report["lm_eval"]["results"] == {"toy": {"acc,none": 0.5}}
    assert done.report["benchmark"] == "lm-eval"
    assert lm_eval[0]["tasks"] == ["hellaswag", "arc_easy"]
    assert lm_eval[0]["model_args"]["pretrained"] == "model"


@pytest.mark.parametrize("data", ["tofu", "lume"])
def test_tasks_of_lm_eval_are_added_to_the_report_of_the_data(unlearn, lm_eval, data):
    done = unlearn("--data", data, "--lm-eval", "toy", "--max-new-tokens", "2")
    assert done.code == 0, done.text
    assert done.report["lm_eval"]["tasks"] == ["toy"]
    assert done.report["scores"]


def test_without_the_package_nothing_is_computed(unlearn, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = unlearn("--data", "tofu", "--lm-eval", "toy")
    assert (done.code, done.report) == (3, None)
    assert 'pip install "unlearn-ties[eval]"' in done.text


def test_an_adapter_is_refused_with_the_command_that_merges_it(unlearn, lm_eval, monkeypatch, tmp_path):
    from pathlib import Path

    import launcher.stages

    checkpoint = tmp_path / "adapter"
    checkpoint.mkdir()
    (checkpoint / "adapter_config.json").write_text("{}")
    monkeypatch.setattr(launcher.stages, "locate_model", lambda path: (Path("model"), checkpoint))
    done = unlearn("--lm-eval", "toy")
    assert (done.code, done.report, lm_eval) == (2, None, [])
    assert "unlearn merge --method linear --base model" in done.text

"""`unlearn merge`: every method from the command line, and every refusal before a byte is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from launcher.cli import main
from merging.methods.table import CONVENTIONS, METHODS
from tests.helpers.merge_models import write_base, write_full, write_lora

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("command")
    base = write_base(root / "base", dtype=torch.float32)
    write_lora(root / "trial-1", base=base, seed=1)
    write_lora(root / "trial-2", base=base, seed=2)
    write_lora(root / "rank-2", base=base, seed=3, r=2)
    write_full(root / "full", base=base, seed=4, only="mlp")
    return root


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


def _merge(capsys, root: Path, out: Path, *options: str, second: str = "trial-2") -> tuple[int, str, str]:
    folders = ("--base", root / "base", "--trial", root / "trial-1", "--trial", root / second, "--out", out)
    return _run(capsys, "merge", *map(str, folders), *options)


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_runs(capsys, root, tmp_path, method):
    code, out, _ = _merge(capsys, root, tmp_path / "out", "--method", method)
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert (code, record["config"]["method"]) == (0, method)
    assert record["formula"] in out


def test_all_settings_reach_the_merge(capsys, root, tmp_path):
    options = "--method della --density 0.5 --epsilon 0.2 --rescale l1 --seed 9 --elect weighted --divisor weight --zero-sum drop --scale 2"
    assert _merge(capsys, root, tmp_path / "out", *options.split())[0] == 0
    config = json.loads((tmp_path / "out" / "merge.json").read_text())["config"]
    assert config == {
        "method": "della", "density": 0.5, "epsilon": 0.2, "rescale": "l1", "seed": 9, "elect": "weighted", "divisor": "weight",
        "zero_sum": "drop", "scale": 2.0, "weights": None,
    }  # fmt: skip
    options = "--method breadcrumbs --gamma 0.2 --density 0.5 --weights 1 -0.5"
    assert _merge(capsys, root, tmp_path / "out", *options.split())[0] == 0
    config = json.loads((tmp_path / "out" / "merge.json").read_text())["config"]
    assert (config["gamma"], config["weights"]) == (0.2, [1.0, -0.5])
    options = "--trim-scope model --trim-count floor_plus_one"
    assert _merge(capsys, root, tmp_path / "out", *options.split())[0] == 0
    config = json.loads((tmp_path / "out" / "merge.json").read_text())["config"]
    assert (config["trim_scope"], config["trim_count"]) == ("model", "floor_plus_one")


@pytest.mark.parametrize("convention", list(CONVENTIONS))
def test_every_convention_runs_and_is_named(capsys, root, tmp_path, convention):
    code, out, _ = _merge(capsys, root, tmp_path / "out", "--convention", convention)
    assert code == 0
    assert f"convention {convention}" in out


def test_an_adapter_tells_its_rank_and_what_it_lost(capsys, root, tmp_path):
    code, out, _ = _merge(capsys, root, tmp_path / "out", "--output", "adapter", "--rank", "3")
    assert code == 0
    lost = json.loads((tmp_path / "out" / "merge.json").read_text())["lost_energy"]
    assert f"adapter of rank 3; {lost:.2%} of the merged update's squared norm is lost" in out
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    code, out, _ = _merge(capsys, root, tmp_path / "out", "--output", "adapter", "--method", "linear", second="rank-2")
    assert "adapter of rank 6; 0.00%" in out


@pytest.mark.parametrize(
    ("options", "second", "told"),
    [
        (("--method", "dare-ties"), "trial-2", 'did you mean "dare_ties"?'),
        (("--method", "tyes"), "trial-2", 'did you mean "ties"?'),
        (("--convention", "peft"), "trial-2", "peft-dense"),
        (("--convention", "paper", "--elect", "weighted"), "trial-2", "contradicts convention = paper"),
        (("--method", "linear", "--density", "0.8"), "trial-2", "method = linear does not read it; it reads scale, weights"),
        (("--method", "della", "--density", "0.9"), "trial-2", "keep probabilities from 0.75 to 1.05"),
        (("--method", "seed"), "rank-2", "rank 4 and rank 2"),
        (("--method", "seed"), "full", "has none"),
        (("--output", "adapter"), "full", "--output model"),
        (("--rank", "4"), "trial-2", "--output adapter"),
        (("--weights", "1", "2", "3"), "trial-2", "3 weights for 2 trials"),
        (("--method", "slerp", "--trial", "nowhere"), "trial-2", "merges 2 trials, not 3"),
    ],
)
def test_what_cannot_be_merged_is_refused_and_nothing_is_written(capsys, root, tmp_path, options, second, told):
    code, _, err = _merge(capsys, root, tmp_path / "out", *options, second=second)
    assert code == 2
    assert told in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_help_lists_every_method_and_convention(capsys):
    code, out, _ = _run(capsys, "merge", "--help")
    words = " ".join(out.split()).replace("- ", "-")
    assert code == 0
    assert ", ".join(METHODS) in words
    assert ", ".join(CONVENTIONS) in words

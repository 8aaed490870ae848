"""A report says how to make its run again, and nothing of the machine that it was made on but its hardware."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.report import render
from launcher.report_data import read_run
from launcher.report_provenance import commands_again, public_command
from launcher.report_text import without_paths
from trainers.files import write_json, write_text

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def run_with(folder: Path, **provenance: Any) -> Path:
    write_text(folder / "experiment.yaml", "name: fake\n")
    git = {"commit": COMMIT, "dirty": False}
    write_json(folder / "provenance.json", {"command": ["unlearn", "sweep", "a.yaml"], "folder": "/home/someone", "git": git} | provenance)
    return folder


def test_two_commands_bring_back_the_code_and_make_the_run(tmp_path: Path) -> None:
    code, again = commands_again(read_run(run_with(tmp_path / "run")))
    assert code["command"] == f"git checkout {COMMIT} && pip install -c constraints.txt ."
    assert again["command"] == "unlearn sweep RUN/experiment.yaml name=again"


def test_the_quickstart_is_made_again_from_its_own_options(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", command=["unlearn", "quickstart", "--out", "/data/someone/run", "--seed", "7"])
    assert commands_again(read_run(run))[1]["command"] == "unlearn quickstart --seed 7 --out runs/again"
    own = run_with(tmp_path / "own", command=["unlearn", "quickstart", "--data", "/data/someone/lume"])
    assert commands_again(read_run(own))[1]["command"] == "unlearn sweep RUN/experiment.yaml name=again"


def test_code_that_is_not_known_exactly_is_not_claimed(tmp_path: Path) -> None:
    changed = run_with(tmp_path / "changed", git={"commit": COMMIT, "dirty": True})
    assert "this commit alone is not it" in commands_again(read_run(changed))[0]["does"]
    released = run_with(tmp_path / "released", git=None, versions={"unlearn-ties": "0.1.0"})
    assert "# of release 0.1.0" in commands_again(read_run(released))[0]["command"]
    assert COMMIT not in commands_again(read_run(released))[0]["command"]


def test_folders_of_the_machine_are_nowhere_on_the_page(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", command=["unlearn", "sweep", "/home/someone/x.yaml", "data.path=/home/someone/lume"])
    write_text(run / "experiment.yaml", "name: fake\nstorage_path: /home/someone/runs\ndata: {path: /home/someone/lume}\n")
    write_json(run / "target.json", {"path": "/home/someone/target", "weights_hash": "ab"})
    data = read_run(run)
    assert public_command(data) == "unlearn sweep …/x.yaml data.path=…/lume"
    page = render(data, plots={})
    assert "someone" not in page
    assert "…/lume" in page


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("saved to /mnt/disk/run/a.json.", "saved to …/a.json."),
        ("in ~/runs/x and ../other/y", "in …/x and …/y"),
        ("--out=/a/b", "--out=…/b"),
    ],
)
def test_only_the_end_of_a_path_is_kept(text: str, expected: str) -> None:
    assert without_paths(text) == expected


@pytest.mark.parametrize(
    "text", ["3/4 of 12/5", "allenai/OLMo-1B", "trials/trial-07/logs/rank-0.log", "https://arxiv.org/abs/2503.21088", "and/or"]
)
def test_what_is_no_private_path_stays(text: str) -> None:
    """Negative control: models of a hub, files of the run, addresses and fractions."""
    assert without_paths(text) == text

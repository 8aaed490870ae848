"""Every block of YAML, Python and JSON in README.md and docs/*.md: loaded, run, parsed."""

from __future__ import annotations

import ast
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
import yaml

from launcher.load import LoadedExperiment, load_experiment
from tests.documents.blocks import Block, all_blocks, command_lines, find_blocks, page_name, pages, prose
from tests.documents.commands import SHELL, all_commands
from tests.documents.scene import Prototypes, inside
from tests.helpers.data import REPOSITORY
from tests.helpers.small_run import small_experiment
from trainers.errors import InputError
from trainers.files import write_text

pytestmark = pytest.mark.skipif(not (REPOSITORY / "docs").is_dir(), reason="the guides are part of the repository, not of the package")

NOT_CALLED = {"launcher.api.unlearn": "a whole sweep against the clock; tests/integration/test_api.py runs it"}
"""Functions that the guides' Python may call, but which only check their arguments here, with the reason."""


def by_id(block: Block) -> str:
    return block.place


# ---- YAML


def merged(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``change``; sections are merged, everything else is replaced."""
    result = dict(base)
    for key, value in change.items():
        known = result.get(key)
        sections = isinstance(value, Mapping) and isinstance(known, Mapping) and not set(value) & {"values", "min", "max"}
        result[key] = merged(known, value) if sections and isinstance(known, Mapping) else value
    return result


def load_yaml(text: str, *, folder: Path) -> LoadedExperiment | None:
    """What a YAML block means: a whole experiment, sections of one, or a cluster file (None).

    Raises:
        InputError: for a setting that does not exist or has a wrong value.
        AssertionError: for YAML that is neither.
    """
    from launcher.config import ExperimentConfig

    values = yaml.safe_load(text)
    assert isinstance(values, dict), "a block of YAML is a mapping"
    if not set(values) & set(ExperimentConfig.model_fields) or "apiVersion" in values or "cluster_name" in values:
        _check_cluster(values)
        return None
    file = folder / "block.yaml"
    if not {"name", "data"} <= set(values):
        base = small_experiment(Path("data"), storage="runs", target=Path("models/target"))
        base["sweep"]["start_points"] = []
        if "data" in values and {"path", "forget"} & set(values["data"]):
            base["data"] = {}
        for section in ("objective", "schedule", "trainable"):
            if section in values.get("train", {}):
                base["train"].pop(section, None)
        if values.get("train", {}).get("trainable"):
            values["train"].setdefault("lora", None)
        write_text(file, yaml.safe_dump(merged(base, values), sort_keys=False))
    else:
        write_text(file, text)
    return load_experiment(file)


def _check_cluster(values: dict[str, Any]) -> None:
    if "cluster_name" in values:
        from ray.autoscaler._private.util import prepare_config, validate_config

        validate_config(prepare_config(values))
    elif "apiVersion" in values:
        assert {"kind", "metadata"} <= set(values)
    else:
        assert {"resources", "run"} <= set(values), f"neither settings of an experiment nor a cluster file: {', '.join(map(str, values))}"


@pytest.mark.parametrize("block", all_blocks("yaml"), ids=by_id)
def test_yaml_is_loaded(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    load_yaml(block.text, folder=tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train: {lora: {rank: 8}}", "unknown key"),
        ("sweep: {serach: optuna}", "search"),
        ("train: {learning_rate: {min: 1, max: 0.1}}", "not below"),
        ("name: a\ndata: {path: x}\nmodel: {model_name_or_path: m}\nnothing: 1", "unknown key"),
        ("nothing: 1", "neither"),
        ("cluster_name: a\nmax_wrokers: 3\nprovider: {type: local, head_ip: h, worker_ips: []}\nauth: {ssh_user: u}", "max_wrokers"),
    ],
)
def test_wrong_yaml_is_refused(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=says):
        load_yaml(text, folder=tmp_path)


def test_sections_are_put_into_an_experiment(tmp_path: Path) -> None:
    experiment = load_yaml("train: {lora: {r: 3}, learning_rate: {values: [1.0e-4, 2.0e-4]}}", folder=tmp_path)
    assert experiment is not None
    assert experiment.config.train.lora is not None
    assert experiment.config.train.lora.r == 3
    assert "learning_rate" in experiment.space.domains


# ---- Python


def paths_in(source: str) -> set[str]:
    """Texts of a block that may be names of folders, with their last folder."""
    found = {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {text for text in found if "\n" not in text and " " not in text and text and "://" not in text}


def stand_in(name: str, *, prototypes: Prototypes) -> Path | None:
    """What stands in for a folder that a block of Python names; None where the name says nothing, or says that it is written."""
    made, parts = prototypes.made, Path(name).parts
    if any(word in name for word in ("unlearned", "merged", "output", "out/")) and "runs/" not in name:
        return None
    for layout in ("tofu", "muse", "mia", "mmlu", "lume"):
        if layout in parts:
            return made[layout]
    if len(parts) == 2 and parts[0] == "data":
        return made["lume"]
    if "target" in parts or "base" in parts or parts[0] == "models":
        return made["model"]
    if any(part.startswith("trial-") for part in parts):
        return made[f"trial {sum(map(ord, parts[-1])) % 2}"]
    return None


def run_python(blocks: list[Block], *, folder: Path, prototypes: Prototypes, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the blocks of one page in one namespace."""
    import importlib

    namespace: dict[str, Any] = {"__name__": "guide"}
    with inside(folder), monkeypatch.context() as patch:
        for name in NOT_CALLED:
            module, _, function = name.rpartition(".")
            original = getattr(importlib.import_module(module), function)
            patch.setattr(name, create_autospec(original, return_value=Path("models/unlearned")))
        for block in blocks:
            for name in sorted(paths_in(block.text)):
                path = Path(name)
                if path.parts[:1] == ("runs",) and len(path.parts) > 1 and not Path(*path.parts[:2]).exists():
                    Path("runs").mkdir(exist_ok=True)
                    Path(*path.parts[:2]).symlink_to(prototypes.made["run"])
                prototype = stand_in(name, prototypes=prototypes)
                if prototype is not None and not path.exists() and not path.is_absolute():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.symlink_to(prototype)
            try:
                exec(compile("\n" * (block.line - 1) + block.text, str(REPOSITORY / block.page), "exec"), namespace)
            except Exception as error:
                pytest.fail(f"{block.place}: {type(error).__name__}: {error}")
    return namespace


def python_blocks(path: Path) -> list[Block]:
    return [block for block in find_blocks(path.read_text(encoding="utf-8"), page=page_name(path)) if block.language == "python"]


@pytest.mark.parametrize("path", [path for path in pages() if python_blocks(path)], ids=page_name)
def test_python_runs(path: Path, prototypes: Prototypes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that the page's shell blocks write are there, too."""
    for command in all_commands(among=[path]):
        if command.words[0] in SHELL:
            (tmp_path / "page").mkdir(exist_ok=True)
            subprocess.run(["bash", "-c", command.shell], cwd=tmp_path / "page", check=True)
    run_python(python_blocks(path), folder=tmp_path / "page", prototypes=prototypes, monkeypatch=monkeypatch)


def test_wrong_python_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An import that does not exist, and a call with arguments that the function does not take."""
    nothing = Prototypes(tmp_path, {"model": tmp_path, "lume": tmp_path})
    for source in ("from launcher.api import unlern", "from launcher.api import unlearn\nunlearn('a', 'b')"):
        with pytest.raises(pytest.fail.Exception, match="page:1"):
            run_python([Block("page", 1, "python", source)], folder=tmp_path / "p", prototypes=nothing, monkeypatch=monkeypatch)


def test_blocks_of_a_page_share_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [Block("page", 1, "python", "a = 1"), Block("page", 5, "python", "b = a + 1")]
    nothing = Prototypes(tmp_path, {})
    assert run_python(blocks, folder=tmp_path / "p", prototypes=nothing, monkeypatch=monkeypatch)["b"] == 2


# ---- JSON, and blocks as such


@pytest.mark.parametrize("block", all_blocks("json"), ids=by_id)
def test_json_is_valid(block: Block) -> None:
    """One value, or one on each line."""
    try:
        json.loads(block.text)
    except json.JSONDecodeError:
        for line in block.text.splitlines():
            json.loads(line)


def test_every_block_has_a_language_that_means_something() -> None:
    """And no block is looked at twice or not at all: none is left open."""
    for path in pages():
        find_blocks(path.read_text(encoding="utf-8"), page=page_name(path))
    with pytest.raises(ValueError, match="no language"):
        find_blocks("```yml\na: 1\n```", page="page")
    with pytest.raises(ValueError, match="no end"):
        find_blocks("```yaml\na: 1\n", page="page")


def test_blocks_are_found_with_their_lines() -> None:
    text = "# Page\n\n```console\nls\n```\n\n- item\n\n  ```yaml\n  a: 1\n  ```\n\n```\nRUN/\n  file\n```\n"
    found = find_blocks(text, page="page")
    assert [(block.line, block.language, block.text) for block in found] == [
        (4, "console", "ls"),
        (10, "yaml", "a: 1"),
        (14, "text", "RUN/\n  file"),
    ]
    assert "ls" not in prose(text)
    assert prose(text).count("\n") == text.rstrip("\n").count("\n")


def test_commands_are_joined_and_told_from_output() -> None:
    """A backslash joins lines, a prompt marks commands among output, a here-document belongs to its command."""
    joined = Block("page", 10, "", "# note\nunlearn sweep a.yaml \\\n    b=1\n\nunlearn status r")
    assert command_lines(joined) == [(11, "unlearn sweep a.yaml b=1"), (14, "unlearn status r")]
    prompted = Block("page", 1, "console", "$ unlearn init\nwrote a.yaml\n$ unlearn status r\nr: finished")
    assert command_lines(prompted) == [(1, "unlearn init"), (3, "unlearn status r")]
    document = Block("page", 1, "bash", "cat > a.py <<'END'\nx = 1  # kept\n\ny = 2\nEND\nls")
    assert command_lines(document) == [(1, "cat > a.py <<'END'\nx = 1  # kept\n\ny = 2\nEND"), (6, "ls")]


def test_input_errors_are_not_swallowed(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        load_yaml("train: {learning_rate: -1}", folder=tmp_path)

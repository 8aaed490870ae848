"""Imports point right only, heavy libraries stay where they belong, and importing an objective loads no engine."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("launcher", "merging", "eval", "trainers")


def python(*arguments: str, folder: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return python("-c", command, "--config", "setup.cfg", "--no-cache", folder=folder)


def modules() -> list[Path]:
    return [file for package in PACKAGES for file in sorted((REPOSITORY / package).rglob("*.py"))]


def imported_roots(source: str) -> set[str]:
    """First names of everything a module imports, at its top or inside a function; relative imports do not leave their package."""
    roots = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            roots.add(node.module.partition(".")[0])
    return roots


def importers(name: str, *, files: Iterable[Path]) -> list[str]:
    return [str(file.relative_to(REPOSITORY)) for file in files if name in imported_roots(file.read_text(encoding="utf-8"))]


# --- contracts ---


def test_the_import_contracts_hold() -> None:
    pytest.importorskip("importlinter")
    result = lint_imports(REPOSITORY)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        ("trainers/schedule.py", "import eval.bootstrap", "imports point right"),
        ("eval/bootstrap.py", "import ray", "Ray only in the launcher"),
        ("trainers/objectives/npo.py", "import deepspeed", "DeepSpeed in one module"),
    ],
)
def test_an_import_against_the_contracts_is_found(tmp_path: Path, module: str, line: str, broken: str) -> None:
    """Negative control on a copy of the packages with one line added."""
    pytest.importorskip("importlinter")
    for package in PACKAGES:
        shutil.copytree(REPOSITORY / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "recipes", "assets"))
    shutil.copy(REPOSITORY / "setup.cfg", tmp_path / "setup.cfg")
    with open(tmp_path / module, "a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert any(broken in text and "BROKEN" in text for text in result.stdout.splitlines()), result.stdout


# --- who imports what ---


def test_deepspeed_is_imported_by_one_module() -> None:
    assert importers("deepspeed", files=modules()) == ["trainers/engine/deepspeed_engine.py"]


def test_ray_is_imported_by_the_launcher_alone() -> None:
    found = importers("ray", files=modules())
    assert found
    assert all(name.startswith("launcher/") for name in found), found


def test_the_scan_sees_every_form_of_import() -> None:
    source = "import a.b\nfrom c.d import e\ndef f():\n    import g as h\n    from .i import j\n# import k\n'import l'\n"
    assert imported_roots(source) == {"a", "c", "g"}
    assert len(modules()) > 40, "the scan reads the packages"


def test_our_packages_are_imported_by_name_and_never_as_a_whole() -> None:
    """``import eval`` would hide a builtin."""
    for file in modules():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & set(PACKAGES), file


def test_package_files_are_empty() -> None:
    files = [file for file in modules() if file.name == "__init__.py"]
    assert len(files) >= 7
    assert [str(file) for file in files if file.read_bytes()] == []


# --- what an import loads ---


def loaded_by(module: str, *, names: Iterable[str]) -> list[str]:
    result = python("-c", f"import json, sys, {module}; print(json.dumps([name for name in {list(names)!r} if name in sys.modules]))")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_importing_an_objective_loads_no_engine() -> None:
    heavy = ("transformers", "deepspeed", "ray", "peft", "datasets", "sklearn", "matplotlib")
    assert loaded_by("trainers.objectives.table", names=(*heavy, "torch")) == ["torch"], "objectives need torch and nothing else"


@pytest.mark.parametrize("module", ["trainers.config", "trainers.data.types", "trainers.data.encode", "trainers.memorize", "trainers.tiny"])
def test_configuration_and_records_load_no_torch(module: str) -> None:
    assert loaded_by(module, names=("torch", "transformers", "deepspeed", "ray", "datasets")) == []

"""docs/api.md says what the docstrings say, and everything that can be imported has one."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.helpers.data import REPOSITORY

GENERATOR = REPOSITORY / "docs" / "make_api.py"
PACKAGES = ("trainers", "eval", "merging", "launcher")
pytestmark = pytest.mark.skipif(not GENERATOR.exists(), reason="the guides are part of the repository, not of the package")


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_api", GENERATOR)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_api"] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_docstrings_say(generator: ModuleType) -> None:
    """Else: ``python docs/make_api.py``."""
    assert generator.PAGE.read_text(encoding="utf-8") == generator.page()


def test_a_stale_page_is_noticed(generator: ModuleType, tmp_path: Path) -> None:
    """A copy of the generator beside another page: --check fails and writes nothing, without it the page is written."""
    (tmp_path / "docs").mkdir()
    for package in PACKAGES:
        (tmp_path / package).symlink_to(REPOSITORY / package)
    copy = tmp_path / "docs" / "make_api.py"
    copy.write_text(GENERATOR.read_text(encoding="utf-8"), encoding="utf-8")
    page = tmp_path / "docs" / "api.md"
    page.write_text(generator.page().replace("Make a model forget", "Make a model remember"), encoding="utf-8")
    stale = page.read_text(encoding="utf-8")
    checked = subprocess.run([sys.executable, str(copy), "--check"], capture_output=True, text=True)
    assert checked.returncode == 1
    assert "make_api.py" in checked.stderr
    assert page.read_text(encoding="utf-8") == stale
    assert subprocess.run([sys.executable, str(copy)]).returncode == 0
    assert page.read_text(encoding="utf-8") == generator.page()


def test_everything_on_the_page_can_be_imported(generator: ModuleType) -> None:
    places = [place.split(":") for section in generator.PUBLIC.values() for place in section]
    assert len(places) > 80
    assert len({tuple(place) for place in places}) == len(places)
    for module, name in places:
        assert hasattr(importlib.import_module(module), name), f"{module}:{name}"


def test_a_public_name_that_is_gone_is_told(generator: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "PUBLIC", {"Errors": ("trainers.errors:NoSuchError",)})
    with pytest.raises(LookupError, match="NoSuchError is listed as public"):
        generator.page()


def test_a_function_is_described_with_its_arguments(generator: ModuleType) -> None:
    """Signature, paragraphs, and lists; double backticks become single ones."""
    source = (
        "def f(x: int, *, unit: str = 's') -> list[int]:\n"
        '    """One sentence about ``x``.\n\n    Args:\n        x: a number,\n            on two lines.\n        unit: seconds.\n\n'
        '    Raises:\n        ValueError: if not.\n    """\n'
    )
    (node,) = ast.parse(source).body
    text = "\n".join(generator._described(node))
    assert "f(x: int, *, unit: str = 's') -> list[int]" in text
    assert "One sentence about `x`." in text
    assert "- `x`: a number, on two lines.\n- `unit`: seconds." in text
    assert "Raises:\n\n- `ValueError`: if not." in text


def test_a_configuration_is_described_with_defaults_and_meanings(generator: ModuleType) -> None:
    text = generator.page()
    assert "- `density: float = 0.8`: fraction of each task vector kept" in text
    assert "- `SEQUENCE = 'sequences'`: Rows with at least one scored token." in text


# ---- every docstring


def undocumented(tree: ast.Module, *, promised: frozenset[str] = frozenset()) -> list[str]:
    """Public functions, classes and methods without a docstring; a method that a protocol promises is documented there."""
    missing = [] if ast.get_docstring(tree) or not tree.body else ["the module"]
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and not _repeats(node):
            missing += [] if ast.get_docstring(node) else [node.name]
            for method in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_") and not ast.get_docstring(method):
                    missing += [] if method.name in promised or _repeats(method) else [f"{node.name}.{method.name}"]
    return missing


def _repeats(node: ast.FunctionDef | ast.ClassDef) -> bool:
    """Setters and overloads say nothing new."""
    return any(ast.unparse(one).rpartition(".")[2] in ("setter", "overload") for one in node.decorator_list)


def modules() -> Iterator[tuple[Path, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            yield path, ast.parse(path.read_text(encoding="utf-8"))


def protocol_methods(tree: ast.Module) -> frozenset[str]:
    """Documented methods of the protocols of a module."""
    return frozenset(
        method.name
        for node in tree.body
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "Protocol" for base in node.bases)
        for method in node.body
        if isinstance(method, ast.FunctionDef) and ast.get_docstring(method)
    )


def test_every_public_function_class_and_method_has_a_docstring() -> None:
    found = list(modules())
    assert len(found) > 200
    promised = frozenset().union(*(protocol_methods(tree) for _, tree in found))
    assert {"forward", "log", "close"} <= promised
    missing = {str(path.relative_to(REPOSITORY)): names for path, tree in found if (names := undocumented(tree, promised=promised))}
    assert missing == {}


def test_a_missing_docstring_is_noticed() -> None:
    source = "def shown(): ...\ndef _hidden(): ...\nclass Shown:\n    def step(self): ...\n    def own(self): ...\n"
    assert undocumented(ast.parse(source), promised=frozenset({"step"})) == ["the module", "shown", "Shown", "Shown.own"]

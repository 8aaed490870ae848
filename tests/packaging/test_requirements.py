"""What an installation brings: everything that is imported is asked for, every extra is named where it is missed, every pin fits."""

from __future__ import annotations

import ast
import configparser
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("eval", "launcher", "merging", "trainers")
SOLD_AS = {"sklearn": "scikit-learn", "yaml": "pyyaml"}
"""Modules whose package has another name."""
COMES_WITH = {"annotated_types": "pydantic", "pydantic_core": "pydantic", "markupsafe": "jinja2", "sqlalchemy": "optuna"}
"""Modules that are part of what another package is: its own functions give and take their objects."""
OPTIONAL = {"lm_eval": "eval"}
"""Modules that an extra brings."""


def settings() -> configparser.ConfigParser:
    found = configparser.ConfigParser()
    found.read(REPOSITORY / "setup.cfg")
    return found


def requirements(text: str) -> dict[str, Requirement]:
    lines = (line.strip() for line in text.splitlines())
    found = (Requirement(line) for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def core() -> dict[str, Requirement]:
    return requirements(settings()["options"]["install_requires"])


def extras() -> dict[str, dict[str, Requirement]]:
    return {name: requirements(text) for name, text in settings()["options.extras_require"].items()}


def imported(source: str) -> set[str]:
    """First names of all modules that a source imports, of other packages than ours and Python's."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - set(PACKAGES)


def unasked(names: set[str], *, asked: Mapping[str, Requirement]) -> set[str]:
    """Modules that no requirement brings."""
    return {name for name in names if canonicalize_name(COMES_WITH.get(name, SOLD_AS.get(name, name))) not in asked}


def test_everything_that_is_imported_is_asked_for() -> None:
    """The negative control is a module that is there because something else needs it."""
    sources = [file.read_text(encoding="utf-8") for package in PACKAGES for file in (REPOSITORY / package).rglob("*.py")]
    names = set().union(*map(imported, sources))
    assert {"torch", "numpy", "ray"} <= names
    assert unasked(names - set(OPTIONAL), asked=core()) == set()
    assert unasked(imported("import requests, torch\nfrom urllib3.util import x"), asked=core()) == {"requests", "urllib3"}


def test_an_optional_module_is_brought_by_its_extra_alone() -> None:
    for name, extra in OPTIONAL.items():
        assert unasked({name}, asked=core()) == {name}
        assert unasked({name}, asked=extras()[extra]) == set()


def test_a_module_that_is_missing_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from eval.suites.harness import import_harness
    from trainers.errors import SetupError

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SetupError) as caught:
        import_harness()
    assert caught.value.fix == f'pip install "unlearn-ties[{OPTIONAL["lm_eval"]}]"'


def test_the_earlier_name_of_an_extra_still_works() -> None:
    assert {"cluster", "dev", "eval", "gpu"} <= set(extras())
    assert extras()["lm-eval"] == extras()["eval"]


def test_every_requirement_is_pinned_to_a_version_that_it_allows() -> None:
    """The constraints are what the tests pass with; an extra that they leave out is not installed with them."""
    pins = {name: pin.specifier for name, pin in requirements((REPOSITORY / "constraints.txt").read_text(encoding="utf-8")).items()}
    for name, requirement in {**core(), **extras()["dev"], **extras()["cluster"]}.items():
        assert name in pins, f"{name} has no line in constraints.txt"
        (pin,) = pins[name]
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), f"{requirement} and its pin {pin.version}"

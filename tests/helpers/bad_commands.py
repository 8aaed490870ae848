"""Cases of bad input, and the commands that they are given to."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.bad_input import Place, rows

LONG = "river " * 200
"""More tokens than the tiny target's context of 128."""


@dataclass(frozen=True)
class Case:
    """One spoilt input: how to make it and call the command, and what the message must say."""

    name: str
    arrange: Callable[[Place], Sequence[str]]
    says: tuple[str, ...]
    never: str = ""
    code: int = 2


def validate(place: Place, *overrides: str, **sets) -> list[str]:
    """``unlearn validate`` of a data folder with other rows."""
    place.lume(**sets)
    return ["validate", place.config(), *overrides]


def run(place: Place, command: str, *arguments: str, **changes) -> list[str]:
    """A command on good data and a configuration with changes."""
    place.lume()
    return [command, place.config(**changes), *arguments]


def with_splits(place: Place, **folds: list[str]) -> list[str]:
    """``unlearn validate`` with fixed folds of the forget set."""
    retain = [row["id"] for row in rows("r")]
    splits = {"forget": folds, "retain": {"train": retain[:2], "validation": retain[2:6], "test": retain[6:]}}
    place.write("lume/splits.json", json.dumps(splits))
    return validate(place)


def with_mia(place: Place, **sides) -> list[str]:
    place.mia(**sides)
    return validate(place, "data.mia=mia")


def with_mmlu(place: Place, **parts) -> list[str]:
    place.mmlu(**parts)
    return validate(place, "data.mmlu=mmlu")


def merge(place: Place, trial: str | Path, *options: str, base: str | Path = "", out: str = "out") -> list[str]:
    """``unlearn merge`` of a trial and a good one."""
    return ["merge", "--base", str(base or place.world.target), "--trial", str(trial), "--trial", str(place.world.under),
            "--out", out, *options]  # fmt: skip


def evaluate(place: Place, model: str | Path, *options: str, out: str = "eval.json") -> list[str]:
    place.lume()
    return ["eval", "--model", str(model), "--data", "lume", "--out", out, "--max-new-tokens", "2", *options]


def in_used_run(place: Place, *arguments: str, command: str = "sweep", text: str = "", **changes) -> list[str]:
    """A command on a run folder that another start has claimed with the unchanged configuration."""
    place.lume()
    place.used_run(place.config(**({"target": {}} if command == "memorize" else {})))
    return [command, place.config(text, **changes), *arguments]


def also(action: object, argv: list[str]) -> list[str]:
    """The command line, after something else was arranged."""
    return argv

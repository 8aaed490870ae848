"""A benchmark's result as a file: the question, how to ask it again, and the numbers with their units."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft")


@dataclass(frozen=True)
class Table:
    """Rows of text under column names that hold the units."""

    columns: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    title: str = ""

    def markdown(self) -> str:
        """The table as markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"{self.title}\n\n{text}" if self.title else text


@dataclass(frozen=True)
class Result:
    """One benchmark run.

    Args:
        theme: first part of the file's name.
        title: the file's heading.
        question: what the benchmark asks, one sentence.
        command: how it was run, without the folders of this machine.
        settings: everything that the numbers depend on.
        tables: the numbers.
        reading: what they say, and what they do not, one sentence each.
    """

    theme: str
    title: str
    question: str
    command: str
    settings: Mapping[str, object]
    tables: Sequence[Table]
    reading: Sequence[str] = field(default_factory=tuple)


def described(values: Any) -> str:
    """A dataclass's fields and values in one line."""
    return ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(values).items())


def hardware() -> str:
    """The GPU's name, or the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def commit() -> str:
    """The commit that was measured, and whether files differ from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "--short=12", "HEAD")
    changed = bool(git("status", "--porcelain", "--", "..", ":!results"))
    return f"{head or 'unknown'}{' with uncommitted changes' if changed else ''}"


def render(result: Result) -> str:
    """The file's text."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    facts = {
        "date": datetime.date.today().isoformat(),
        "command": f"`{result.command}`",
        "commit": commit(),
        "versions": f"Python {platform.python_version()}, {versions}",
        "hardware": f"{hardware()}, {torch.get_num_threads()} thread(s)",
        **result.settings,
    }
    parts = [f"# {result.title}", f"**Question.** {result.question}"]
    parts.append("\n".join(f"- {name}: {value}" for name, value in facts.items()))
    parts += [table.markdown() for table in result.tables]
    if result.reading:
        parts.append("**Reading.** " + " ".join(result.reading))
    return "\n\n".join(parts) + "\n"


def publish(result: Result, *, write: bool) -> None:
    """Print the result, and write it under benchmarks/results if asked to."""
    text = render(result)
    print(text)
    if write:
        slug = re.sub(r"[^a-z0-9]+", "-", hardware().lower()).strip("-")
        path = FOLDER / f"{result.theme}_{slug}_{datetime.date.today():%Y%m}.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"written: {path.relative_to(FOLDER.parents[1])}")

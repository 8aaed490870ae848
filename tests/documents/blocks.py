"""The fenced blocks of README.md and docs/*.md. Every block is tested, so its language says what happens to it:

``console``, ``bash``, ``sh`` or none
    Commands, one a line; ``\\`` at a line's end joins lines, `` # `` begins a comment, ``cat > FILE <<'END'`` takes the lines up to END.
    Where lines begin with ``$ `` those are the commands and the others are output. ``unlearn ...`` is run in a folder of its own, in the
    order of the page, on tiny models: a model, data, run or configuration that the line names and nothing has made yet is put there first,
    so any name will do (``runs/mine``, ``TARGET``, ``A``). What cannot run in seconds on a CPU is parsed (``commands.py`` has the list,
    with reasons). No ``<PLACEHOLDER>``, no ``...``.
``yaml``
    A whole experiment (it has ``name`` and ``data``) is loaded as it is. Some sections of one are put into a small experiment and loaded. A
    cluster file is read by its own parser. No ``...`` in it, no other kinds of YAML.
``python``
    Run: all blocks of a page in one namespace, in order, in an empty folder where the names of ``commands.py`` exist as well.
``json``
    Parsed.
``text``
    Output, trees, formulas: not looked at. So is a block without a language whose first line ends in ``/``, a tree.

In the running text, ``unlearn NAME --option`` between backticks must name a command and options that exist, ``train.lora.r`` a setting that
exists, and a relative link a file and a heading that exist.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.data import REPOSITORY

COMMANDS = ("", "console", "bash", "sh")
LANGUAGES = (*COMMANDS, "yaml", "python", "json", "text")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, with the line on which its text begins."""

    page: str
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        """``docs/sweeps.md:12``, for messages."""
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """README.md and every guide."""
    return [path for path in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))) if path.exists()]


def page_name(path: Path) -> str:
    """The path below the repository, or the name of a page outside."""
    return path.relative_to(REPOSITORY).as_posix() if path.is_relative_to(REPOSITORY) else path.name


def find_blocks(text: str, *, page: str) -> list[Block]:
    """All fenced blocks of a text, those inside list items included.

    Raises:
        ValueError: for a fence that nothing closes, or a language that has no meaning here.
    """
    blocks: list[Block] = []
    fence = language = indent = ""
    first, lines = 0, list[str]()
    for number, line in enumerate(text.splitlines(), start=1):
        mark = re.match(r"^(\s*)(`{3,}|~{3,})\s*([\w+-]*)\s*$", line)
        if not fence:
            if mark:
                indent, fence, language = mark.groups()
                first, lines = number + 1, []
        elif line.strip() == fence:
            content = "\n".join(lines)
            if not language and lines and lines[0].rstrip().endswith("/"):
                language = "text"
            blocks.append(Block(page, first, language, content))
            fence = ""
        else:
            lines.append(line.removeprefix(indent))
    if fence:
        raise ValueError(f"{page}:{first}: no end of the block")
    for block in blocks:
        if block.language not in LANGUAGES:
            raise ValueError(f'{block.place}: no language "{block.language}"; use one of {", ".join(LANGUAGES[1:])}')
    return blocks


def prose(text: str) -> str:
    """The text with its fenced blocks replaced by empty lines, so that lines keep their numbers."""
    result, fence = [], ""
    for line in text.splitlines():
        mark = re.match(r"^\s*(`{3,}|~{3,})", line)
        if not fence and mark:
            fence = mark[1]
            result.append("")
        elif fence:
            if line.strip() == fence:
                fence = ""
            result.append("")
        else:
            result.append(line)
    return "\n".join(result)


def all_blocks(*languages: str) -> list[Block]:
    """Every block of every page in one of the languages."""
    found = [block for path in pages() for block in find_blocks(path.read_text(encoding="utf-8"), page=page_name(path))]
    return [block for block in found if block.language in languages]


def command_lines(block: Block) -> list[tuple[int, str]]:
    """Line number and text of every command of a block of commands."""
    joined = list[tuple[int, str]]()
    pending, start, end = "", block.line, ""
    for number, line in enumerate(block.text.splitlines(), start=block.line):
        if end:
            pending += f"\n{line}"
            if line.strip() != end:
                continue
            end = ""
        elif pending:
            pending = f"{pending} {line.strip()}".strip()
        else:
            pending, start = line.rstrip(), number
        if "\n" not in pending and (mark := re.search(r"<<-?\s*['\"]?(\w+)", pending)):
            end = mark[1]
            continue
        if pending.endswith("\\"):
            pending = pending[:-1].rstrip()
            continue
        joined.append((start, pending))
        pending = ""
    prompted = any(text.startswith("$ ") for _, text in joined)
    if prompted:
        joined = [(line, text.removeprefix("$ ")) for line, text in joined if text.startswith("$ ")]
    return [(line, text.strip()) for line, text in joined if text.strip() and not text.strip().startswith("#")]

"""docs/troubleshooting.md quotes messages of the code; each must still be there, in these words."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.documents.blocks import prose
from tests.helpers.data import REPOSITORY

PAGE = REPOSITORY / "docs" / "troubleshooting.md"
PACKAGES = ("launcher", "merging", "eval", "trainers")
VALUE = "…"
"""Stands for what a message fills in."""
NOT_A_MESSAGE = {"stopped (diverged)": "composed by `unlearn status` of a state and a reason"}

pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="the guides are part of the repository, not of the package")


def texts_of(source: str) -> list[str]:
    """Every text of a module, values of f-strings and of %-formats as one ``…``, texts joined by ``+`` as one."""
    return [text for node in ast.walk(ast.parse(source)) if (text := text_of(node)) is not None and text.strip(VALUE + " ")]


def text_of(node: ast.AST) -> str | None:
    """A text, or None if the node is none."""
    match node:
        case ast.Constant(value=str(value)):
            return re.sub(r"%\w|\{\w*\}", VALUE, value)
        case ast.JoinedStr(values=values):
            return "".join(part.value if isinstance(part, ast.Constant) else VALUE for part in values)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            first, second = text_of(left), text_of(right)
            return None if first is None and second is None else f"{VALUE if first is None else first}{VALUE if second is None else second}"
    return None


@cache
def all_texts() -> tuple[str, ...]:
    files = sorted(file for package in PACKAGES for file in (REPOSITORY / package).rglob("*.py"))
    return tuple(text for file in files for text in texts_of(file.read_text(encoding="utf-8")))


def is_message(quoted: str, *, texts: tuple[str, ...]) -> bool:
    """Whether a text of the code holds the quoted pieces in this order, with a value wherever the quotation has ``…``."""
    pieces = [re.escape(piece.strip(" ")) for piece in quoted.split(VALUE) if piece.strip(" :;,()")]
    pattern = re.compile(rf"\s*.*{VALUE}.*\s*".join(pieces) if len(pieces) > 1 else pieces[0], re.DOTALL)
    return any(pattern.search(text) for text in texts)


def headings(text: str) -> list[str]:
    """The messages that a page has as headings; those of other programs have its name in front and are left out."""
    return re.findall(r"^### `(.+)`$", prose(text), re.MULTILINE)


def test_every_message_is_in_the_code() -> None:
    found = headings(PAGE.read_text(encoding="utf-8"))
    assert len(found) >= 30
    assert [quoted for quoted in found if quoted not in NOT_A_MESSAGE and not is_message(quoted, texts=all_texts())] == []
    assert set(NOT_A_MESSAGE) <= set(found)


def test_each_message_is_explained_once_in_a_few_lines() -> None:
    text = prose(PAGE.read_text(encoding="utf-8"))
    found = headings(text)
    assert len(set(found)) == len(found)
    entries = re.split(r"^#{2,3} .*$", text, flags=re.MULTILINE)[1:]
    assert max(len(entry.split()) for entry in entries) < 150


def test_the_exit_codes_are_those_of_the_code() -> None:
    from trainers.errors import InputError, RunError, SetupError

    rows = dict(re.findall(r"^\| (\d+) \| (.*?) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert set(rows) == {"0", "1", "2", "3", "130"}
    for kind, word in ((RunError, "run"), (InputError, "input"), (SetupError, "machine")):
        assert word in rows[str(kind.exit_code)]


@pytest.mark.parametrize("wrong", ["model folder was not found", "the row has … tokens, but the shortest allowed is …", "unknown kee"])
def test_a_message_that_nobody_writes_is_noticed(wrong: str) -> None:
    assert not is_message(wrong, texts=all_texts())


def test_values_of_messages_are_told_from_their_words(tmp_path: Path) -> None:
    source = 'f"the row has {n} tokens, " + f"at most {m}"\nlog.warning("only %d of them", 3)\nx = "a" if y else f"{z}b c"'
    texts = tuple(texts_of(source))
    for quoted in ("the row has … tokens, at most …", "only … of them", "…b c"):
        assert is_message(quoted, texts=texts), quoted
    for quoted in ("the row has tokens", "only 3 of them", "a b c"):
        assert not is_message(quoted, texts=texts), quoted

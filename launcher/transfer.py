"""In which order files are copied, so that whatever stops the copy, nothing looks finished that is not."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import PurePosixPath

VOUCHING = frozenset({"manifest.json", "target-manifest.json", "merge.json", "eval.json", "validation.json"})
"""Files that say of the folder they lie in that it is finished."""
CLOSING = frozenset({"status.json", "events.jsonl", "results.json"})
"""Files that are read to see how far things are: they go last, but what lies beside them may grow."""
GROWING = (".jsonl", ".log", ".md", ".html", ".csv", ".png", ".svg", ".txt")
"""Logs, and pages for people: no result is read from a part of theirs that a vouching file has not seen."""


@dataclass(frozen=True)
class Transfer:
    """What to do at the destination, in this order.

    Args:
        removed_first: vouching files of folders that change, and what goes from those folders.
        copied: files, those that vouch for others behind them.
        removed_last: what went from folders that stay as they are.
    """

    removed_first: tuple[str, ...]
    copied: tuple[str, ...]
    removed_last: tuple[str, ...]


def plan_transfer(*, changed: Collection[str], gone: Collection[str], present: Collection[str], source: Collection[str]) -> Transfer:
    """The order in which a destination becomes like its source.

    Args:
        changed: files that are new or different, relative paths with ``/``.
        gone: files that the destination is to lose.
        present: files that the destination holds.
        source: files that the source holds.
    """
    units = {_parent(path) for path in {*changed, *present} if _name(path) in VOUCHING}

    def unit(path: str) -> str | None:
        folder = PurePosixPath(path).parent
        while str(folder) not in units:
            if folder == folder.parent:
                return None
            folder = folder.parent
        return str(folder)

    replaced = [path for path in changed if path in present and not path.endswith(GROWING) and _name(path) not in CLOSING]
    broken = {unit(path) for path in [*replaced, *(path for path in gone if _name(path) in VOUCHING)]} - {None}
    vouching = sorted(path for path in present if _name(path) in VOUCHING and _parent(path) in broken)
    going = [path for path in sorted(gone) if path not in vouching]
    first = [*vouching, *(path for path in going if unit(path) in broken)]
    return Transfer(
        removed_first=tuple(first),
        copied=tuple(sorted({*changed, *(path for path in vouching if path in source and path not in gone)}, key=_turn)),
        removed_last=tuple(path for path in going if path not in first),
    )


def _turn(path: str) -> tuple[int, int, str]:
    """Plain files from the top down, then vouching ones from the bottom up, then closing ones from the bottom up."""
    depth = path.count("/")
    if _name(path) in CLOSING:
        return 2, -depth, path
    return (1, -depth, path) if _name(path) in VOUCHING else (0, depth, path)


def _name(path: str) -> str:
    return PurePosixPath(path).name


def _parent(path: str) -> str:
    return str(PurePosixPath(path).parent)

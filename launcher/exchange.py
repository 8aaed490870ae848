"""A folder that is always complete: a new version takes its place in one step."""

from __future__ import annotations

import ctypes
import os
import shutil
import uuid
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
"""Source: https://man7.org/linux/man-pages/man2/rename.2.html"""


def replace_folder(new: Path, place: Path) -> bool:
    """Put ``new`` where ``place`` is, on the same file system; what lay there is removed afterwards.

    Returns:
        Whether it took one step, so that ``place`` was complete at every moment. Where the system cannot exchange two folders, there is a
        moment without ``place``.

    Raises:
        FileNotFoundError: if there is no ``new``; ``place`` stays.
    """
    if not new.is_dir():
        raise FileNotFoundError(f"no folder to put in place: {new}")
    place.parent.mkdir(parents=True, exist_ok=True)
    if not place.exists():
        os.rename(new, place)
        return True
    if _exchange(new, place):
        shutil.rmtree(new)
        return True
    old = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}.old")
    os.rename(place, old)
    os.rename(new, place)
    shutil.rmtree(old)
    return False


def _exchange(one: Path, other: Path) -> bool:
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0

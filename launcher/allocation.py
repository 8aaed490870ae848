"""How this process asks the system for memory."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
"""Numbers of glibc's settings. Source: https://man7.org/linux/man-pages/man3/mallopt.3.html and malloc.h"""


def reuse_freed_memory() -> bool:
    """Keep freed memory for the next tensor instead of giving it back; whether the system's allocator (glibc) could be told.

    By default large tensors are mapped anew, and the kernel fills them with zeros page by page: a merge of two adapters then takes about
    a fifth more processor time (benchmarks/LOG.md).
    For commands that end soon: the process stays as large as it ever was. Call it before threads start.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    largest = (1 << 31) - 1
    return all(mallopt(name, value) == 1 for name, value in ((_ARENA_MAX, 1), (_MMAP_THRESHOLD, largest), (_TRIM_THRESHOLD, largest)))

"""Waiting for a storage that is full, or gone, for a minute."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")
P = ParamSpec("P")

PATIENCE_VARIABLE = "UNLEARN_STORAGE_PATIENCE_S"
PATIENCE_S = 120.0
"""Seconds to wait for a storage that does not answer, where the environment says nothing else."""
FULL_SHARE = 0.25
"""Share of that time to wait for space: a disk that nobody cleans stays full."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 10.0

GONE = frozenset(
    {
        errno.EIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.ENOTCONN,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.EAGAIN,
        errno.EBUSY,
    }
)
"""Errors of a network file system or a disk that may pass."""
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})

_state = threading.local()
_mounts: set[str] = set()
_known_folders: set[str] = set()


def patience_s() -> float:
    """Seconds to wait for a storage that is gone: ``UNLEARN_STORAGE_PATIENCE_S``, or two minutes; 0 never waits."""
    try:
        return max(0.0, float(os.environ[PATIENCE_VARIABLE]))
    except (KeyError, ValueError):
        return PATIENCE_S


def system_error(error: BaseException) -> int | None:
    """The operating system's number of an error; the safetensors library reports it in words only."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found.group(1)) if found else None


def storage_limit_s(error: BaseException) -> float | None:
    """How long to wait for an error of a file system to pass, seconds; None if it will not."""
    number = system_error(error)
    if number in GONE:
        return patience_s()
    return patience_s() * FULL_SHARE if number in FULL else None


def patiently(action: Callable[[], T], *, place: Path | str, limit_s: Callable[[BaseException], float | None] = storage_limit_s) -> T:
    """Call an action until no passing error of the storage stops it, for as long as there is patience; its value.

    Within another patient action nothing waits: the outer one begins again as a whole.

    Args:
        action: leaves nothing half-done when it fails.
        place: named in the warning.
        limit_s: how long an error may last, seconds; None: it does not pass.

    Raises:
        Exception: what the last attempt raised.
    """
    if getattr(_state, "waits", False):
        return action()
    started, pause = time.monotonic(), FIRST_PAUSE_S
    warned = False
    while True:
        try:
            with _waiting():
                return action()
        except Exception as error:
            limit = limit_s(error)
            left = (limit or 0.0) - (time.monotonic() - started)
            if limit is None or left <= 0:
                raise
            if not warned:
                log.warning("%s cannot be written to (%s): trying again for up to %g s", place, _words(error), limit)
                warned = True
            time.sleep(min(pause, left))
            pause = min(pause * 2, LONGEST_PAUSE_S)


def patient(function: Callable[P, T]) -> Callable[P, T]:
    """A function, whose first argument is where it writes, that begins again after a passing error of the storage."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        return patiently(lambda: function(*args, **kwargs), place=str(args[0]))

    return called


def check_mounted(folder: Path) -> None:
    """Notice that a file system which this process has written to is not mounted any more: what follows would fill the disk below it.

    Raises:
        OSError: ENOTCONN, with the mount point.
    """
    text = os.path.abspath(folder)
    for mount in _mounts:
        if (text == mount or text.startswith(mount + os.sep)) and not os.path.ismount(mount):
            raise OSError(errno.ENOTCONN, "the file system is not mounted any more", mount)
    if text not in _known_folders:
        _known_folders.add(text)
        place = os.path.realpath(text)
        while not os.path.ismount(place):
            place = os.path.dirname(place)
        if place != os.sep:
            _mounts.add(place)


@contextlib.contextmanager
def _waiting() -> Iterator[None]:
    _state.waits = True
    try:
        yield
    finally:
        _state.waits = False


def _words(error: BaseException) -> str:
    return (
        os.strerror(error.errno) if isinstance(error, OSError) and error.errno else (str(error).splitlines() or [type(error).__name__])[0]
    )

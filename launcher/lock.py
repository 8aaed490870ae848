"""One process at a time: a lock that the operating system lets go when its holder dies, however it dies."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainers.errors import RunError

log = logging.getLogger(__name__)
POLL_S = 0.2


@contextmanager
def hold(path: Path, *, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lock file within the block; another holder is waited for.

    On a file system without locks the block runs unprotected.

    Args:
        path: made if it does not exist, and left behind empty.
        wait_s: seconds to wait for another holder.

    Raises:
        RunError: if another process still holds it then.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait_s
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise RunError("another process is working here", where=str(path.parent), fix="wait for it, or end it") from None
                time.sleep(POLL_S)
            except OSError as error:
                log.warning("%s cannot be locked (%s): nothing keeps a second process from writing here", path, error)
                break
        yield
    finally:
        os.close(descriptor)

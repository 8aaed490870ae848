"""Requests to stop, carried between the machines of a run that lives at a URI: elsewhere all of them see the same file."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from launcher.faults import STOP
from launcher.storage import RunStorage, StorageUnreachable, storage_of
from trainers.errors import SetupError

log = logging.getLogger(__name__)
LOOK_EVERY_S = 5.0
"""Seconds until another machine sees a request; a look asks the home once."""


@contextlib.contextmanager
def signs_sent(run: Path | str) -> Iterator[None]:
    """Within the block, bring home what the run, or one of its trials, is asked here, and take back there what is taken back here."""
    storage, folder = storage_of(run), Path(run)

    def places() -> list[str]:
        return [STOP, *(f"trials/{entry.name}/{STOP}" for entry in sorted((folder / "trials").glob("*")))]

    def send() -> None:
        assert isinstance(storage, RunStorage)
        storage.send_signs(places())

    with _again_and_again(storage, send):
        yield


@contextlib.contextmanager
def signs_read(run: Path | str, *, trial: str) -> Iterator[None]:
    """Within the block, see here what the run or this trial is asked elsewhere."""
    storage = storage_of(run)

    def read() -> None:
        assert isinstance(storage, RunStorage)
        storage.read_signs((STOP, f"trials/{trial}/{STOP}"))

    with _again_and_again(storage, read):
        yield


@contextlib.contextmanager
def _again_and_again(storage: object, action: Callable[[], None]) -> Iterator[None]:
    if not isinstance(storage, RunStorage):
        yield
        return
    over = threading.Event()

    def act() -> None:
        # A sign is late by one look at worst; what the home does not answer now, it may answer then.
        try:
            action()
        except (StorageUnreachable, SetupError) as error:
            log.warning("requests to stop are not seen: %s", error)

    def run() -> None:
        while not over.wait(LOOK_EVERY_S):
            act()

    act()
    thread = threading.Thread(target=run, daemon=True, name="stop signs")
    thread.start()
    try:
        yield
    finally:
        over.set()

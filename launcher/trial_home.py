"""A trial away from its run's home: what it fetches before it starts, and brings back; nothing of it where the run is a shared folder."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.storage import OWN, RESUME_ONLY, TRIAL_INPUTS, OwnHome, StorageUnreachable, run_address, run_folder, storage_of
from launcher.trial import TrialTask

log = logging.getLogger(__name__)


def departing(task: TrialTask) -> TrialTask:
    """The task as other machines understand it: its run is named by its home."""
    return replace(task, run=run_address(Path(task.run)))


def arrived(task: TrialTask) -> TrialTask:
    """The task on this machine, with all that it reads: its run is a folder again.

    Every rank of a trial must go on from the same checkpoint, so none stays here that its home does not hold.
    """
    storage = storage_of(task.run)
    trial = f"trials/{task.name}"
    storage.pull(*TRIAL_INPUTS, trial, exact=(f"{trial}/checkpoints",))
    return replace(task, run=str(run_folder(task.run)))


def carried(task: TrialTask, steps: Iterator[dict[str, Any]], *, leads: bool = True) -> Iterator[dict[str, Any]]:
    """The same metrics; each new checkpoint is brought home as soon as it is there, and the rest at the end, however it comes.

    Args:
        task: the trial.
        steps: its metrics.
        leads: whether this rank writes the trial's files; others have a log only.
    """
    # A rank must have seen its GPUs before torch is imported, which checkpoints need.
    from trainers.checkpoint import finished_checkpoints

    storage = storage_of(task.run)
    if isinstance(storage, OwnHome):
        yield from steps
        return
    trial = f"trials/{task.name}"
    brought = finished_checkpoints(task.folder)
    try:
        for metrics in steps:
            if leads and (found := finished_checkpoints(task.folder)) != brought:
                storage.push(trial)
                brought = found
            yield metrics
    finally:
        _bring(task.run, trial if leads else f"{trial}/logs", quietly=sys.exc_info()[0] is not None)


def fetch_trial(run: Path | str, name: str) -> None:
    """See what another machine has written of a trial, but for what only its training reads.

    Raises:
        StorageUnreachable: if the home does not answer.
    """
    storage_of(run).pull(f"trials/{name}", skip=RESUME_ONLY)


def bring_trial(run: Path | str, name: str) -> None:
    """Let other machines see what was written of a trial here.

    Raises:
        StorageUnreachable: if the home does not answer.
    """
    _bring(run, f"trials/{name}", quietly=False)


def bring_events(run: Path | str) -> None:
    """Bring the run's own files home while trials run; one that cannot be brought now goes with the next."""
    _bring(run, OWN, quietly=True)


def _bring(run: Path | str, path: str, *, quietly: bool) -> None:
    try:
        storage_of(run).push(path)
    except StorageUnreachable as error:
        if not quietly:
            raise
        log.warning("%s: %s", error.filename, error.strerror)

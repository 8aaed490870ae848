"""The files of tracking under ``RUN/tracking``: settings, what was written so far, and the folders of the trackers.

``settings.json`` is written by the sweep for the process that follows it. ``state.json`` is written by that process::

    {"schema_version": 1, "kept": {"wandb": {"trial-00": {"last_step": 90, "facts": "5e88..."}}, "tensorboard": {...}}}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.tracking.config import TrackingConfig
from launcher.tracking.mode import Mode
from trainers.errors import InputError
from trainers.files import read_json, sha256_json, write_json


@dataclass(frozen=True)
class Written:
    """How much of one run a tracker holds.

    Args:
        last_step: the newest optimizer step whose row was written; -1 if none.
        facts: hash of the final facts that were written; empty if none.
    """

    last_step: int = -1
    facts: str = ""


@dataclass(frozen=True)
class TrackingFiles:
    """Where tracking keeps what of a run."""

    run: Path

    @property
    def folder(self) -> Path:
        """Everything below lies in it."""
        return self.run / "tracking"

    @property
    def lock(self) -> Path:
        """Held by the one process that follows the run."""
        return self.folder / ".lock"

    @property
    def log(self) -> Path:
        """What the following process had to say."""
        return self.folder / "follow.log"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's log folders, one for each trial and one for the run."""
        return self.folder / "tensorboard"

    def write_settings(self, tracking: TrackingConfig, *, mode: Mode) -> None:
        """Tell the following process what to write."""
        write_json(self.folder / "settings.json", {"schema_version": 1, "mode": mode, "tracking": tracking.model_dump(mode="json")})

    def read_settings(self) -> tuple[TrackingConfig, Mode] | None:
        """What the sweep wanted to be written, or None if it was never tracked."""
        path = self.folder / "settings.json"
        if not path.exists():
            return None
        settings = read_json(path)
        return TrackingConfig.model_validate(settings["tracking"]), settings["mode"]

    def read_kept(self) -> dict[str, dict[str, Written]]:
        """What each tracker holds of each run, by name of tracker and run; empty where nothing is known."""
        try:
            state = read_json(self.folder / "state.json")
            return {tracker: {name: Written(**one) for name, one in runs.items()} for tracker, runs in state["kept"].items()}
        except (InputError, TypeError, KeyError, AttributeError):
            return {}

    def write_kept(self, kept: Mapping[str, Mapping[str, Written]]) -> None:
        """Remember what each tracker holds."""
        values = {tracker: {name: asdict(one) for name, one in runs.items()} for tracker, runs in kept.items()}
        write_json(self.folder / "state.json", {"schema_version": 1, "kept": values})

    def offline_folders(self) -> list[Path]:
        """Offline W&B runs that were not uploaded yet, oldest first. ``wandb sync`` leaves a ``.synced`` file beside what it uploaded."""
        return [path.parent for path in self._logs() if not path.with_name(path.name + ".synced").exists()]

    def offline_logs(self, run_id: str) -> list[Path]:
        """The transaction logs of one offline W&B run, oldest first: one for each time that it was opened."""
        return [path for path in self._logs() if path.name == f"run-{run_id}.wandb"]

    def _logs(self) -> Iterator[Path]:
        yield from sorted(self.folder.glob("wandb/offline-run-*/run-*.wandb"))


def run_identity(run: Path) -> str | None:
    """What tells this run folder from any other, wherever it lies: a hash of its first event. None before the first event.

    Resuming appends to the events, and moving or renaming the folder takes them along.
    """
    from launcher.events import EventLog

    events = EventLog(run).events()
    return sha256_json(events[0]) if events else None


def run_id(identity: str, name: str) -> str:
    """The stable id of one run of a sweep, 16 hex digits."""
    return sha256_json([identity, name])[:16]

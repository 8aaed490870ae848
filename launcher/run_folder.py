"""The folder of a run: where it may lie, whose it is, and the log of its stages."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launcher.config import RUN_NAME, ExperimentConfig
from launcher.console import Console
from launcher.data import PreparedData
from launcher.events import EventLog
from launcher.load import dump_yaml
from launcher.plugins import keep_plugins, kept_names, plugin_hashes
from launcher.search_space import SearchSpace
from launcher.storage import RESUME_ONLY, RunStorage, attach, storage_of, telling
from trainers.checkpoint import changed_keys
from trainers.errors import InputError
from trainers.files import check_writable, read_json, write_json, write_text
from trainers.memorize import MANIFEST as TARGET_MANIFEST

EXPERIMENT = "experiment.yaml"
RESOLVED = "experiment.json"
BEFORE_A_RUN = ("data", "events.jsonl", "target", "target.json")
"""What may lie in a run folder before its sweep: the quickstart's documents, and what ``unlearn memorize`` writes."""


class Run:
    """A run folder with its console and its event log."""

    def __init__(self, folder: Path, *, console: Console | None = None) -> None:
        self.folder = Path(folder)
        self.console = console or Console()
        self.events = EventLog(self.folder)
        self.storage = storage_of(self.folder)

    @contextmanager
    def kept_home(self) -> Iterator[None]:
        """Bring everything to the run's home at the end of the block, however it ends.

        Raises:
            SetupError: if the home does not answer.
        """
        with telling():
            try:
                yield
            finally:
                self.storage.push()
        if isinstance(self.storage, RunStorage):
            self.console.line(f"home     {self.storage.uri}")

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[None]:
        """Record a stage's start and end, print its heading and time, and bring to the run's home what it made."""
        self.console.stage(title)
        self.events.started(name)
        started = time.time()
        yield
        self.events.finish(name, seconds=round(time.time() - started, 2))
        self.storage.push()

    def timings(self) -> dict[str, float]:
        """Seconds spent per stage, over all starts of the run."""
        total: dict[str, float] = {}
        for event in self.events.events():
            if event["kind"] == "stage_finished":
                total[event["stage"]] = round(total.get(event["stage"], 0.0) + float(event.get("seconds") or 0.0), 2)
        return total


def open_run(config: ExperimentConfig) -> Run:
    """The run of an experiment, with what its home holds already; a trial's optimizer state is left there for the trial to fetch.

    Raises:
        SetupError: if the home cannot be reached.
    """
    if config.run_uri is not None:
        with telling():
            attach(config.run_uri).pull(skip=RESUME_ONLY)
    return Run(config.run_folder)


def run_place(out: Path) -> tuple[str, str]:
    """The storage path and the name of a run that is to be written to ``out``.

    Raises:
        InputError: if ``out`` cannot be the folder of a run.
    """
    given, out = out, Path(out).expanduser()
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(out)):
        raise InputError("not a folder of this machine", where=f"--out {given}", fix="name a local folder, or one of a mounted file system")
    if out.name in ("", ".."):
        out = out.resolve()
    if not re.fullmatch(RUN_NAME, out.name):
        better = re.sub(r"[^A-Za-z0-9._-]+", "-", out.name).strip("._-")[:100] or "run"
        raise InputError(
            f"{out.name!r} cannot be the name of a run folder",
            where=f"--out {given}",
            why="a name has letters, digits and . _ - only, begins with a letter or digit, and has at most 100 characters",
            fix=f"for instance --out {out.parent / better}",
        )
    return str(out.parent), out.name


def check_run_place(folder: Path) -> None:
    """Refuse a run folder that cannot be written, or that holds something else than a run.

    Raises:
        InputError: naming the folder and what is in it.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError("the run folder is a file", where=str(folder), fix="choose another name, or move the file away")
    check_writable(folder)
    if not folder.is_dir() or (folder / RESOLVED).exists():
        return
    found = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    foreign = [name for name in found if name not in BEFORE_A_RUN]
    target = folder / "target"
    if target.exists() and not (target / TARGET_MANIFEST).exists():
        foreign.append(target.name)
    if foreign:
        raise InputError(
            "the folder holds something that is not a run",
            where=str(folder),
            why=f"found: {', '.join(foreign[:6])}" + (f" and {len(foreign) - 6} more" if len(foreign) > 6 else ""),
            fix="choose an empty or a new folder",
        )


def claim_run(config: ExperimentConfig, *, space: SearchSpace, data: PreparedData, resume: bool) -> Run:
    """The run folder of an experiment: a new one, or the same experiment's again.

    Raises:
        InputError: if the folder belongs to a different experiment, cannot be written, or resuming was refused.
    """
    run = open_run(config)
    check_run_place(run.folder)
    facts = {name: domain.spec() for name, domain in space.domains.items()}
    kept = config.model_copy(update={"plugins": tuple(kept_names(config.plugins))})
    resolved = {"config": kept.model_dump(mode="json"), "space": facts, "data_hash": data.hash}
    if config.plugins:
        resolved["plugins"] = plugin_hashes(config.plugins)
    path = run.folder / RESOLVED
    if path.exists():
        if not resume:
            raise InputError("the run folder is already in use", where=str(run.folder), fix="choose another name, or leave out --no-resume")
        _check_same(run.folder, changed=changed_keys(_without_place(_read_resolved(path)), _without_place(resolved)))
    else:
        write_json(path, resolved)
    keep_plugins(run.folder, files=config.plugins)
    # The record comes first: a start that was killed between the two has left no sign that the folder is a run's, otherwise.
    if not (run.folder / EXPERIMENT).exists():
        write_text(run.folder / EXPERIMENT, dump_yaml(kept, space=space))
    return run


def check_same_target(folder: Path, *, config: ExperimentConfig, data: PreparedData) -> None:
    """Refuse to build another target in a run folder: trials may have started from the one that lies there.

    Raises:
        InputError: naming the settings that differ.
    """
    if not (folder / RESOLVED).exists():
        return
    known = _without_place(_read_resolved(folder / RESOLVED))
    wanted = _without_place({"config": config.model_dump(mode="json"), "data_hash": data.hash})
    parts = ("seed", "data", "target")
    facts = [
        {"data_hash": facts.get("data_hash"), "config": {part: facts["config"].get(part) for part in parts}} for facts in (known, wanted)
    ]
    _check_same(folder, changed=changed_keys(*facts))


def _check_same(folder: Path, *, changed: list[str]) -> None:
    if not changed:
        return
    known = {"data_hash": "the data (rows, or the folds they lie in)"}
    # The search space is kept apart, but in the file its settings stand under `train`.
    names = [known.get(key, re.sub("^space", "train", key.removeprefix("config."))) for key in changed]
    shown = list(dict.fromkeys(names))
    more = f" and {len(shown) - 8} more" if len(shown) > 8 else ""
    raise InputError(
        f"the run folder belongs to another configuration; changed: {', '.join(shown[:8])}{more}",
        where=str(folder),
        why="what it holds already would not fit",
        fix="undo the change, or choose another name (name: in the file, --out for quickstart and train)",
    )


def _read_resolved(path: Path) -> dict[str, Any]:
    resolved = read_json(path)
    config = resolved.get("config") if isinstance(resolved, dict) else None
    if not isinstance(config, dict) or not isinstance(config.get("sweep"), dict):
        raise InputError("the record of the run's configuration is damaged", where=str(path), fix="choose another run folder")
    return resolved


def _without_place(resolved: dict[str, Any]) -> dict[str, Any]:
    """Where a run and its data lie, and how much of a machine it may use, does not change what it computes; nor does what its card says.

    An audit has a key of its own. What data and plugins say has hashes of its own, and the target's weights have one in ``target.json``.
    """
    free = {
        "sweep": (
            "budget",
            "cpus_per_rank",
            "gpus_per_rank",
            "max_concurrent",
            "max_failures",
            "max_preemptions",
            "trial_timeout_s",
            "stall_s",
        ),
        "data": ("path", "forget", "retain", "mia", "mmlu", "license"),
        "model": ("model_name_or_path", "base_model", "license"),
    }
    config = {
        key: value for key, value in resolved["config"].items() if key not in ("storage_path", "name", "tracking", "audit", "plugins")
    }
    for section, keys in free.items():
        config[section] = {key: value for key, value in (config.get(section) or {}).items() if key not in keys}
    return resolved | {"config": config}

"""Weights & Biases: one W&B run per tracked run, in one process, online or into files."""

from __future__ import annotations

import logging
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.tracking.config import TrackingConfig
from launcher.tracking.content import Description, Facts
from launcher.tracking.files import TrackingFiles, Written, run_id
from launcher.tracking.mode import Mode
from launcher.tracking.wandb_log import FACTS, written_in

log = logging.getLogger(__name__)

PROJECT = "unlearning"
ANSWER_S = 10.0
"""Seconds for the server's first answer; without one everything is written offline."""
INIT_TIMEOUT_S = 30.0
"""Seconds for opening a run; then tracking is given up until the next start. WANDB_INIT_TIMEOUT replaces it."""
FLUSH_S = 2.0
"""Seconds between two writes of the transaction log; what a kill loses is written again from the run folder."""


class WandbTracker:
    """Opens W&B runs: online if that is wanted and the server answers at the start, else into files.

    A run folder with offline files that were not uploaded stays offline, because W&B takes the rows of a run in order only.
    """

    name = "wandb"

    def __init__(self, files: TrackingFiles, *, tracking: TrackingConfig, mode: Mode, identity: str) -> None:
        self.files, self.tracking, self.identity = files, tracking, identity
        # Files of an artifact wait for their upload here; they must not be lost with the home folder of a machine.
        os.environ["WANDB_DATA_DIR"] = str((files.folder / "wandb-data").resolve())
        os.environ["WANDB_CACHE_DIR"] = str((files.folder / "wandb-cache").resolve())
        os.environ["WANDB_SILENT"] = "true"
        for folder in ("wandb-data", "wandb-cache"):
            (files.folder / folder).mkdir(parents=True, exist_ok=True)
        self.online = mode == "online" and not files.offline_folders() and server_answers()

    def open(self, run: Description, *, kept: Written) -> WandbRun:
        import wandb

        identifier = run_id(self.identity, run.name)
        logs = self.files.offline_logs(identifier)
        opened = wandb.init(
            dir=str(self.files.folder),
            mode="online" if self.online else "offline",
            project=self.tracking.project or os.environ.get("WANDB_PROJECT") or PROJECT,
            entity=self.tracking.entity,
            id=identifier,
            resume="allow",
            reinit="create_new",
            group=run.group,
            job_type=run.job_type,
            name=run.title,
            tags=run.tags,
            config=run.config,
            settings=_settings(),
        )
        opened.define_metric("*", step_metric="step")
        if self.online and opened.resumed:
            kept = Written(last_step=opened.starting_step - 1, facts=str(opened.summary.get(FACTS) or ""))
        elif not self.online and logs:
            kept = written_in(logs)
        return WandbRun(opened, written=kept)


class WandbRun:
    """One open W&B run."""

    def __init__(self, run: Any, *, written: Written) -> None:
        self._run, self.written = run, written
        self._last_step = written.last_step

    def log(self, rows: Sequence[Mapping[str, float | int]]) -> None:
        for row in rows:
            self._last_step = int(row["step"])
            self._run.log(dict(row), step=self._last_step, commit=True)

    def close(self, facts: Facts | None) -> None:
        if facts is not None and facts.hash != self.written.facts:
            self._log_media(facts)
            self._run.summary.update({**facts.summary, FACTS: facts.hash})
        self._run.finish(exit_code=0 if facts is not None and facts.succeeded else 1)

    def _log_media(self, facts: Facts) -> None:
        import wandb

        media: dict[str, Any] = {
            name: wandb.Table(columns=list(table.columns), data=[list(row) for row in table.rows]) for name, table in facts.tables.items()
        }
        media |= {name: wandb.Image(str(path)) for name, path in facts.images.items()}
        if facts.page is not None:
            media["report"] = wandb.Html(facts.page.read_text(encoding="utf-8"), inject=False)
        if media:
            step = self._last_step + 1
            self._run.log({**media, "step": step}, step=step, commit=True)
        for path in facts.files:
            copy = Path(self._run.dir) / path.name
            shutil.copyfile(path, copy)
            self._run.save(str(copy), base_path=self._run.dir, policy="now")


def server_answers() -> bool:
    """Whether the W&B server can be reached from here; any answer counts, also through a proxy."""
    import wandb

    url = str(wandb.setup().settings.base_url)
    try:
        urllib.request.urlopen(url, timeout=ANSWER_S).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError) as error:
        log.warning("%s cannot be reached, going on offline: %s", url, error)
        return False
    return True


def _settings() -> Any:
    """No look at the machine, its processes, its git repository or its output: provenance is in the run folder already."""
    import wandb

    wanted = {
        "console": "off",
        "silent": True,
        "init_timeout": float(os.environ.get("WANDB_INIT_TIMEOUT") or INIT_TIMEOUT_S),
        "save_code": False,
        "disable_git": True,
        "x_disable_stats": True,
        "x_disable_meta": True,
        "x_disable_machine_info": True,
        "x_save_requirements": False,
        "x_transaction_log_flush_interval": FLUSH_S,
    }
    # Settings that begin with x_ are not the same in all versions.
    return wandb.Settings(**{name: value for name, value in wanted.items() if name in wandb.Settings.model_fields})

"""``unlearn sync``: upload what a run has written to Weights & Biases offline."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from launcher.lock import hold
from launcher.masking import hide_secrets, secrets_of
from launcher.report_data import require_run_folder
from launcher.tracking.files import TrackingFiles
from launcher.tracking.mode import has_wandb_key
from launcher.tracking.process import catch_up
from trainers.errors import RunError, SetupError

AT_ONCE = 8
"""Runs uploaded at the same time."""
CATCH_UP_S = 300.0
"""Seconds for writing what an earlier process, killed before its end, has left unwritten."""


def sync_run(run: Path, *, environment: Mapping[str, str]) -> str:
    """Upload the offline W&B runs of a run folder; what was done, in one sentence.

    Args:
        run: the run folder.
        environment: where the key is looked for.

    Raises:
        InputError: if ``run`` is not a run folder.
        SetupError: if there is something to upload, but no key.
        RunError: if the sweep is running, or the upload fails.
    """
    files = TrackingFiles(require_run_folder(run))
    settings = files.read_settings()
    if settings is None or settings[1] == "off":
        return f"nothing to sync: {run} was not tracked with Weights & Biases (tracking.wandb)"
    with hold(files.lock):
        pass
    if not catch_up(files, limit_s=CATCH_UP_S):
        raise RunError("the run folder could not be read into W&B's files", where=str(files.log), fix="see the log; then sync again")
    folders = files.offline_folders()
    if not folders:
        return f"nothing to sync: all that {run} has written is uploaded"
    if not has_wandb_key(environment):
        raise SetupError(
            f"{len(folders)} offline runs, and no Weights & Biases key on this machine",
            where=str(files.folder / "wandb"),
            fix=f"set WANDB_API_KEY in the environment or run `wandb login`, then `unlearn sync {run}` again",
        )
    _upload(folders, environment=environment)
    left = len(files.offline_folders())
    return f"uploaded {len(folders) - left} offline runs of {run}" + (f"; {left} are left" if left else "")


def _upload(folders: list[Path], *, environment: Mapping[str, str]) -> None:
    # The one beside this interpreter, unless the path names another: an activated environment is not needed.
    places = os.pathsep.join([environment.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    command = shutil.which("wandb", path=places)
    if command is None:
        raise SetupError("the wandb command is not installed", fix="pip install wandb")
    call = [command, "sync", "--yes", "-n", str(AT_ONCE), *map(str, folders)]
    result = subprocess.run(call, env=dict(environment), stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if result.returncode != 0:
        lines = [line for line in (result.stdout + result.stderr).splitlines() if line.strip()]
        raise RunError(
            f"wandb sync ended with exit code {result.returncode}",
            why=hide_secrets("\n".join(lines[-3:]), secrets=secrets_of(environment)) or None,
            fix="check the network and the key, then sync again; nothing is lost",
        )

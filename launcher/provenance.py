"""What a run was made with: enough to make it again."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from launcher.masking import hide_secrets, secrets_of
from launcher.problems import mask
from trainers.files import read_json, write_json

PACKAGES = ("unlearn-ties", "torch", "deepspeed", "transformers", "peft", "ray", "datasets", "accelerate", "rouge-score", "scikit-learn",
            "numpy", "tokenizers", "safetensors")  # fmt: skip
FILE = "provenance.json"


def versions() -> dict[str, str | None]:
    """Installed versions of the packages that numbers depend on."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def git_state() -> dict[str, Any] | None:
    """Commit of this code and whether it was changed since; None outside a checkout."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def record_provenance(run: Path, *, seed: int, hashes: dict[str, Any]) -> None:
    """Write ``provenance.json``; a resumed run adds its start to the list and keeps the rest."""
    path = Path(run) / FILE
    # A key on the command line is refused where it is a setting; it may still stand in a path.
    command = [mask(hide_secrets(word, secrets=secrets_of(os.environ))) for word in [Path(sys.argv[0]).name, *sys.argv[1:]]]
    start = {"command": command, "folder": os.getcwd(), "versions": versions(), "git": git_state()}
    if path.exists():
        known = read_json(path)
        known["starts"] = [*known.get("starts", []), start]
        write_json(path, known)
        return
    machine = {"platform": platform.platform(), "cores": os.cpu_count(), "gpus": gpu_names()}
    write_json(path, {"schema_version": 1, **start, "machine": machine, "seeds": {"experiment": seed}, "hashes": hashes, "starts": [start]})


def gpu_names() -> list[str]:
    """Names of the GPUs that torch sees here."""
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]

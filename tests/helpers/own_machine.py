"""A command that believes itself alone on a machine: own process ids, own network with nothing but loopback.

What it starts ends with it, its ports are free, and a `ray stop` in it reaches no other Ray. Needs unprivileged user namespaces of Linux.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

_UNSHARE = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc", "--net")
_BEGIN = 'ip link set lo up && exec "$@"'


def inside(command: Sequence[str | Path]) -> list[str]:
    """The command line that runs a command on its own machine."""
    return [*_UNSHARE, "bash", "-c", _BEGIN, "bash", *map(str, command)]


@cache
def can_isolate() -> bool:
    """Whether this system lets us."""
    if not shutil.which("unshare") or not shutil.which("ip"):
        return False
    return subprocess.run(inside(["true"]), capture_output=True).returncode == 0


def write_program(file: Path, text: str) -> Path:
    """A shell script that stands in for a program."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/bash\n{text}")
    file.chmod(0o755)
    return file


def run_inside(command: Sequence[str | Path], *, folder: Path, environment: Mapping[str, str], limit_s: float) -> tuple[int, str]:
    """Exit code and output of a command on its own machine."""
    with open(folder / "output.txt", "w") as output:
        done = subprocess.run(inside(command), cwd=folder, env=dict(environment), stdout=output, stderr=subprocess.STDOUT, timeout=limit_s)
    return done.returncode, (folder / "output.txt").read_text(errors="replace")

"""Run `unlearn` on the head of a Ray cluster: the one file that `ray submit CLUSTER.yaml launcher/submit.py -- ARGUMENTS` needs there.

`ray submit` copies this file alone into the head's home folder and runs it with the first `python` of a login shell, so it takes
everything from the installed package. `python submit.py sweep ...`, `ray job submit -- unlearn sweep ...` and `unlearn sweep ...` are the
same call; only this one looks for the cluster by itself, because a login shell knows no RAY_ADDRESS.
https://docs.ray.io/en/latest/cluster/cli.html#ray-submit
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import MutableMapping, Sequence
from pathlib import Path

CONNECT_S = 5.0
"""Seconds that the cluster's head has to accept a connection."""


def main(arguments: Sequence[str]) -> None:
    """Run one command of `unlearn` on the cluster of this machine, and exit with its code; 3 if the package is not installed here."""
    try:
        from launcher import cli
    except ImportError as error:
        print(not_installed(error), file=sys.stderr)
        sys.exit(3)
    use_cluster(os.environ)
    cli.main(arguments)


def use_cluster(environment: MutableMapping[str, str]) -> None:
    """Point RAY_ADDRESS at the cluster of which this machine is a node, if there is one and nothing else is asked for."""
    if not environment.get("RAY_ADDRESS") and cluster_answers(environment):
        environment["RAY_ADDRESS"] = "auto"


def cluster_answers(environment: MutableMapping[str, str]) -> bool:
    """Whether `ray start` has left an address on this machine under which something listens."""
    # The same file that `auto` is resolved with; a machine that was switched off leaves it behind.
    file = Path(environment.get("RAY_TMPDIR") or "/tmp") / "ray" / "ray_current_cluster"
    try:
        host, _, port = file.read_text(encoding="utf-8").strip().rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except (OSError, ValueError):
        return False
    return True


def not_installed(error: ImportError) -> str:
    """The message for a head whose Python lacks the package, or a part of it."""
    absent = (error.name or "").split(".")[0] == "launcher"
    what = "unlearn-ties is not installed on this machine" if absent else f"unlearn-ties cannot be imported on this machine: {error}"
    return (
        f"environment error: {what}\n"
        f"  where: {sys.executable}, the first `python` of a login shell\n"
        "  fix: install it under setup_commands of the cluster file, into the environment whose bin folder the login shell has first on "
        "PATH (docs/cluster.md), then `ray up` again"
    )


def leave_own_folder(path: list[str], *, file: str) -> None:
    """Take this file's folder off the module path: in a home folder anything may lie under the name of a library."""
    own = os.path.dirname(os.path.realpath(file))
    path[:] = [entry for entry in path if os.path.realpath(entry or os.curdir) != own]


if __name__ == "__main__":
    leave_own_folder(sys.path, file=__file__)
    main(sys.argv[1:])

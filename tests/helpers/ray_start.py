"""A Ray cluster of two nodes as `ray start` makes it, with token and dashboard, which only those in its environment know of."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.helpers.own_machine import write_program

LIMIT_S = 240.0


@dataclass(frozen=True)
class StartedRay:
    """The cluster's address, its dashboard's, and the environment in which commands reach it."""

    address: str
    dashboard: str
    environment: dict[str, str]
    tag: str

    def processes(self) -> list[psutil.Process]:
        """Every living process that came of the cluster or of a command in its environment."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("UNLEARN_TEST_TAG") == self.tag and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def working(self) -> list[str]:
        """Command lines of the processes that compute for somebody: workers with a task or an actor, and drivers."""
        lines = []
        for process in self.processes():
            with suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if (line.startswith("ray::") and not line.startswith("ray::IDLE")) or " -m launcher " in line:
                    lines.append(line)
        return lines

    def run(self, *command: str | Path, folder: Path, limit_s: float = LIMIT_S) -> tuple[int, str]:
        """Exit code and output of a command in this environment."""
        done = subprocess.run(
            list(map(str, command)), cwd=folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=limit_s,
        )  # fmt: skip
        return done.returncode, done.stdout


@contextmanager
def started_ray(folder: Path, *, worker_cpus: int) -> Iterator[StartedRay]:
    """A head without cores and a worker node; everything that they start ends with the block.

    Args:
        folder: home of the cluster's user; holds the token, and a `bin` with this environment's `unlearn`.
        worker_cpus: cores of the second node, on which all trials run therefore.
    """
    temporary = Path(tempfile.mkdtemp(prefix="u"))
    tag = uuid.uuid4().hex
    write_program(folder / "bin" / "unlearn", f'exec "{sys.executable}" -m launcher "$@"\n')
    environment = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "RAY_ADDRESS")} | {
        "HOME": str(folder),
        "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "UNLEARN_TEST_TAG": tag,
        "PYTHONUNBUFFERED": "1",
    }
    head, dashboard, client, *agents = _free_ports(5)
    ray = StartedRay(f"127.0.0.1:{head}", f"http://127.0.0.1:{dashboard}", environment, tag)
    start = ("ray", "start", "--disable-usage-stats", "--node-ip-address=127.0.0.1")
    try:
        for command in (
            ("ray", "get-auth-token", "--generate"),
            (*start, "--head", f"--port={head}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agents[0]}",
             f"--temp-dir={temporary}/head", "--num-cpus=0", f"--ray-client-server-port={client}"),
            # A temporary folder of its own: on one machine both would unpack, and clear away, the same copy of a job's working folder.
            (*start, f"--address={ray.address}", f"--num-cpus={worker_cpus}", f"--dashboard-agent-listen-port={agents[1]}",
             f"--temp-dir={temporary}/worker"),
        ):  # fmt: skip
            code, output = ray.run(*command, folder=folder)
            assert code == 0, output
        yield ray
    finally:
        for process in ray.processes():
            with suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        shutil.rmtree(temporary, ignore_errors=True)


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()

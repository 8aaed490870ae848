"""What a machine says of itself: versions, GPUs and who holds their memory, disk, network. Asked of every node of a cluster."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.gpus import Gpu, GpuProcess, foreign_processes, list_gpus

PACKAGES = ("torch", "deepspeed", "ray", "transformers", "peft")
"""Packages whose numbers end up in results, or whose processes talk to each other."""
OURS = ("launcher", "merging", "eval", "trainers")


@dataclass(frozen=True)
class NodeFacts:
    """One machine.

    Args:
        versions: of Python, our packages and those in ``PACKAGES``; None where one is not installed.
        gpus: as nvidia-smi lists them, whatever this process may see.
        processes: those that hold GPU memory, this process and its relatives excepted.
        free_bytes: of the disk that Ray's session lies on.
        interface: network interface that has the machine's address in the cluster.
        loopback: whether the machine's own name stands for 127.0.0.1, which other machines cannot reach.
    """

    versions: Mapping[str, str | None]
    gpus: tuple[Gpu, ...]
    processes: tuple[GpuProcess, ...]
    free_bytes: int
    interface: str | None
    loopback: bool


def node_facts() -> NodeFacts:
    """The facts of this machine. Imports torch, so that a broken installation is an error here."""
    gpus = list_gpus()
    temporary = Path(os.environ.get("RAY_TMPDIR") or "/tmp")
    return NodeFacts(
        versions=versions(),
        gpus=gpus,
        processes=foreign_processes(gpus),
        free_bytes=shutil.disk_usage(temporary).free,
        interface=_interface(),
        loopback=_own_address().startswith("127."),
    )


def versions() -> dict[str, str | None]:
    """Versions on this machine. Ours come with a hash of the source, because a checkout changes under the same number."""
    import torch

    return {
        "python": platform.python_version(),
        "unlearn-ties": f"{_version('unlearn-ties')} (source {source_hash()})",
        **{name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
    }


def source_hash() -> str:
    """Eight digits that change with any module of ours."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parent.parent
    for package in OURS:
        for file in sorted((root / package).rglob("*.py")):
            digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:8]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _own_address() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""


def _interface() -> str | None:
    import psutil
    import ray

    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return name
    return None

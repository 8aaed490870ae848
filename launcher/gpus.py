"""GPUs of this machine and the processes that hold their memory, as nvidia-smi lists them, whatever this process may see."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from dataclasses import dataclass

MIB = 1 << 20
QUERY_S = 30.0
"""Seconds that nvidia-smi has; on a machine with many GPUs without persistence mode it takes some."""


@dataclass(frozen=True)
class Gpu:
    """One GPU of a machine, with its memory in bytes."""

    index: int
    uuid: str
    name: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class GpuProcess:
    """A process that holds memory of a GPU, bytes; its user where the system tells."""

    gpu: int
    pid: int
    name: str
    user: str | None
    used_bytes: int | None


def list_gpus() -> tuple[Gpu, ...]:
    """All GPUs; none where there is no nvidia-smi."""
    return parse_gpus(_nvidia_smi("--query-gpu=index,uuid,name,memory.total,memory.free"))


def foreign_processes(gpus: tuple[Gpu, ...]) -> tuple[GpuProcess, ...]:
    """Processes that hold memory of these GPUs and are neither this one nor above or below it. They are named, never touched."""
    import psutil

    if not gpus:
        return ()
    found = parse_processes(_nvidia_smi("--query-compute-apps=gpu_uuid,pid,process_name,used_memory"), gpus=gpus)
    own = psutil.Process()
    relatives = {own.pid, *(process.pid for process in (*own.parents(), *own.children(recursive=True)))}
    return tuple(process for process in found if process.pid not in relatives)


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """GPUs from lines of ``index, uuid, name, total MiB, free MiB``; lines that say something else are left out."""
    gpus = []
    for cells in _rows(text, columns=5):
        with suppress(ValueError):
            gpus.append(Gpu(int(cells[0]), cells[1], cells[2], int(cells[3]) * MIB, int(cells[4]) * MIB))
    return tuple(gpus)


def parse_processes(text: str, *, gpus: tuple[Gpu, ...]) -> tuple[GpuProcess, ...]:
    """Processes from lines of ``gpu uuid, pid, name, used MiB``; in a container the last may be ``[N/A]``."""
    indices = {gpu.uuid: gpu.index for gpu in gpus}
    found = []
    for cells in _rows(text, columns=4):
        if cells[0] in indices and cells[1].isdigit():
            used = int(cells[3]) * MIB if cells[3].isdigit() else None
            found.append(GpuProcess(indices[cells[0]], int(cells[1]), cells[2], _user(int(cells[1])), used))
    return tuple(found)


def _rows(text: str, *, columns: int) -> list[list[str]]:
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    return [row for row in rows if len(row) == columns]


def _nvidia_smi(query: str) -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=QUERY_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def _user(pid: int) -> str | None:
    import psutil

    try:
        return psutil.Process(pid).username()
    except psutil.Error:
        return None

"""What this machine, or a Ray cluster, can run: one line per check, one fix per line that needs it."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.check import GIB, Check, first_line
from launcher.gpus import GpuProcess, foreign_processes, list_gpus
from launcher.storage_place import is_uri
from trainers.errors import InputError
from trainers.files import check_writable

MIN_PYTHON = (3, 11)
MIN_DEEPSPEED = (0, 19, 8)
IMPORT_LIMIT_S = 120
_PREBUILT = "prebuilt: "
_DEEPSPEED_VERSION = f"""
import deepspeed
from deepspeed.git_version_info import installed_ops
print("{_PREBUILT}" + ", ".join(name for name, built in installed_ops.items() if built and name != "deepspeed_not_implemented"))
print(deepspeed.__version__)
"""


def run_doctor(*, cluster: bool, storage: str | None = None, folder: Path | None = None) -> int:
    """Print all checks.

    Args:
        cluster: look at the Ray cluster, too.
        storage: where runs are to be written; written to and read from by every node, or by this machine.
        folder: of the disk that is looked at; the working folder.

    Returns:
        3 if something required is missing, else 0.

    Raises:
        SetupError: if a cluster was asked for and there is none to connect to.
    """
    worst = 0
    for check in _checks(folder=folder or Path.cwd(), cluster=cluster, storage=storage):
        print(f"{check.status}  {check.text}", flush=True)
        if check.fix:
            print(f"      fix: {check.fix}", flush=True)
        worst = max(worst, 3 if check.status == "fail" else 0)
    return worst


def _checks(*, folder: Path, cluster: bool, storage: str | None) -> Iterator[Check]:
    yield check_python(sys.version_info[:3])
    torch_check, gpus = check_torch()
    yield torch_check
    yield from gpus
    yield from gpu_processes(foreign_processes(list_gpus()))
    for name in ("transformers", "peft", "safetensors", "scikit-learn", "rouge-score"):
        yield check_package(name)
    yield check_deepspeed(has_gpu=any(check.status == "pass" for check in gpus))
    yield check_compiler(os.environ)
    yield check_ray()
    yield check_cores()
    yield check_memory()
    yield check_disk(folder)
    yield check_wandb(os.environ)
    yield check_hub(os.environ)
    if storage is not None and not cluster:
        yield check_storage(storage)
    if cluster:
        from launcher.doctor_cluster import check_cluster

        yield from check_cluster(storage=storage)


def check_python(version: tuple[int, ...]) -> Check:
    """Whether the interpreter is new enough."""
    text = f"python {'.'.join(map(str, version))}"
    if version < MIN_PYTHON:
        return Check("fail", text, f"install Python {'.'.join(map(str, MIN_PYTHON))} or newer")
    return Check("pass", text)


def check_package(name: str) -> Check:
    """Whether a package is installed, and in which version; it is not imported."""
    try:
        return Check("pass", f"{name} {importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
        return Check("fail", f"{name} is not installed", f"pip install {name}")


def check_torch() -> tuple[Check, list[Check]]:
    """torch itself, and one check per GPU (one warning where there is none)."""
    try:
        import torch
    except Exception as error:
        return Check("fail", f"torch cannot be imported: {first_line(error)}", "pip install torch"), []
    found = Check("pass", f"torch {torch.__version__}")
    if not torch.cuda.is_available():
        fix = "the quickstart needs none; for real models use a machine with an NVIDIA GPU and a CUDA build of torch"
        return found, [Check("warn", "no CUDA device: computing on the CPU", fix)]
    gpus = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        text = f"GPU {index}: {torch.cuda.get_device_name(index)}, {free / GIB:.0f} of {total / GIB:.0f} GiB free"
        busy = free < 0.9 * total
        gpus.append(Check("warn", text, "another process holds its memory: see nvidia-smi") if busy else Check("pass", text))
    return found, gpus


def gpu_processes(processes: Sequence[GpuProcess], *, where: str = "") -> Iterator[Check]:
    """One warning per process that holds memory of a GPU; it is named, and left alone."""
    for process in processes:
        owner = f"pid {process.pid}" + (f" of {process.user}" if process.user else "")
        amount = "memory" if process.used_bytes is None else f"{process.used_bytes / GIB:.1f} GiB"
        text = f"{where}GPU {process.gpu}: {process.name} ({owner}) holds {amount}"
        yield Check("warn", text, "wait until it ends, or ask its owner; nothing is stopped from here")


def check_deepspeed(*, has_gpu: bool, run: Callable[..., Any] = subprocess.run) -> Check:
    """Import DeepSpeed in a process of its own: it prints, takes seconds, and a broken build may take the process down."""
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1", **({} if has_gpu else {"DS_ACCELERATOR": "cpu"})}
    try:
        done = run(
            [sys.executable, "-c", _DEEPSPEED_VERSION],
            capture_output=True,
            text=True,
            timeout=IMPORT_LIMIT_S,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return Check("warn", f"deepspeed takes more than {IMPORT_LIMIT_S} s to import", "try again on a quieter machine")
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Check("fail", f"deepspeed cannot be imported: {last}", "pip install --force-reinstall --no-deps 'deepspeed>=0.19.8'")
    lines = ["", *done.stdout.strip().splitlines()]
    before, version = lines[-2], lines[-1]
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
    if numbers < MIN_DEEPSPEED:
        return Check("fail", f"deepspeed {version}", "pip install 'deepspeed>=0.19.8'")
    prebuilt = before.removeprefix(_PREBUILT) if before.startswith(_PREBUILT) else ""
    return Check("pass", f"deepspeed {version}, operations built with it: {prebuilt or 'none'} (none are needed)")


def check_compiler(environment: Mapping[str, str]) -> Check:
    """DeepSpeed compiles operations when they are first used; trials use none, so that a missing compiler is no fault."""
    home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    nvcc = shutil.which("nvcc") or (shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None)
    return Check("pass", f"DeepSpeed will compile nothing: AdamW is torch's, nothing is offloaded; nvcc: {nvcc or 'no (not needed)'}")


def check_ray() -> Check:
    """Whether Ray can be imported; no cluster is started."""
    try:
        import ray
    except Exception as error:
        return Check("fail", f"ray cannot be imported: {first_line(error)}", "pip install 'ray[default,tune]'")
    return Check("pass", f"ray {ray.__version__}")


def check_cores() -> Check:
    """The CPU cores that this process may use, which a container may have fewer of than the machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores < 2:
        return Check("warn", f"{cores} CPU core", "two or more make the quickstart comfortable")
    return Check("pass", f"{cores} CPU cores")


def check_memory() -> Check:
    """Whether the memory that is free now is enough for the quickstart."""
    import psutil

    memory = psutil.virtual_memory()
    text = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB memory free"
    if memory.available < 4 * GIB:
        return Check("warn", text, "the quickstart wants 4 GiB: close other programs, or set sweep.max_concurrent: 1")
    return Check("pass", text)


def check_disk(folder: Path) -> Check:
    """Whether the disk of a folder has room for a run: a gigabyte for the quickstart, more for merged models."""
    free = shutil.disk_usage(folder).free
    text = f"{free / GIB:.1f} GiB free on the disk of {folder}"
    if free < 1 * GIB:
        return Check("fail", text, "free some space, or run in a folder on another disk")
    if free < 20 * GIB:
        return Check("warn", text, "enough for the quickstart; a merged 7B model alone takes 14 GiB: set storage_path to a larger disk")
    return Check("pass", text)


def check_storage(storage: str) -> Check:
    """Whether this machine may write to a folder that is to hold runs."""
    if is_uri(storage):
        return Check("warn", f"storage {storage}: not checked", "add --cluster: every node writes and reads there")
    try:
        check_writable(Path(storage).expanduser())
    except InputError as error:
        return Check("fail", f"storage {storage}: {error.what}", error.fix)
    return Check("pass", f"storage {storage}: writable")


def check_wandb(environment: Any) -> Check:
    """Whether there is a Weights & Biases key. The key itself is never read into the output."""
    from launcher.tracking.mode import has_wandb_key

    return Check("pass", f"Weights & Biases key: {'yes' if has_wandb_key(environment) else 'no (not needed)'}")


def check_hub(environment: Any) -> Check:
    """Whether the Hugging Face hub may be asked, and whether there is a token. The token itself is never read into the output."""
    offline = str(environment.get("HF_HUB_OFFLINE", "")).upper() in {"1", "ON", "YES", "TRUE"}
    home = Path(environment.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    file = Path(environment.get("HF_TOKEN_PATH") or home / "token").expanduser()
    token = bool(environment.get("HF_TOKEN")) or (file.is_file() and file.stat().st_size > 0)
    state = "offline" if offline else "online allowed"
    return Check("pass", f"Hugging Face hub: {state}, token: {'yes' if token else 'no (not needed)'}; models are read from local folders")

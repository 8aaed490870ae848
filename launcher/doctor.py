"""What this machine, or a Ray cluster, can run: one line per check, one fix per line that needs it."""

from __future__ import annotations

import importlib.metadata
import logging
import netrc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainers.errors import SetupError

GIB = 1 << 30
MIN_PYTHON = (3, 11)
MIN_DEEPSPEED = (0, 19, 8)
IMPORT_LIMIT_S = 120


@dataclass(frozen=True)
class Check:
    """One line: ``fail`` is required for any run, ``warn`` limits what can be run."""

    status: Literal["pass", "warn", "fail"]
    text: str
    fix: str | None = None


def run_doctor(*, cluster: bool, folder: Path | None = None) -> int:
    """Print all checks.

    Returns:
        3 if something required is missing, else 0.

    Raises:
        SetupError: if a cluster was asked for and there is none to connect to.
    """
    worst = 0
    for check in _checks(folder=folder or Path.cwd(), cluster=cluster):
        print(f"{check.status}  {check.text}", flush=True)
        if check.fix:
            print(f"      fix: {check.fix}", flush=True)
        worst = max(worst, 3 if check.status == "fail" else 0)
    return worst


def _checks(*, folder: Path, cluster: bool) -> Iterator[Check]:
    yield check_python(sys.version_info[:3])
    torch_check, gpus = check_torch()
    yield torch_check
    yield from gpus
    for name in ("transformers", "peft", "safetensors", "scikit-learn", "rouge-score"):
        yield check_package(name)
    yield check_deepspeed(has_gpu=any(check.status == "pass" for check in gpus))
    yield check_ray()
    yield check_cores()
    yield check_memory()
    yield check_disk(folder)
    yield check_wandb(os.environ)
    yield check_hub(os.environ)
    if cluster:
        yield from check_cluster()


def check_python(version: tuple[int, ...]) -> Check:
    text = f"python {'.'.join(map(str, version))}"
    if version < MIN_PYTHON:
        return Check("fail", text, f"install Python {'.'.join(map(str, MIN_PYTHON))} or newer")
    return Check("pass", text)


def check_package(name: str) -> Check:
    try:
        return Check("pass", f"{name} {importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
        return Check("fail", f"{name} is not installed", f"pip install {name}")


def check_torch() -> tuple[Check, list[Check]]:
    """torch itself, and one check per GPU (one warning where there is none)."""
    try:
        import torch
    except Exception as error:
        return Check("fail", f"torch cannot be imported: {_first_line(error)}", "pip install torch"), []
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


def check_deepspeed(*, has_gpu: bool, run: Callable[..., Any] = subprocess.run) -> Check:
    """Import DeepSpeed in a process of its own: it prints, takes seconds, and a broken build may take the process down."""
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1", **({} if has_gpu else {"DS_ACCELERATOR": "cpu"})}
    try:
        done = run(
            [sys.executable, "-c", "import deepspeed; print(deepspeed.__version__)"],
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
    version = done.stdout.strip().splitlines()[-1]
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
    if numbers < MIN_DEEPSPEED:
        return Check("fail", f"deepspeed {version}", "pip install 'deepspeed>=0.19.8'")
    return Check("pass", f"deepspeed {version}")


def check_ray() -> Check:
    try:
        import ray
    except Exception as error:
        return Check("fail", f"ray cannot be imported: {_first_line(error)}", "pip install 'ray[default,tune]'")
    return Check("pass", f"ray {ray.__version__}")


def check_cores() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores < 2:
        return Check("warn", f"{cores} CPU core", "two or more make the quickstart comfortable")
    return Check("pass", f"{cores} CPU cores")


def check_memory() -> Check:
    import psutil

    memory = psutil.virtual_memory()
    text = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB memory free"
    if memory.available < 4 * GIB:
        return Check("warn", text, "the quickstart wants 4 GiB: close other programs, or set sweep.max_concurrent: 1")
    return Check("pass", text)


def check_disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    text = f"{free / GIB:.1f} GiB free on the disk of {folder}"
    if free < 1 * GIB:
        return Check("fail", text, "free some space, or run in a folder on another disk")
    if free < 20 * GIB:
        return Check("warn", text, "enough for the quickstart; a merged 7B model alone takes 14 GiB: set storage_path to a larger disk")
    return Check("pass", text)


def check_wandb(environment: Any) -> Check:
    """Whether there is a Weights & Biases key. The key itself is never read into the output."""
    present = bool(environment.get("WANDB_API_KEY"))
    if not present:
        try:
            present = netrc.netrc().authenticators("api.wandb.ai") is not None
        except (OSError, netrc.NetrcParseError):
            present = False
    return Check("pass", f"Weights & Biases key: {'yes' if present else 'no (not needed)'}")


def check_hub(environment: Any) -> Check:
    offline = str(environment.get("HF_HUB_OFFLINE", "")).upper() in {"1", "ON", "YES", "TRUE"}
    return Check("pass", f"Hugging Face hub: {'offline' if offline else 'online allowed'}; models are read from local folders")


def check_cluster() -> Iterator[Check]:
    """Every node of the running Ray cluster, with the versions it has.

    Raises:
        SetupError: if there is no cluster.
    """
    import ray

    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        raise SetupError(
            "no Ray cluster to connect to",
            where=f"RAY_ADDRESS = {os.environ.get('RAY_ADDRESS', '(not set)')}",
            why=_first_line(error),
            fix="start one with `ray start --head` or `ray up cluster.yaml`, or run this on its head node",
        ) from None
    try:
        yield from _nodes(ray)
    finally:
        ray.shutdown()


def _nodes(ray: Any) -> Iterator[Check]:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def versions() -> tuple[str, str]:
        import platform

        import ray

        return platform.python_version(), ray.__version__

    here = versions()
    task = ray.remote(num_cpus=0, max_retries=0)(versions)
    for node in ray.nodes():
        name = node.get("NodeManagerHostname", node["NodeID"][:8])
        if not node["Alive"]:
            yield Check("warn", f"node {name} is dead", "the cluster works without it; restart it with `ray start --address=HEAD:6379`")
            continue
        resources = node["Resources"]
        amounts = {kind: resources.get(kind, 0) for kind in ("CPU", "GPU", "memory")}
        text = f"node {name}: {amounts['CPU']:g} CPU cores, {amounts['GPU']:g} GPUs, {amounts['memory'] / GIB:.0f} GiB"
        where = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
        try:
            there = ray.get(task.options(scheduling_strategy=where).remote(), timeout=60)
        except Exception as error:
            yield Check("fail", f"{text}; it does not answer: {_first_line(error)}", "restart Ray on that node")
            continue
        text += f", python {there[0]}, ray {there[1]}"
        if there != here:
            yield Check("fail", f"{text}; here python {here[0]}, ray {here[1]}", "install the same versions on all nodes")
        else:
            yield Check("pass", text)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

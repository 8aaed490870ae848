"""One process group per trial, without ports where one machine is enough."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

TIMEOUT = datetime.timedelta(minutes=10)


@dataclass(frozen=True)
class Rank:
    """One process of a trial.

    Args:
        rank: 0 to ``world_size`` - 1.
        world_size: processes of the trial.
        local_rank: index among the trial's processes on this node; chooses the GPU.
        init_method: ``file://...`` on one machine or ``tcp://host:port``; None for a single process.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    init_method: str | None = None

    @property
    def device(self) -> str:
        """The device this rank computes on."""
        return f"cuda:{self.local_rank}" if torch.cuda.is_available() else "cpu"


def file_init_method(path: Path) -> str:
    """A rendezvous file that must not exist yet; it works for processes of one machine or of a shared file system."""
    return f"file://{Path(path).resolve()}"


def start_process_group(rank: Rank) -> None:
    """Join the trial's process group; every rank calls it, before the engine is built.

    A process that computes one trial after another alone keeps its group: DeepSpeed remembers groups it derived from it.
    """
    if dist.is_initialized():
        assert dist.get_world_size() == rank.world_size == 1, "a process that shared a trial cannot start another one"
        return
    # DeepSpeed and libraries below it read these; guessing by host name gives two trials of one node the same GPU
    # (https://github.com/ray-project/ray/issues/37212).
    os.environ.update(
        RANK=str(rank.rank), WORLD_SIZE=str(rank.world_size), LOCAL_RANK=str(rank.local_rank), LOCAL_WORLD_SIZE=str(rank.world_size)
    )
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(rank.local_rank)
    if rank.init_method is None:
        assert rank.world_size == 1, "several ranks need an init_method"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
    else:
        dist.init_process_group(backend, init_method=rank.init_method, rank=rank.rank, world_size=rank.world_size, timeout=TIMEOUT)


def stop_process_group(rank: Rank) -> None:
    """Leave a process group that is shared with other ranks."""
    if rank.world_size > 1 and dist.is_initialized():
        dist.destroy_process_group()

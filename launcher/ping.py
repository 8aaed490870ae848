"""Whether processes on different nodes can sum a number over torch's process groups, as the ranks of a trial do."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from launcher.nodes import Answer, Node, ask_nodes

Backend = Literal["gloo", "nccl"]
PING_S = 30.0
"""Seconds that a process group has to form; on a healthy network it takes less than one."""
START_S = 60.0
"""Seconds on top in which a process starts and imports torch."""


@dataclass(frozen=True)
class Seat:
    """A rank's place in the process group."""

    backend: Backend
    host: str
    port: int
    rank: int
    world_size: int
    timeout_s: float


def ping_nodes(
    nodes: Sequence[Node], *, backend: Backend, timeout_s: float = PING_S, meet_at: tuple[str, int] | None = None
) -> list[Answer]:
    """Sum one number over a process on every node; each node's answer is the seconds it took, or why it did not work.

    Args:
        nodes: of the connected Ray cluster; rank 0 is on the first.
        backend: ``nccl`` takes the first GPU of each node.
        timeout_s: seconds that the process group has.
        meet_at: address and port of rank 0, where they are not to be asked of the first node.
    """
    if meet_at is None:
        (first,) = ask_nodes(free_place, nodes=[nodes[0]])
        if first.error is not None:
            return [first]
        meet_at = first.value
    seats = {
        node.node_id: Seat(backend, meet_at[0], meet_at[1], rank, len(nodes), timeout_s) for rank, node in enumerate(nodes)
    }  # fmt: skip
    return ask_nodes(take_seat, seats, nodes=tuple(nodes), gpus=backend == "nccl", timeout_s=timeout_s + 2 * START_S)


def free_place() -> tuple[str, int]:
    """This node's address in the cluster, and a port that is free on it."""
    import ray

    with socket.socket() as probe:
        probe.bind(("", 0))
        return ray.util.get_node_ip_address(), probe.getsockname()[1]


def take_seat(seats: dict[str, Seat]) -> float:
    """Take this node's seat, in a process of its own: a collective that hangs can be ended only from outside.

    Raises:
        RuntimeError: with the last line that the process wrote.
    """
    import ray

    seat = seats[ray.get_runtime_context().get_node_id()]
    command = [sys.executable, "-m", "launcher.ping", json.dumps(asdict(seat))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seat.timeout_s + START_S)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the sum did not end within {seat.timeout_s:g} s") from None
    if done.returncode != 0:
        raise RuntimeError(next((line for line in reversed(done.stderr.splitlines()) if "Error" in line), "the process died").strip())
    return float(done.stdout.split()[-1])


def sum_once(seat: Seat) -> float:
    """Form the process group, sum the ranks' numbers, compare; the seconds from the first to the last.

    Raises:
        RuntimeError: if the group does not form, or the sum is wrong.
    """
    import time
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    device = torch.device("cuda", 0) if seat.backend == "nccl" else torch.device("cpu")
    started = time.perf_counter()
    dist.init_process_group(
        seat.backend,
        init_method=f"tcp://{seat.host}:{seat.port}",
        rank=seat.rank,
        world_size=seat.world_size,
        timeout=timedelta(seconds=seat.timeout_s),
    )
    try:
        number = torch.tensor([seat.rank + 1.0], device=device)
        dist.all_reduce(number)
        found, expected = number.item(), seat.world_size * (seat.world_size + 1) / 2
    finally:
        dist.destroy_process_group()
    if found != expected:
        raise RuntimeError(f"the ranks' numbers sum to {found:g} instead of {expected:g}")
    return time.perf_counter() - started


if __name__ == "__main__":
    print(sum_once(Seat(**json.loads(sys.argv[1]))))

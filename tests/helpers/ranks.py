"""Real processes as ranks: spawned, joined by a file, stopped by a time limit instead of hanging."""

from __future__ import annotations

import multiprocessing
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainers.distributed import Rank, file_init_method


def _run(function: Callable[..., Any], rank: Rank, arguments: dict[str, Any], results: Any) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        results.put((rank.rank, "ok", function(rank=rank, **arguments)))
    except BaseException:
        results.put((rank.rank, "error", traceback.format_exc()))


def run_ranks(function: Callable[..., Any], *, world_size: int, timeout_s: float = 180.0, **arguments: Any) -> list[Any]:
    """Call ``function(rank=..., **arguments)`` in ``world_size`` new processes; results in rank order.

    Raises:
        AssertionError: with the traceback of the first rank that failed, or if the time limit is reached.
    """
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        method = file_init_method(Path(folder) / "rendezvous")
        processes = [
            context.Process(target=_run, args=(function, Rank(index, world_size, index, method), arguments, results), daemon=True)
            for index in range(world_size)
        ]
        for process in processes:
            process.start()
        found: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        try:
            while len(found) < world_size:
                try:
                    index, state, value = results.get(timeout=0.5)
                except queue.Empty:
                    assert time.monotonic() < deadline, (
                        f"ranks {sorted(set(range(world_size)) - set(found))} did not finish in {timeout_s} s"
                    )
                    dead = [p.exitcode for p in processes if p.exitcode not in (None, 0)]
                    assert not dead, f"a rank died with exit code {dead[0]}"
                    continue
                assert state == "ok", f"rank {index} failed:\n{value}"
                found[index] = value
        finally:
            for process in processes:
                process.join(timeout=5)
                if process.is_alive():
                    process.kill()
    return [found[index] for index in range(world_size)]

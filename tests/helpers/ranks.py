"""Real processes as ranks: joined by a file, stopped by a time limit instead of hanging."""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from trainers.distributed import Rank, file_init_method, start_process_group


class RankGroup:
    """Processes that compute one call after the other, each as one rank of them.

    Starting a process and joining a group take longer than training a tiny model, so many calls share them. A call that fails
    or that exceeds its limit fails alone: its processes are ended, and the next call starts new ones.

    Args:
        world_size: number of ranks.
        join: form one process group that lasts for all calls, and let ``train_worker`` use it.
    """

    def __init__(self, world_size: int, *, join: bool = True) -> None:
        self.world_size, self._join = world_size, join
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> RankGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the processes, if there are none, without waiting for them."""
        if self._processes:
            return
        # The server imports once what all ranks need, and each of them begins as a copy of it.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.helpers.rank_imports"])
        self._folder = tempfile.TemporaryDirectory()
        method = file_init_method(Path(self._folder.name) / "rendezvous")
        for index in range(self.world_size):
            own, other = context.Pipe()
            rank = Rank(index, self.world_size, index, method)
            process = context.Process(target=_serve, args=(rank, other, self._join), daemon=True)
            process.start()
            other.close()
            self._processes.append(process)
            self._pipes.append(own)

    def call(self, function: Callable[..., Any], *, timeout_s: float = 60.0, **arguments: Any) -> list[Any]:
        """``function(rank=..., **arguments)`` on every rank; results in rank order.

        Raises:
            AssertionError: with the traceback of the first rank that failed, or if the time limit is reached.
        """
        self.start()
        deadline = time.monotonic() + timeout_s
        found: dict[int, Any] = {}
        try:
            for pipe in self._pipes:
                pipe.send((function, arguments))
            while len(found) < self.world_size:
                waiting = {pipe: index for index, pipe in enumerate(self._pipes) if index not in found}
                ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
                assert ready, f"ranks {sorted(waiting.values())} did not finish in {timeout_s} s"
                for pipe in ready:
                    index = waiting[pipe]
                    state, found[index] = _receive(pipe, index=index, process=self._processes[index])
                    assert state == "ok", f"rank {index} failed:\n{found[index]}"
        except BaseException:
            # Ranks that wait for each other in a call that failed cannot be used any more.
            self.stop(at_once=True)
            raise
        return [found[index] for index in range(self.world_size)]

    def stop(self, *, at_once: bool = False) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            if not at_once:
                process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
        if self._folder is not None:
            self._folder.cleanup()
        self._processes, self._pipes, self._folder = [], [], None


def run_ranks(function: Callable[..., Any], *, world_size: int, timeout_s: float = 180.0, **arguments: Any) -> list[Any]:
    """Call ``function(rank=..., **arguments)`` in ``world_size`` new processes, which form no group yet; results in rank order.

    Raises:
        AssertionError: with the traceback of the first rank that failed, or if the time limit is reached.
    """
    with RankGroup(world_size, join=False) as group:
        return group.call(function, timeout_s=timeout_s, **arguments)


def _receive(pipe: Connection, *, index: int, process: Any) -> tuple[str, Any]:
    try:
        return pipe.recv()
    except EOFError:
        process.join(timeout=5)
        raise AssertionError(f"rank {index} died with exit code {process.exitcode}") from None


def _serve(rank: Rank, pipe: Connection, join: bool) -> None:
    """A rank's life: calls in, results out, until the other end is closed."""
    import torch

    from tests.helpers import rank_imports  # noqa: F401

    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, BrokenPipeError):
        try:
            if join:
                _join_for_good(rank)
        except BaseException:
            pipe.send(("error", traceback.format_exc()))
            return
        while True:
            function, arguments = pipe.recv()
            try:
                answer = ("ok", function(rank=rank, **arguments))
            except BaseException:
                answer = ("error", traceback.format_exc())
            pipe.send(answer)


def _join_for_good(rank: Rank) -> None:
    """Join the process group now, and let trials neither start nor stop it."""
    from trainers import loop

    def nothing(rank: Rank) -> None:
        pass

    start_process_group(rank)
    loop.start_process_group = loop.stop_process_group = nothing

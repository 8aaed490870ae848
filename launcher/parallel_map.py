"""A map over Ray actors whose function stays with them, for work that is dear to prepare."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from trainers.errors import RunError

TRIES = 2
"""How often an item is given out: a worker that died, for instance for want of memory, may have been unlucky."""


class _Worker:
    """One process that keeps a function, with whatever it has loaded."""

    def hold(self, work: Callable[[Any], Any]) -> None:
        """Keep a function."""
        self.work = work

    def do(self, item: Any) -> Any:
        """Apply it."""
        return self.work(item)


class ActorMap:
    """Calls a function on items in several processes and gives the results in the order of the items.

    Args:
        workers: processes.
        cpus: cores reserved for each.
        gpus: GPUs reserved for each.
    """

    def __init__(self, *, workers: int, cpus: float, gpus: float) -> None:
        self._workers, self._cpus, self._gpus = workers, cpus, gpus
        self._actors: list[Any] = []
        self._work: Any = None

    def __call__(self, work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        """Results in order, each as soon as it and all before it are there.

        Raises:
            RunError: if a process dies twice over one item. What the function raises is raised here.
        """
        import ray

        if not items:
            return
        self._prepare(work)
        free, done = list(range(len(self._actors))), {}
        waiting = [(index, 1) for index in range(len(items))][::-1]
        running: dict[Any, tuple[int, int, int]] = {}
        for wanted in range(len(items)):
            while wanted not in done:
                while free and waiting:
                    index, attempt = waiting.pop()
                    place = free.pop()
                    running[self._actors[place].do.remote(items[index])] = (index, attempt, place)
                ready, _ = ray.wait(list(running), num_returns=1)
                index, attempt, place = running.pop(ready[0])
                free.append(place)
                try:
                    done[index] = ray.get(ready[0])
                except ray.exceptions.RayActorError as error:
                    if attempt >= TRIES:
                        raise RunError("a process that measured merges died twice", why=str(error).splitlines()[0],
                                       fix="set pairs.workers to a smaller number") from error  # fmt: skip
                    self._actors[place] = self._start(work)
                    waiting.append((index, attempt + 1))
            yield done.pop(wanted)

    def _prepare(self, work: Callable[[Any], Any]) -> None:
        if self._work is not work:
            self.close()
            self._actors = [self._start(work) for _ in range(self._workers)]
            self._work = work

    def _start(self, work: Callable[[Any], Any]) -> Any:
        import ray

        actor: Any = ray.remote(_Worker).options(num_cpus=self._cpus, num_gpus=self._gpus).remote()
        actor.hold.remote(work)
        return actor

    def close(self) -> None:
        """End all processes."""
        import ray

        for actor in self._actors:
            ray.kill(actor)
        self._actors, self._work = [], None


@contextmanager
def parallel_map(*, workers: int | None, cpus: float) -> Iterator[Callable[..., Any]]:
    """A ``map`` over as many processes as asked for, or as there are GPUs; the built-in one where that is one.

    Args:
        workers: null: one per GPU of the cluster, or one in all where there is none.
        cpus: cores for each.
    """
    import torch

    num_gpus = float(torch.cuda.device_count())
    if workers == 1 or (workers is None and num_gpus < 2 and not os.environ.get("RAY_ADDRESS")):
        yield map
        return
    from launcher.ray_session import start_ray, stop_ray

    resources = start_ray(cpus=max(os.cpu_count() or 1, int(cpus * (workers or 1)) + 1))
    try:
        num_gpus = resources.get("GPU", 0.0)
        number = workers or int(num_gpus)
        # One GPU of the cluster is better than none of this machine.
        if number < 2 and not (number == 1 and torch.cuda.device_count() == 0):
            yield map
            return
        pool = ActorMap(workers=number, cpus=cpus, gpus=min(1.0, num_gpus / number))
        try:
            yield pool
        finally:
            pool.close()
    finally:
        stop_ray()

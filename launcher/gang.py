"""A trial of several ranks: actors that are born together in the trial's placement group and die together."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from typing import Any

from launcher.trial import TrialTask
from trainers.errors import RunError


class RankActor:
    """One rank of a trial in its own process."""

    def place(self) -> tuple[str, int, str, list[str]]:
        """Host, a free port on it, node id and GPU ids of this rank."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        context = ray.get_runtime_context()
        return ray.util.get_node_ip_address(), port, context.get_node_id(), [str(i) for i in context.get_accelerator_ids().get("GPU", [])]

    def see_gpus(self, visible: list[str]) -> None:
        """Show this rank all GPUs that the trial has on its node.

        One-GPU masks keep NCCL from finding the fast links between GPUs
        (https://github.com/ray-project/ray/issues/61073); the mask counts only before torch is imported.
        """
        assert "torch" not in sys.modules, "GPU visibility must be set before torch is imported"
        if visible:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible)

    def run(self, task: TrialTask, *, rank: int, world_size: int, local_rank: int, init_method: str) -> Iterator[dict[str, Any]]:
        """Compute this rank's part of the trial; only rank 0 yields metrics."""
        from launcher.logs import capture_output, quiet_libraries
        from launcher.sweep import set_threads
        from launcher.trial import run_trial
        from trainers.distributed import Rank

        with capture_output(task.folder / "logs" / f"rank-{rank}.log"):
            quiet_libraries()
            set_threads(task)
            for metrics in run_trial(task, rank=Rank(rank, world_size, local_rank, init_method)):
                if rank == 0:
                    yield metrics


def run_gang(task: TrialTask, *, ranks: int, stall_s: float) -> Iterator[dict[str, Any]]:
    """Start the ranks in the bundles of the current placement group and yield rank 0's metrics.

    Raises:
        RunError: if a rank dies or nothing is heard for ``stall_s`` seconds; no rank survives the call.
    """
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = ray.util.get_current_placement_group()
    assert group is not None, "Tune gives every trial a placement group"
    bundles = group.bundle_specs
    # Ray's stubs know neither remote methods of a plain class nor streaming generators.
    actors: list[Any] = [
        ray.remote(RankActor)
        .options(
            num_cpus=bundle.get("CPU", 0),
            num_gpus=bundle.get("GPU", 0),
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index + 1),
        )
        .remote()
        for index, bundle in enumerate(bundles[1 : ranks + 1])
    ]
    try:
        places = ray.get([actor.place.remote() for actor in actors], timeout=stall_s)
        visible: dict[str, list[str]] = {}
        local_ranks: list[int] = []
        for _, _, node, gpus in places:
            known = visible.setdefault(node, [])
            local_ranks.append(len(known) if gpus else sum(place[2] == node for place in places[: len(local_ranks)]))
            known.extend(gpus)
        ray.get([actor.see_gpus.remote(visible[place[2]]) for actor, place in zip(actors, places, strict=True)])
        init_method = f"tcp://{places[0][0]}:{places[0][1]}"
        streams = [
            actor.run.options(num_returns="streaming").remote(
                task, rank=rank, world_size=ranks, local_rank=local_ranks[rank], init_method=init_method
            )
            for rank, actor in enumerate(actors)
        ]
        yield from _relay(streams, task=task, stall_s=stall_s)
    finally:
        for actor in actors:
            ray.kill(actor)


def _relay(streams: list[Any], *, task: TrialTask, stall_s: float) -> Iterator[dict[str, Any]]:
    import ray

    ends: list[Any] = [stream.completed() for stream in streams]
    others = ends[1:]
    while True:
        ready, _ = ray.wait([streams[0], *others], num_returns=1, timeout=stall_s)
        if not ready:
            raise RunError(f"{task.name}: nothing was heard for {stall_s:g} s", where="sweep.stall_s", fix="see the logs of its ranks")
        for item in ready:
            try:
                if item is streams[0]:
                    reference: Any = next(streams[0])  # type: ignore[arg-type]
                    yield ray.get(reference)
                else:
                    ray.get(item)
                    others = [end for end in others if end != item]
            except StopIteration:
                ray.get(ends, timeout=stall_s)
                return
            except ray.exceptions.RayActorError as error:
                raise RunError(f"{task.name}: a rank died", why=str(error).splitlines()[0], where=str(task.folder / "logs")) from error

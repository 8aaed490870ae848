"""A trial of several ranks: actors that are born together in the trial's placement group and die together."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from launcher.trial import TrialTask, fail_for_good, read_status, settled
from trainers.errors import RunError, UserFacingError


@dataclass(frozen=True)
class Place:
    """A rank's host, a port that is free there, its node's id, and the ids of its GPUs."""

    host: str
    port: int
    node: str
    gpus: tuple[str, ...]


class RankActor:
    """One rank of a trial in its own process."""

    def place(self) -> Place:
        """Where this rank runs."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        context = ray.get_runtime_context()
        gpus = tuple(str(index) for index in context.get_accelerator_ids().get("GPU", []))
        return Place(host=ray.util.get_node_ip_address(), port=port, node=context.get_node_id(), gpus=gpus)

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

    Bad input that any rank meets is recorded as the trial's failure and not raised: another start would meet it again.

    Raises:
        RunError: if a rank dies or nothing is heard for ``stall_s`` seconds; no rank survives the call.
    """
    import ray

    actors = _start_actors(ranks)
    try:
        streams = _start_ranks(actors, task=task, stall_s=stall_s)
        try:
            yield from _relay(streams, task=task, stall_s=stall_s)
        except ray.exceptions.RayError as error:
            _explain(error, streams=streams, task=task)
    finally:
        for actor in actors:
            ray.kill(actor)


def _start_actors(ranks: int) -> list[Any]:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = ray.util.get_current_placement_group()
    assert group is not None, "Tune gives every trial a placement group"
    # Ray's stubs know neither remote methods of a plain class nor streaming generators.
    return [
        ray.remote(RankActor)
        .options(
            num_cpus=bundle.get("CPU", 0),
            num_gpus=bundle.get("GPU", 0),
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index + 1),
        )
        .remote()
        for index, bundle in enumerate(group.bundle_specs[1 : ranks + 1])
    ]


def _start_ranks(actors: list[Any], *, task: TrialTask, stall_s: float) -> list[Any]:
    import ray

    try:
        places: list[Place] = ray.get([actor.place.remote() for actor in actors], timeout=stall_s)
    except ray.exceptions.GetTimeoutError:
        raise _nothing_heard(task, stall_s) from None
    visible: dict[str, list[str]] = {}
    local_ranks: list[int] = []
    for place in places:
        local_ranks.append(sum(other.node == place.node for other in places[: len(local_ranks)]))
        visible.setdefault(place.node, []).extend(place.gpus)
    ray.get([actor.see_gpus.remote(visible[place.node]) for actor, place in zip(actors, places, strict=True)])
    init_method = f"tcp://{places[0].host}:{places[0].port}"
    return [
        actor.run.options(num_returns="streaming").remote(
            task, rank=rank, world_size=len(actors), local_rank=local_ranks[rank], init_method=init_method
        )
        for rank, actor in enumerate(actors)
    ]


def _relay(streams: list[Any], *, task: TrialTask, stall_s: float) -> Iterator[dict[str, Any]]:
    import ray

    leader: Any = streams[0]
    followers: list[Any] = [stream.completed() for stream in streams[1:]]
    patience: float | None = stall_s
    while True:
        ready, _ = ray.wait([leader, *followers], num_returns=1, timeout=patience)
        if not ready:
            raise _nothing_heard(task, stall_s)
        if ready[0] is leader:
            try:
                reference: Any = next(streams[0])
                metrics: dict[str, Any] = ray.get(reference)
            except StopIteration:
                return
            # No other rank takes part in what rank 0 does now: it may take long, and cannot hang.
            patience = None if metrics.get("state") == "evaluating" else stall_s
            yield metrics
        else:
            ray.get(ready[0])
            followers = [end for end in followers if end != ready[0]]


def _nothing_heard(task: TrialTask, stall_s: float) -> RunError:
    return RunError(
        f"no sign of life for {stall_s:g} s (sweep.stall_s)", where=str(task.folder / "logs"), fix="see what its ranks did last"
    )


def _explain(error: Exception, *, streams: list[Any], task: TrialTask) -> None:
    """Raise, or record, why the gang ended: a rank that fails takes the others with it, and theirs may be the first error seen."""
    import ray

    ends = [stream.completed() for stream in streams]
    ray.wait(ends, num_returns=len(ends), timeout=5.0)
    ready, _ = ray.wait(ends, num_returns=len(ends), timeout=0)
    errors = [error]
    for end in ready:
        try:
            ray.get(end)
        except ray.exceptions.RayError as other:
            errors.append(other)
    causes = [getattr(found, "cause", found) for found in errors]
    for cause in causes:
        if isinstance(cause, UserFacingError):
            return fail_for_good(task.folder, error=cause)
    if settled(read_status(task.folder)):
        return None
    if any(isinstance(found, ray.exceptions.RayActorError) for found in errors):
        raise RunError("the process of a rank died", where=str(task.folder / "logs")) from error
    raise error

"""A trial of several ranks: actors that are born together in the trial's placement group and die together."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.attempts import machine_lost
from launcher.interfaces import interface_settings
from launcher.node_loss import lost_nodes
from launcher.processes import Process, end_processes, this_process
from launcher.trial import TrialTask, fail_for_good, read_status, settled, write_status
from launcher.trial_errors import OutOfMemory
from launcher.trial_home import bring_trial, departing
from launcher.watchdog import FIRST_SIGN_S
from trainers.errors import InputError, RunError, SetupError, UserFacingError

log = logging.getLogger(__name__)
OTHERS_S = 5.0
"""Seconds to wait, after the first error, for those of the other ranks: the first one heard of is often only a consequence."""
END_S = 10.0
"""Seconds that Ray has to end a rank before it is killed by its process id: one that is stopped does not hear Ray."""


@dataclass(frozen=True)
class Place:
    """A rank's host, a port that is free there, its node's id, the ids of its GPUs, and its process."""

    host: str
    port: int
    node: str
    gpus: tuple[str, ...]
    process: Process


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
        return Place(host=ray.util.get_node_ip_address(), port=port, node=context.get_node_id(), gpus=gpus, process=this_process())

    def prepare(self, *, visible: list[str], host: str) -> None:
        """Show this rank all GPUs that the trial has on its node, and the interface that it talks through.

        One-GPU masks keep NCCL from finding the fast links between GPUs
        (https://github.com/ray-project/ray/issues/61073); the mask counts only before torch is imported.
        """
        assert "torch" not in sys.modules, "GPU visibility must be set before torch is imported"
        if visible:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible)
        os.environ.update(interface_settings(address=host))

    def run(self, task: TrialTask, *, rank: int, world_size: int, local_rank: int, init_method: str) -> Iterator[dict[str, Any]]:
        """Compute this rank's part of the trial; only rank 0 yields metrics."""
        from launcher.logs import capture_output, quiet_libraries
        from launcher.stop_signs import signs_read
        from launcher.trial import run_trial
        from launcher.trial_home import arrived, carried
        from launcher.tune_trial import set_threads
        from trainers.distributed import Rank

        task = arrived(task)
        with capture_output(task.folder / "logs" / f"rank-{rank}.log"), signs_read(task.run, trial=task.name):
            quiet_libraries()
            set_threads(task)
            for metrics in carried(task, run_trial(task, rank=Rank(rank, world_size, local_rank, init_method)), leads=rank == 0):
                if rank == 0:
                    yield metrics


def run_gang(task: TrialTask, *, ranks: int, stall_s: float) -> Iterator[dict[str, Any]]:
    """Start the ranks in the bundles of the current placement group and yield rank 0's metrics.

    Bad input that any rank meets is recorded as the trial's failure and not raised: another start would meet it again.

    Raises:
        OutOfMemory: if a rank's GPU has no memory left.
        Preempted: if a rank's machine is lost.
        RunError: if a rank dies or nothing is heard for ``stall_s`` seconds, or for longer before the first step.
        Exception: what a rank failed with, in any other case.
    """
    import ray

    actors = _start_actors(ranks)
    places: list[Place] = []
    streams: list[Any] = []
    try:
        places = _find_places(actors, task=task, patience_s=max(stall_s, FIRST_SIGN_S))
        streams = _start_ranks(actors, places=places, task=task, patience_s=max(stall_s, FIRST_SIGN_S))
        yield from _relay(streams, task=task, stall_s=stall_s)
        return
    except ray.exceptions.RayError as error:
        failures = [error, *_other_failures(streams)]
    finally:
        _end_ranks(actors, places)
    _explain(failures, places=places, task=task)


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


def _find_places(actors: list[Any], *, task: TrialTask, patience_s: float) -> list[Place]:
    """Where the ranks run, which the trial's status keeps behind the machine that leads them."""
    import ray

    try:
        places: list[Place] = ray.get([actor.place.remote() for actor in actors], timeout=patience_s)
    except ray.exceptions.GetTimeoutError:
        raise _nothing_heard(task, patience_s) from None
    write_status(task.folder, nodes=[ray.get_runtime_context().get_node_id(), *(place.node for place in places)])
    bring_trial(task.run, task.name)
    return places


def _start_ranks(actors: list[Any], *, places: list[Place], task: TrialTask, patience_s: float) -> list[Any]:
    import ray

    visible: dict[str, list[str]] = {}
    local_ranks: list[int] = []
    for place in places:
        local_ranks.append(sum(other.node == place.node for other in places[: len(local_ranks)]))
        visible.setdefault(place.node, []).extend(place.gpus)
    ready = [actor.prepare.remote(visible=visible[place.node], host=place.host) for actor, place in zip(actors, places, strict=True)]
    try:
        ray.get(ready, timeout=patience_s)
    except ray.exceptions.GetTimeoutError:
        raise _nothing_heard(task, patience_s) from None
    init_method = f"tcp://{places[0].host}:{places[0].port}"
    return [
        actor.run.options(num_returns="streaming").remote(
            departing(task), rank=rank, world_size=len(actors), local_rank=local_ranks[rank], init_method=init_method
        )
        for rank, actor in enumerate(actors)
    ]


def _relay(streams: list[Any], *, task: TrialTask, stall_s: float) -> Iterator[dict[str, Any]]:
    import ray

    leader: Any = streams[0]
    followers: dict[Any, Any] = {stream.completed(): stream for stream in streams[1:]}
    patience: float | None = max(stall_s, FIRST_SIGN_S)
    while True:
        ready, _ = ray.wait([leader, *followers], num_returns=1, timeout=patience)
        if not ready:
            raise _nothing_heard(task, patience or stall_s)
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
            if failure := _failure(followers.pop(ready[0]), end=ready[0]):
                raise failure


def _nothing_heard(task: TrialTask, stall_s: float) -> RunError:
    return RunError(
        f"no sign of life for {stall_s:g} s (sweep.stall_s)", where=str(task.folder / "logs"), fix="see what its ranks did last"
    )


def _other_failures(streams: list[Any]) -> list[Exception]:
    """What the ranks that have ended by now, or do so soon, failed with: one that fails takes the others with it."""
    import ray

    ends = {stream.completed(): stream for stream in streams}
    if not ends:
        return []
    ready, _ = ray.wait(list(ends), num_returns=len(ends), timeout=OTHERS_S)
    return [failure for end in ready if (failure := _failure(ends[end], end=end))]


def _failure(stream: Any, *, end: Any) -> Exception | None:
    """What a rank that has ended failed with: Ray raises a process's death at the end of its stream, its own errors as the last item."""
    import ray

    try:
        ray.get(end)
        for reference in stream:
            ray.get(reference)
    except ray.exceptions.RayError as error:
        return error
    return None


def _end_ranks(actors: list[Any], places: Sequence[Place]) -> None:
    """End every rank and wait until its process is gone; on another machine that is lost, its processes are, too."""
    import ray

    from launcher.nodes import Node, ask_nodes

    for actor in actors:
        ray.kill(actor)
    here = ray.get_runtime_context().get_node_id()
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]} - {here}
    nodes = [Node(node_id[:8], node_id, cpus=0, gpus=0) for node_id in sorted({place.node for place in places} & alive)]
    ask_nodes(_end_here, places, nodes=nodes, timeout_s=3 * END_S)
    if killed := _end_here(places):
        log.warning("%d ranks did not end when they were told to, and were killed", killed)


def _end_here(places: Sequence[Place]) -> int:
    import ray

    here = ray.get_runtime_context().get_node_id()
    return end_processes([place.process for place in places if place.node == here], patience_s=END_S)


def _explain(failures: Sequence[Exception], *, places: Sequence[Place], task: TrialTask) -> None:
    """Raise, or record, why the gang ended."""
    import ray

    if settled(read_status(task.folder)):
        return None
    causes = [getattr(failure, "cause", None) for failure in failures]
    for kind in (OutOfMemory, InputError, SetupError, UserFacingError):
        for cause in causes:
            if isinstance(cause, kind):
                if isinstance(cause, InputError | SetupError):
                    return fail_for_good(task.folder, error=cause)
                raise cause
    # The first that is heard of a lost machine may be the complaint of a rank elsewhere, whose connection broke.
    if lost_nodes([place.node for place in places]):
        raise machine_lost() from failures[0]
    if any(isinstance(failure, ray.exceptions.RayActorError) for failure in failures):
        raise RunError("the process of a rank died", where=str(task.folder / "logs")) from failures[0]
    raise next(filter(None, causes), failures[0])

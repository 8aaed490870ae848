"""How many trials run at once, and what each of them gets: a pure function of nodes and configuration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from launcher.config import SweepConfig
from launcher.nodes import Node
from trainers.config import TrainConfig
from trainers.errors import InputError

DRIVER_CPUS = 0.01
"""What the process that starts a trial's ranks reserves; it comes out of the first rank's share."""
Strategy = Literal["STRICT_PACK", "PACK"]


@dataclass(frozen=True)
class ResourcePlan:
    """What one trial reserves, and how many trials fit at once."""

    ranks: int
    cpus_per_trial: float
    gpus_per_trial: float
    concurrent: int
    why: str
    """One sentence for the plan that is printed."""
    strategy: Strategy = "STRICT_PACK"
    """How Ray places a trial's bundles: all on one node where a node has room for them, else on as few nodes as it can."""

    @property
    def bundles(self) -> list[dict[str, float]]:
        """A placement group's bundles: one for a trial of one rank; else a thin driver and one per rank."""
        cpus, gpus = self.cpus_per_trial / self.ranks, self.gpus_per_trial / self.ranks
        rank = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
        if self.ranks == 1:
            return [rank]
        driver = min(DRIVER_CPUS, cpus / 2)
        return [{"CPU": driver}, rank | {"CPU": cpus - driver}, *(dict(rank) for _ in range(self.ranks - 1))]


def gpus_per_rank(sweep: SweepConfig, *, nodes: Sequence[Node]) -> float:
    """GPUs that a rank reserves: as configured, else one where any node has GPUs."""
    if sweep.gpus_per_rank is not None:
        return sweep.gpus_per_rank
    return 1.0 if any(node.gpus > 0 for node in nodes) else 0.0


def plan_resources(*, nodes: Sequence[Node], sweep: SweepConfig, train: TrainConfig, num_trials: int | None = None) -> ResourcePlan:
    """Place trials on a machine or cluster.

    A trial lies on one node if any node has room for all of its ranks, and then only such nodes count; else its ranks are spread.

    Args:
        nodes: what may be reserved.
        sweep: what each rank reserves, and the limit on trials at once.
        train: the trial; its engine says how many ranks share it.
        num_trials: trials to run; null takes ``sweep.num_trials``.

    Raises:
        InputError: if a trial can never fit.
    """
    ranks, cpus, gpus = train.engine.num_ranks, sweep.cpus_per_rank, gpus_per_rank(sweep, nodes=nodes)
    all_cpus, all_gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    cpus_per_trial, gpus_per_trial = ranks * cpus, ranks * gpus
    if _exceeds(gpus_per_trial, all_gpus):
        raise _never_fits("GPU", need=gpus_per_trial, have=all_gpus, ranks=ranks, per_rank=gpus, key="sweep.gpus_per_rank")
    if _exceeds(cpus_per_trial, all_cpus):
        raise _never_fits("CPU core", need=cpus_per_trial, have=all_cpus, ranks=ranks, per_rank=cpus, key="sweep.cpus_per_rank")
    packed = any(_room(node, cpus=cpus, gpus=gpus) >= ranks for node in nodes)

    def together(*, cpus: float, gpus: float) -> int:
        return _trials_at_once([_room(node, cpus=cpus, gpus=gpus) for node in nodes], ranks=ranks, packed=packed)

    fits = together(cpus=cpus, gpus=gpus)
    if not fits:
        raise _no_room(nodes, ranks=ranks, cpus=cpus, gpus=gpus)
    on = f" on {len(nodes)} nodes" if len(nodes) > 1 else ""
    limits: dict[str, float] = {f"{all_cpus:g} CPU cores{on}": together(cpus=cpus, gpus=0)}
    if gpus > 0:
        limits[f"{all_gpus:g} GPUs{on}"] = together(cpus=0, gpus=gpus)
    if fits < min(limits.values()):
        limits[f"the CPU cores beside the GPUs{on}"] = fits
    if sweep.max_concurrent is not None:
        limits["sweep.max_concurrent"] = sweep.max_concurrent
    limits["the number of trials"] = num_trials if num_trials is not None else sweep.num_trials
    name, concurrent = min(limits.items(), key=lambda item: item[1])
    each = f"{cpus_per_trial:g} CPU cores" + (f" and {gpus_per_trial:g} GPUs" if gpus_per_trial else "")
    spread = "" if packed else ", spread over nodes"
    return ResourcePlan(
        ranks=ranks,
        cpus_per_trial=cpus_per_trial,
        gpus_per_trial=gpus_per_trial,
        concurrent=int(concurrent),
        why=f"{concurrent} at a time, limited by {name}; each has {ranks} rank{'s' if ranks > 1 else ''} with {each} in all{spread}",
        strategy="STRICT_PACK" if packed else "PACK",
    )


def _room(node: Node, *, cpus: float, gpus: float) -> float:
    """Ranks for which a node has room. A rank that takes a part of a GPU takes it of one GPU."""
    by_cpus = _fits(cpus, node.cpus) if cpus > 0 else math.inf
    by_gpus = math.floor(node.gpus) * _fits(gpus, 1) if gpus > 0 else math.inf
    return min(by_cpus, by_gpus)


def _trials_at_once(rooms: Sequence[float], *, ranks: int, packed: bool) -> int:
    """Trials of so many ranks that nodes with room for so many ranks hold: each on one node, or the ranks wherever there is room."""
    return int(sum(room // ranks for room in rooms) if packed else sum(rooms) // ranks)


def _fits(need: float, have: float) -> int:
    # 0.1 * 3 is a little more than 0.3: a rounding error must not cost a trial.
    return math.floor(have / need + 1e-9)


def _exceeds(need: float, have: float) -> bool:
    return need > have * (1 + 1e-9)


def _no_room(nodes: Sequence[Node], *, ranks: int, cpus: float, gpus: float) -> InputError:
    rank = f"{cpus:g} CPU cores" + (f" and {gpus:g} of a GPU" if 0 < gpus < 1 else " and a GPU" if gpus else "")
    room = int(sum(_room(node, cpus=cpus, gpus=gpus) for node in nodes))
    have = "; ".join(f"{node.name} has {node.cpus:g} CPU cores and {node.gpus:g} GPUs" for node in nodes[:4])
    return InputError(
        f"a trial has {ranks} rank{'s' if ranks > 1 else ''} of {rank}, but the nodes have room for {room}: it can never start",
        where="sweep.cpus_per_rank",
        why=have + ("; ..." if len(nodes) > 4 else ""),
        fix="lower sweep.cpus_per_rank or train.engine.ranks, or use larger nodes",
    )


def _never_fits(what: str, *, need: float, have: float, ranks: int, per_rank: float, key: str) -> InputError:
    fixes = []
    if what == "CPU core" and have > 0:
        fixes.append(f"set {key}: {math.floor(have / ranks * 100) / 100:g}")
    if ranks > 1 and have >= per_rank:
        fixes.append(f"set train.engine.ranks: {_fits(per_rank, have)}")
    if what == "GPU" and have == 0:
        fixes.append(f"set {key}: 0 to compute on the CPU")
    fixes.append(f"use a machine with more {what}s")
    if what == "GPU" and have == 0:
        fixes.append("plan for one from here: unlearn validate CONFIG --gpus-per-node N --gpu-memory GIB")
    return InputError(
        f"a trial needs {need:g} {what}{'s' if need != 1 else ''} (train.engine.ranks = {ranks} times {key} = {per_rank:g}), "
        f"but there are {have:g}: it can never start",
        where=key,
        fix=", or ".join(fixes),
    )

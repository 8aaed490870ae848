"""How many trials run at once, and what each of them gets: a pure function of machine and configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass

from launcher.config import SweepConfig
from trainers.config import TrainConfig
from trainers.errors import InputError

DRIVER_CPUS = 0.01
"""What the process that starts a trial's ranks reserves; it comes out of the first rank's share."""


@dataclass(frozen=True)
class ResourcePlan:
    """What one trial reserves, and how many trials fit at once."""

    ranks: int
    cpus_per_trial: float
    gpus_per_trial: float
    concurrent: int
    why: str
    """One sentence for the plan that is printed."""

    @property
    def bundles(self) -> list[dict[str, float]]:
        """A placement group's bundles: one for a trial of one rank; else a thin driver and one per rank."""
        cpus, gpus = self.cpus_per_trial / self.ranks, self.gpus_per_trial / self.ranks
        rank = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
        if self.ranks == 1:
            return [rank]
        driver = min(DRIVER_CPUS, cpus / 2)
        return [{"CPU": driver}, rank | {"CPU": cpus - driver}, *(dict(rank) for _ in range(self.ranks - 1))]


def plan_resources(*, cpus: float, gpus: float, sweep: SweepConfig, train: TrainConfig, num_trials: int | None = None) -> ResourcePlan:
    """Place trials on a machine or cluster.

    Args:
        cpus: cores that may be reserved.
        gpus: GPUs that may be reserved.
        sweep: what each rank reserves, and the limit on trials at once.
        train: the trial; its engine says how many ranks share it.
        num_trials: trials to run; null takes ``sweep.num_trials``.

    Raises:
        InputError: if a trial can never fit.
    """
    ranks = train.engine.ranks
    gpus_per_rank = sweep.gpus_per_rank if sweep.gpus_per_rank is not None else (1.0 if gpus > 0 else 0.0)
    cpus_per_trial, gpus_per_trial = ranks * sweep.cpus_per_rank, ranks * gpus_per_rank
    if _exceeds(gpus_per_trial, gpus):
        raise _never_fits("GPU", need=gpus_per_trial, have=gpus, ranks=ranks, per_rank=gpus_per_rank, key="sweep.gpus_per_rank")
    if _exceeds(cpus_per_trial, cpus):
        raise _never_fits("CPU core", need=cpus_per_trial, have=cpus, ranks=ranks, per_rank=sweep.cpus_per_rank, key="sweep.cpus_per_rank")
    limits = {f"{cpus:g} CPU cores": _fits(cpus_per_trial, cpus)}
    if gpus_per_trial > 0:
        limits[f"{gpus:g} GPUs"] = _fits(gpus_per_trial, gpus)
    if sweep.max_concurrent is not None:
        limits["sweep.max_concurrent"] = sweep.max_concurrent
    limits["the number of trials"] = num_trials if num_trials is not None else sweep.num_trials
    name, concurrent = min(limits.items(), key=lambda item: item[1])
    each = f"{cpus_per_trial:g} CPU cores" + (f" and {gpus_per_trial:g} GPUs" if gpus_per_trial else "")
    why = f"{concurrent} at a time, limited by {name}; each has {ranks} rank{'s' if ranks > 1 else ''} with {each} in all"
    return ResourcePlan(ranks=ranks, cpus_per_trial=cpus_per_trial, gpus_per_trial=gpus_per_trial, concurrent=concurrent, why=why)


def _fits(need: float, have: float) -> int:
    # 0.1 * 3 is a little more than 0.3: a rounding error must not cost a trial.
    return math.floor(have / need + 1e-9)


def _exceeds(need: float, have: float) -> bool:
    return need > have * (1 + 1e-9)


def _never_fits(what: str, *, need: float, have: float, ranks: int, per_rank: float, key: str) -> InputError:
    fixes = []
    if what == "CPU core" and have > 0:
        fixes.append(f"set {key}: {math.floor(have / ranks * 100) / 100:g}")
    if ranks > 1 and have >= per_rank:
        fixes.append(f"set train.engine.ranks: {_fits(per_rank, have)}")
    if what == "GPU" and have == 0:
        fixes.append(f"set {key}: 0 to compute on the CPU")
    fixes.append(f"use a machine with more {what}s")
    return InputError(
        f"a trial needs {need:g} {what}{'s' if need != 1 else ''} (train.engine.ranks = {ranks} times {key} = {per_rank:g}), "
        f"but there are {have:g}: it can never start",
        where=key,
        fix=", or ".join(fixes),
    )

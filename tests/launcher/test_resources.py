"""Placing trials on nodes."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.config import SweepConfig
from launcher.nodes import Node
from launcher.resources import ResourcePlan, plan_resources
from trainers.config import EngineConfig, TrainConfig
from trainers.errors import InputError


def plan(*nodes: tuple[float, float], ranks: int = 1, num_trials: int = 8, **sweep: Any) -> ResourcePlan:
    """A plan for nodes of so many cores and GPUs."""
    train = TrainConfig(engine=EngineConfig(ranks=ranks), train_batch_size=64)
    found = [Node(f"node-{index}", "", cpus=cpus, gpus=gpus) for index, (cpus, gpus) in enumerate(nodes)]
    return plan_resources(nodes=found, sweep=SweepConfig(num_trials=num_trials, **sweep), train=train)


# ---- one machine


@pytest.mark.parametrize(
    ("machine", "ranks", "sweep", "concurrent", "reason"),
    [
        ((2, 0), 1, {}, 2, "2 CPU cores"),
        ((2, 0), 2, {}, 1, "2 CPU cores"),
        ((16, 8), 1, {"cpus_per_rank": 1}, 8, "8 GPUs"),
        ((16, 8), 1, {"cpus_per_rank": 4}, 4, "16 CPU cores"),
        ((64, 8), 2, {}, 4, "8 GPUs"),
        ((64, 1), 1, {"gpus_per_rank": 0.25}, 4, "1 GPUs"),
        ((64, 8), 1, {"max_concurrent": 3}, 3, "sweep.max_concurrent"),
        ((64, 0), 1, {"num_trials": 5}, 5, "the number of trials"),
        ((2, 0), 1, {"gpus_per_rank": 0}, 2, "2 CPU cores"),
        ((4, 2), 1, {"gpus_per_rank": 0}, 4, "4 CPU cores"),
        ((1, 0), 1, {"cpus_per_rank": 0.1}, 8, "the number of trials"),
    ],
)
def test_as_many_trials_as_the_scarcest_resource_allows(
    machine: tuple[float, float], ranks: int, sweep: dict, concurrent: int, reason: str
) -> None:
    result = plan(machine, ranks=ranks, **sweep)
    assert result.concurrent == concurrent
    assert f"limited by {reason};" in result.why


def test_rounding_does_not_cost_a_trial() -> None:
    """3 * 0.1 is 0.30000000000000004 in floating point: three ranks of 0.1 cores fit into 0.3 cores."""
    assert plan((0.3, 0), ranks=3, cpus_per_rank=0.1).concurrent == 1


def test_a_trial_takes_a_gpu_per_rank_where_there_are_gpus() -> None:
    assert plan((8, 4), ranks=2).gpus_per_trial == 2
    assert plan((8, 0), ranks=2).gpus_per_trial == 0


def test_a_part_of_a_gpu_is_a_part_of_one_gpu() -> None:
    """Two GPUs hold 5 times 0.4 of a GPU in sum, but each of them holds two."""
    assert plan((64, 2), gpus_per_rank=0.4).concurrent == 4


@pytest.mark.parametrize(
    ("machine", "ranks", "sweep", "parts"),
    [
        ((2, 0), 4, {}, ["4 CPU cores", "train.engine.ranks = 4", "there are 2", "sweep.cpus_per_rank: 0.5", "ranks: 2"]),
        ((2, 0), 1, {"cpus_per_rank": 3}, ["3 CPU cores", "sweep.cpus_per_rank: 2"]),
        ((64, 4), 8, {}, ["8 GPUs", "train.engine.ranks: 4", "a machine with more GPUs"]),
        ((64, 0), 1, {"gpus_per_rank": 1}, ["1 GPU ", "there are 0", "sweep.gpus_per_rank: 0 to compute on the CPU"]),
    ],
)
def test_a_trial_that_can_never_fit_is_refused_with_what_to_change(
    machine: tuple[float, float], ranks: int, sweep: dict, parts: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        plan(machine, ranks=ranks, **sweep)
    for part in [*parts, "it can never start"]:
        assert part in str(caught.value)


@given(
    ranks=st.integers(1, 8),
    cpus_per_rank=st.floats(0.001, 16),
    gpus_per_rank=st.sampled_from([0.0, 0.5, 1.0]),
    cpus=st.floats(0.1, 512),
    gpus=st.integers(0, 64),
)
def test_what_is_planned_fits_and_one_more_would_not(
    ranks: int, cpus_per_rank: float, gpus_per_rank: float, cpus: float, gpus: int
) -> None:
    try:
        result = plan((cpus, gpus), ranks=ranks, num_trials=10**9, cpus_per_rank=cpus_per_rank, gpus_per_rank=gpus_per_rank)
    except InputError:
        assert ranks * cpus_per_rank > cpus or ranks * gpus_per_rank > gpus
        return
    assert result.concurrent >= 1
    assert result.concurrent * result.cpus_per_trial <= cpus * 1.000001 + 1e-6
    assert result.concurrent * result.gpus_per_trial <= gpus + 1e-6
    more = result.concurrent + 1
    assert more * result.cpus_per_trial > cpus or more * result.gpus_per_trial > gpus
    # The bundles reserve exactly what was planned, the driver of several ranks included.
    assert len(result.bundles) == (1 if ranks == 1 else ranks + 1)
    assert sum(bundle["CPU"] for bundle in result.bundles) == pytest.approx(result.cpus_per_trial)
    assert sum(bundle.get("GPU", 0) for bundle in result.bundles) == pytest.approx(result.gpus_per_trial)
    assert all(bundle["CPU"] > 0 for bundle in result.bundles)


# ---- several nodes


@pytest.mark.parametrize(
    ("nodes", "ranks", "sweep", "concurrent", "strategy"),
    [
        # four GPUs of six: one trial per node, although twelve GPUs would hold three
        ([(64, 6), (64, 6)], 4, {}, 2, "STRICT_PACK"),
        ([(64, 6), (64, 6)], 1, {"num_trials": 99}, 12, "STRICT_PACK"),
        # no node has eight GPUs: two of them hold one trial, four of them two
        ([(64, 4), (64, 4)], 8, {}, 1, "PACK"),
        ([(64, 4)] * 5, 8, {}, 2, "PACK"),
        # a trial that fits on one node stays on one, although the small ones together would hold another
        ([(64, 8), (64, 4), (64, 4)], 8, {}, 1, "STRICT_PACK"),
        # a head without GPUs holds no rank, and its cores are of no use to the others
        ([(64, 0), (4, 8)], 1, {"num_trials": 99}, 4, "STRICT_PACK"),
        ([(2, 0), (2, 0)], 3, {}, 1, "PACK"),
        ([(2, 0), (2, 0)], 2, {}, 2, "STRICT_PACK"),
    ],
)
def test_a_trial_lies_on_one_node_where_it_fits_there(
    nodes: list[tuple[float, float]], ranks: int, sweep: dict, concurrent: int, strategy: str
) -> None:
    result = plan(*nodes, ranks=ranks, **sweep)
    assert (result.concurrent, result.strategy) == (concurrent, strategy)
    assert ("spread over nodes" in result.why) == (strategy == "PACK")


def test_the_limit_is_named_for_all_nodes() -> None:
    assert "limited by 12 GPUs on 2 nodes;" in plan((64, 6), (64, 6), ranks=4).why
    # By GPUs alone there is room for 8, by cores alone for 68.
    assert "limited by the CPU cores beside the GPUs on 2 nodes;" in plan((64, 0), (4, 8), num_trials=99).why


def test_ranks_that_are_larger_than_every_node_are_refused() -> None:
    with pytest.raises(InputError, match="the nodes have room for 0: it can never start"):
        plan((4, 0), (4, 0), cpus_per_rank=6)


@cache
def most_trials(rooms: tuple[int, ...], ranks: int, packed: bool) -> int:
    """Trials that fit, found by trying every way to place one more."""
    best = 0
    if packed:
        for index, room in enumerate(rooms):
            if room >= ranks:
                left = (*rooms[:index], room - ranks, *rooms[index + 1 :])
                best = max(best, 1 + most_trials(tuple(sorted(left)), ranks, packed))
        return best
    for left in placements(rooms, ranks):
        best = max(best, 1 + most_trials(tuple(sorted(left)), ranks, packed))
    return best


def placements(rooms: tuple[int, ...], ranks: int) -> list[tuple[int, ...]]:
    """What is left after one trial, for every way to spread its ranks."""
    if not rooms:
        return [()] if ranks == 0 else []
    return [(rooms[0] - here, *rest) for here in range(min(rooms[0], ranks) + 1) for rest in placements(rooms[1:], ranks - here)]


@given(
    gpus=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    cores=st.lists(st.integers(0, 8), min_size=3, max_size=3),
    ranks=st.integers(1, 9),
)
@settings(max_examples=150, deadline=None)
def test_no_other_placement_holds_more(gpus: list[int], cores: list[int], ranks: int) -> None:
    """Against every placement there is: whole trials on single nodes if any node holds one, else ranks anywhere."""
    nodes = list(zip(cores, gpus, strict=False))
    rooms = tuple(sorted(min(pair) for pair in nodes))
    packed = max(rooms) >= ranks
    expected = most_trials(rooms, ranks, packed)
    try:
        result = plan(*nodes, ranks=ranks, num_trials=999, gpus_per_rank=1)
    except InputError:
        assert expected == 0
        return
    assert result.concurrent == expected
    assert result.strategy == ("STRICT_PACK" if packed else "PACK")

"""Placing trials on a machine."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.config import SweepConfig
from launcher.resources import ResourcePlan, plan_resources
from trainers.config import EngineConfig, TrainConfig
from trainers.errors import InputError


def plan(*, cpus: float, gpus: float = 0, ranks: int = 1, num_trials: int = 8, **sweep: Any) -> ResourcePlan:
    train = TrainConfig(engine=EngineConfig(ranks=ranks), train_batch_size=64)
    return plan_resources(cpus=cpus, gpus=gpus, sweep=SweepConfig(num_trials=num_trials, **sweep), train=train)


@pytest.mark.parametrize(
    ("machine", "sweep", "concurrent", "reason"),
    [
        ({"cpus": 2}, {}, 2, "2 CPU cores"),
        ({"cpus": 2, "ranks": 2}, {}, 1, "2 CPU cores"),
        ({"cpus": 16, "gpus": 8}, {"cpus_per_rank": 1}, 8, "8 GPUs"),
        ({"cpus": 16, "gpus": 8}, {"cpus_per_rank": 4}, 4, "16 CPU cores"),
        ({"cpus": 64, "gpus": 8, "ranks": 2}, {}, 4, "8 GPUs"),
        ({"cpus": 64, "gpus": 1}, {"gpus_per_rank": 0.25}, 4, "1 GPUs"),
        ({"cpus": 64, "gpus": 8}, {"max_concurrent": 3}, 3, "sweep.max_concurrent"),
        ({"cpus": 64}, {"num_trials": 5}, 5, "the number of trials"),
        ({"cpus": 2, "gpus": 0}, {"gpus_per_rank": 0}, 2, "2 CPU cores"),
        ({"cpus": 4, "gpus": 2}, {"gpus_per_rank": 0}, 4, "4 CPU cores"),
        ({"cpus": 1}, {"cpus_per_rank": 0.1}, 8, "the number of trials"),
    ],
)
def test_as_many_trials_as_the_scarcest_resource_allows(machine: dict, sweep: dict, concurrent: int, reason: str) -> None:
    result = plan(**machine, **sweep)
    assert result.concurrent == concurrent
    assert f"limited by {reason};" in result.why


def test_rounding_does_not_cost_a_trial() -> None:
    """3 * 0.1 is 0.30000000000000004 in floating point: three ranks of 0.1 cores fit into 0.3 cores."""
    assert plan(cpus=0.3, ranks=3, cpus_per_rank=0.1).concurrent == 1


def test_a_trial_takes_a_gpu_per_rank_where_there_are_gpus() -> None:
    assert plan(cpus=8, gpus=4, ranks=2).gpus_per_trial == 2
    assert plan(cpus=8, gpus=0, ranks=2).gpus_per_trial == 0


@pytest.mark.parametrize(
    ("machine", "sweep", "parts"),
    [
        ({"cpus": 2, "ranks": 4}, {}, ["4 CPU cores", "train.engine.ranks = 4", "there are 2", "sweep.cpus_per_rank: 0.5", "ranks: 2"]),
        ({"cpus": 2}, {"cpus_per_rank": 3}, ["3 CPU cores", "sweep.cpus_per_rank: 2"]),
        ({"cpus": 64, "gpus": 4, "ranks": 8}, {}, ["8 GPUs", "train.engine.ranks: 4", "a machine with more GPUs"]),
        ({"cpus": 64}, {"gpus_per_rank": 1}, ["1 GPU ", "there are 0", "sweep.gpus_per_rank: 0 to compute on the CPU"]),
    ],
)
def test_a_trial_that_can_never_fit_is_refused_with_what_to_change(machine: dict, sweep: dict, parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        plan(**machine, **sweep)
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
        result = plan(cpus=cpus, gpus=gpus, ranks=ranks, num_trials=10**9, cpus_per_rank=cpus_per_rank, gpus_per_rank=gpus_per_rank)
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

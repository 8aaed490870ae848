"""Order and hours of a sweep."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.cost import ASSUMED_UTILISATION, gpu_time, makespan, order_longest_first, peak_flops
from launcher.search_space import TrialSpec
from trainers.config import TrainConfig


def specs(*epochs: float) -> list[TrialSpec]:
    return [TrialSpec(f"trial-{index:02d}", {}, TrainConfig(num_train_epochs=number)) for index, number in enumerate(epochs)]


def test_the_longest_trial_starts_first_and_equals_keep_their_order() -> None:
    ordered = order_longest_first(specs(2, 5, 2, 7), cost=lambda train: train.num_train_epochs)
    assert [spec.name for spec in ordered] == ["trial-03", "trial-01", "trial-00", "trial-02"]


def test_a_trial_starts_as_soon_as_a_place_is_free() -> None:
    """3 and 3 until 3, then 4 alone: 7. Longest first 4 and 3, then 3: 6."""
    assert makespan([3, 3, 4], slots=2) == 7
    assert makespan([4, 3, 3], slots=2) == 6
    assert makespan([3, 3, 4], slots=1) == 10
    assert makespan([], slots=4) == 0


@given(costs=st.lists(st.integers(1, 9), min_size=1, max_size=6), slots=st.integers(1, 3))
def test_longest_first_is_within_four_thirds_of_the_best_assignment(costs: list[int], slots: int) -> None:
    """Against every assignment of trials to places. Source of the bound: Graham 1969, https://doi.org/10.1137/0117039"""
    best = min(
        max(sum(cost for cost, place in zip(costs, places, strict=True) if place == slot) for slot in range(slots))
        for places in itertools.product(range(slots), repeat=len(costs))
    )
    found = makespan(sorted(costs, reverse=True), slots=slots)
    assert best <= found <= best * (4 / 3 - 1 / (3 * slots)) + 1e-9


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("H100", 989),
        ("NVIDIA GeForce GTX 1080", None),
        ("NVIDIA L40", None),
        (None, None),
    ],
)
def test_the_speed_of_known_gpus_only(name: str | None, teraflops: float | None) -> None:
    assert peak_flops(name) == (None if teraflops is None else teraflops * 1e12)


def test_hours_follow_from_operations_and_an_assumed_speed() -> None:
    """Two trials of one hour each on two of four GPUs: four GPU-hours in one hour; one after the other in two."""
    hour = int(2 * ASSUMED_UTILISATION * 989e12 * 3600)
    together = gpu_time([hour, hour], gpus_per_trial=2, slots=2, gpu_names=["H100"])
    assert together is not None
    assert (together.gpu_hours, together.hours) == pytest.approx((4, 1))
    assert together.assumed == "20% of 989 TFLOP/s per GPU"
    in_turn = gpu_time([hour, hour], gpus_per_trial=2, slots=1, gpu_names=["H100"])
    assert in_turn is not None
    assert (in_turn.gpu_hours, in_turn.hours) == pytest.approx((4, 2))
    slowest = gpu_time([hour, hour], gpus_per_trial=2, slots=2, gpu_names=["H100", "NVIDIA A100-SXM4-80GB"])
    assert slowest is not None
    assert slowest.hours == pytest.approx(989 / 312)


@pytest.mark.parametrize(
    "change", [{"gpu_names": ["H100", None]}, {"gpu_names": []}, {"gpu_names": ["Voodoo"]}, {"dtype": "float32"}, {"gpus_per_trial": 0}]
)
def test_no_hours_are_invented(change: dict) -> None:
    arguments = {"gpus_per_trial": 1, "slots": 1, "gpu_names": ["H100"]} | change
    assert gpu_time([10**15], **arguments) is None

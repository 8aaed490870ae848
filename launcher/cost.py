"""What trials cost: which of them is longest, and how long a sweep takes where the speed of its GPUs is known."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from launcher.search_space import TrialSpec
from trainers.config import TrainConfig

PEAK_FLOPS: Mapping[str, float] = {
    "H200": 989e12,
    "H100 PCIE": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}
"""Dense bfloat16 operations per second by the makers' data sheets; the first name whose words a GPU's name contains counts."""
ASSUMED_UTILISATION = 0.2
"""Share of the peak that training reaches: 0.15 to 0.23 was measured for adapters and whole models of 1B and 7B on an H200
(benchmarks/results/gpu_step_nvidia-h200_202611.md)."""


@dataclass(frozen=True)
class GpuTime:
    """How long a sweep trains, under an assumption.

    Args:
        gpu_hours: of all GPUs together.
        hours: until the last trial ends.
        assumed: the speed that is assumed, in words.
    """

    gpu_hours: float
    hours: float
    assumed: str


def order_longest_first(specs: Sequence[TrialSpec], *, cost: Callable[[TrainConfig], float]) -> tuple[TrialSpec, ...]:
    """The trials with the longest first, so that none of them is left over at the end; equally long ones keep their order."""
    return tuple(sorted(specs, key=lambda spec: -cost(spec.config)))


def makespan(costs: Sequence[float], *, slots: int) -> float:
    """When the last trial ends, if each starts, in this order, as soon as one of ``slots`` places is free; in the unit of the costs."""
    free = [0.0] * max(1, slots)
    for cost in costs:
        heapq.heappush(free, heapq.heappop(free) + cost)
    return max(free)


def peak_flops(gpu_name: str | None) -> float | None:
    """Operations per second of a GPU; None if it is not a known one."""
    words = (gpu_name or "").upper().replace("-", " ").split()
    return next((peak for name, peak in PEAK_FLOPS.items() if all(word in words for word in name.split())), None)


def gpu_time(
    flops: Sequence[int], *, gpus_per_trial: float, slots: int, gpu_names: Sequence[str | None], dtype: str = "bfloat16"
) -> GpuTime | None:
    """How long trials train; None where the speed of a GPU, or of its other dtypes, is not known.

    Args:
        flops: of each trial, in the order of their starts.
        gpus_per_trial: GPUs that share one.
        slots: trials at once.
        gpu_names: of the nodes' GPUs; the slowest counts.
        dtype: that the trials compute in.
    """
    peaks = [peak_flops(name) for name in gpu_names]
    known = [peak for peak in peaks if peak is not None]
    if not known or len(known) < len(peaks) or dtype != "bfloat16" or gpus_per_trial <= 0:
        return None
    speed = ASSUMED_UTILISATION * min(known) * gpus_per_trial
    seconds = [number / speed for number in flops]
    return GpuTime(
        gpu_hours=sum(seconds) * gpus_per_trial / 3600,
        hours=makespan(seconds, slots=slots) / 3600,
        assumed=f"{ASSUMED_UTILISATION:.0%} of {min(known) / 1e12:.0f} TFLOP/s per GPU",
    )

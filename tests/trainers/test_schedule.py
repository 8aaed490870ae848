"""The learning rate of every step, worked by hand."""

from __future__ import annotations

import math

import pytest

from trainers.config import TrainConfig
from trainers.schedule import learning_rate


def rates(*, num_steps: int, **changes) -> list[float]:
    train = TrainConfig(**{"learning_rate": 1.0, **changes})
    return [learning_rate(train, step=step, num_steps=num_steps) for step in range(1, num_steps + 1)]


@pytest.mark.parametrize(
    ("changes", "num_steps", "expected"),
    [
        ({"lr_scheduler_type": "constant"}, 3, [1, 1, 1]),
        # Without warm-up the first step has the full rate; the last is one step away from zero.
        ({"lr_scheduler_type": "linear"}, 4, [1, 3 / 4, 2 / 4, 1 / 4]),
        ({"lr_scheduler_type": "linear"}, 1, [1]),
        # 0.4 * 5 = 2 steps of warm-up, then 3 steps down.
        ({"lr_scheduler_type": "linear", "warmup_ratio": 0.4}, 5, [1 / 2, 1, 1, 2 / 3, 1 / 3]),
        ({"lr_scheduler_type": "constant", "warmup_ratio": 0.5}, 4, [1 / 2, 1, 1, 1]),
        # Half a cosine over 4 steps: (1 - cos(pi s)) / 2 at s = 1, 3/4, 1/2, 1/4.
        (
            {"lr_scheduler_type": "cosine"},
            4,
            [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2],
        ),
        ({"lr_scheduler_type": "linear", "warmup_ratio": 1.0}, 4, [1 / 4, 2 / 4, 3 / 4, 1]),
        # A warm-up of less than half a step is none.
        ({"lr_scheduler_type": "linear", "warmup_ratio": 0.1}, 4, [1, 3 / 4, 2 / 4, 1 / 4]),
    ],
    ids=str,
)
def test_rates_of_all_steps(changes: dict, num_steps: int, expected: list[float]) -> None:
    assert rates(num_steps=num_steps, **changes) == pytest.approx(expected, abs=1e-12)


def test_the_rate_is_proportional_to_the_configured_one() -> None:
    changes = {"lr_scheduler_type": "cosine", "warmup_ratio": 0.3}
    expected = [3e-4 * rate for rate in rates(num_steps=10, **changes)]
    assert rates(num_steps=10, learning_rate=3e-4, **changes) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_the_rate_is_positive_never_above_its_peak_and_falls_after_warm_up(kind: str) -> None:
    values = rates(num_steps=40, lr_scheduler_type=kind, warmup_ratio=0.25)
    assert min(values) > 0
    assert max(values) == 1.0
    assert values[:10] == sorted(values[:10])
    assert values[10:] == sorted(values[10:], reverse=True)

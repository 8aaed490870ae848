"""The learning rate of every step of a cycle, worked by hand."""

from __future__ import annotations

import math

import pytest

from trainers.config import TrainConfig
from trainers.plan import plan_trial
from trainers.schedule import learning_rate


def rates(*, cycle_steps: int, **changes) -> list[float]:
    train = TrainConfig(**{"learning_rate": 1.0, **changes})
    return [learning_rate(train, cycle_step=step, cycle_steps=cycle_steps) for step in range(1, cycle_steps + 1)]


@pytest.mark.parametrize(
    ("changes", "cycle_steps", "expected"),
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
def test_rates_of_all_steps(changes: dict, cycle_steps: int, expected: list[float]) -> None:
    assert rates(cycle_steps=cycle_steps, **changes) == pytest.approx(expected, abs=1e-12)


def test_the_rate_is_proportional_to_the_configured_one() -> None:
    changes = {"lr_scheduler_type": "cosine", "warmup_ratio": 0.3}
    expected = [3e-4 * rate for rate in rates(cycle_steps=10, **changes)]
    assert rates(cycle_steps=10, learning_rate=3e-4, **changes) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_the_rate_is_positive_never_above_its_peak_and_falls_after_warm_up(kind: str) -> None:
    values = rates(cycle_steps=40, lr_scheduler_type=kind, warmup_ratio=0.25)
    assert min(values) > 0
    assert max(values) == 1.0
    assert values[:10] == sorted(values[:10])
    assert values[10:] == sorted(values[10:], reverse=True)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # 5 forget rows, 1 per step: one descent over the whole trial.
        ({"name": "paired"}, [1, 4 / 5, 3 / 5, 2 / 5, 1 / 5]),
        # Chunks of 3 and 2 rows: a descent each.
        ({"name": "chunked", "chunk_size": 3}, [1, 2 / 3, 1 / 3, 1, 1 / 2]),
        # After each chunk a descent over half of the 2 retain rows, at the end one over both.
        ({"name": "alternating", "chunk_size": 3, "annealing_fraction": 0.5}, [1, 2 / 3, 1 / 3, 1, 1, 1 / 2, 1, 1, 1 / 2]),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_every_cycle_of_a_trial_starts_at_the_full_rate(schedule: dict, expected: list[float]) -> None:
    train = TrainConfig.model_validate(
        {"learning_rate": 1.0, "num_train_epochs": 1, "train_batch_size": 1, "schedule": schedule},
    )
    plans = plan_trial(train=train, num_forget=5, num_retain=2)
    actual = [learning_rate(train, cycle_step=plan.cycle_step, cycle_steps=plan.cycle_steps) for plan in plans]
    assert actual == pytest.approx(expected, abs=1e-12)

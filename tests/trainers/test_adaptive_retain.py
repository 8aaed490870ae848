"""The weight of retain cross-entropy that grows with what has been lost, worked by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.adaptive_retain import adaptive_retain_weight
from trainers.config import AdaptiveRetainConfig

PUBLISHED = AdaptiveRetainConfig()
LOSSES = st.lists(st.floats(0, 20), max_size=30)


def unclipped(**changes: float) -> AdaptiveRetainConfig:
    return AdaptiveRetainConfig(**{"lowest": 0, "highest": 1e12, **changes})


def test_the_defaults_are_the_papers() -> None:
    """clip(0.3 * 6 ** rise + 0.8, 1.2, 2.8), https://arxiv.org/abs/2504.12996."""
    assert PUBLISHED.model_dump() == {"scale": 0.3, "base": 6.0, "offset": 0.8, "lowest": 1.2, "highest": 2.8}


@pytest.mark.parametrize(
    ("rise", "expected"),
    [
        # 0.3 * 6 ** 0 + 0.8 = 1.1, below the lowest.
        (0.0, 1.2),
        (-3.0, 1.2),
        # 0.3 * sqrt(6) + 0.8.
        (0.5, 0.3 * math.sqrt(6) + 0.8),
        # 0.3 * 6 + 0.8 = 2.6.
        (1.0, 2.6),
        # 0.3 * 36 + 0.8 = 11.6, above the highest.
        (2.0, 2.8),
        # Where clipping ends and begins: 0.3 * 6 ** rise = 0.4 and 2.0.
        (math.log(4 / 3) / math.log(6), 1.2),
        (math.log(20 / 3) / math.log(6), 2.8),
    ],
)
def test_the_published_weight_of_a_rise(rise: float, expected: float) -> None:
    """A first epoch of two steps at 1 and 3 nats has mean 2; the last step stands ``rise`` above it."""
    actual = adaptive_retain_weight(PUBLISHED, history=[1.0, 3.0, 2.5, 2.0 + rise], steps_per_epoch=2)
    assert actual == pytest.approx(expected, abs=1e-12)


def test_rise_counts_as_zero_until_the_first_epoch_is_over() -> None:
    """Three steps per epoch: the weights of steps 1 to 3 see 0 to 2 earlier losses and ignore them; that of step 4 sees 9 - 4 = 5."""
    config = unclipped(scale=1, base=2, offset=0.5)
    losses = [1.0, 2.0, 9.0]
    weights = [adaptive_retain_weight(config, history=losses[:done], steps_per_epoch=3) for done in range(4)]
    assert weights == pytest.approx([1.5, 1.5, 1.5, 2**5 + 0.5], rel=1e-12)


def test_only_the_first_epoch_and_the_last_step_count() -> None:
    config = unclipped()
    expected = adaptive_retain_weight(config, history=[1.0, 2.0, 2.5], steps_per_epoch=2)
    assert adaptive_retain_weight(config, history=[1.0, 2.0, 7.0, 0.1, 2.5], steps_per_epoch=2) == expected
    assert adaptive_retain_weight(config, history=[1.0, 2.1, 2.5], steps_per_epoch=2) != expected
    assert adaptive_retain_weight(config, history=[1.0, 2.0, 2.6], steps_per_epoch=2) != expected


@settings(max_examples=100, deadline=None)
@given(history=LOSSES, steps_per_epoch=st.integers(1, 10), shift=st.floats(-5, 5))
def test_the_level_of_the_loss_does_not_matter(history: list[float], steps_per_epoch: int, shift: float) -> None:
    """Only the rise does: the same history a few nats higher gives the same weight."""
    expected = adaptive_retain_weight(PUBLISHED, history=history, steps_per_epoch=steps_per_epoch)
    actual = adaptive_retain_weight(PUBLISHED, history=[loss + shift for loss in history], steps_per_epoch=steps_per_epoch)
    assert actual == pytest.approx(expected, abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(history=st.lists(st.floats(0, 20), min_size=1, max_size=20), more=st.floats(0, 5), base=st.floats(1, 10))
def test_a_higher_last_loss_never_lowers_the_weight(history: list[float], more: float, base: float) -> None:
    config = unclipped(base=base)
    weight = adaptive_retain_weight(config, history=[1.0, *history], steps_per_epoch=1)
    assert adaptive_retain_weight(config, history=[1.0, *history[:-1], history[-1] + more], steps_per_epoch=1) >= weight


@settings(max_examples=100, deadline=None)
@given(
    history=st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=6),
    steps_per_epoch=st.integers(1, 4),
    base=st.floats(min_value=1e-300, max_value=1e300),
    scale=st.floats(min_value=0, max_value=1e300),
)
def test_the_weight_is_always_finite_and_within_its_bounds(history: list[float], steps_per_epoch: int, base: float, scale: float) -> None:
    config = AdaptiveRetainConfig(base=base, scale=scale)
    weight = adaptive_retain_weight(config, history=history, steps_per_epoch=steps_per_epoch)
    assert config.lowest <= weight <= config.highest


@pytest.mark.parametrize("last", [1e6, 1e308, math.inf, math.nan])
def test_a_loss_beyond_all_bounds_gives_the_highest_weight(last: float) -> None:
    """6 ** 1e6 overflows a float64, which Python reports as an error."""
    with pytest.raises(OverflowError):
        _ = 6.0**1e6
    assert adaptive_retain_weight(PUBLISHED, history=[1.0, last], steps_per_epoch=1) == 2.8


def test_without_scale_the_weight_is_constant() -> None:
    config = unclipped(scale=0, offset=0.7)
    assert {adaptive_retain_weight(config, history=[1.0, last], steps_per_epoch=1) for last in (0.0, 1.0, 50.0, 1e6)} == {0.7}


@pytest.mark.parametrize("steps_per_epoch", [0, -1])
def test_an_epoch_without_steps_is_refused(steps_per_epoch: int) -> None:
    with pytest.raises(ValueError, match="steps_per_epoch"):
        adaptive_retain_weight(PUBLISHED, history=[1.0], steps_per_epoch=steps_per_epoch)

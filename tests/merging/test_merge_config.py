"""Settings of merges and of the pair search that make no sense are refused with the reason."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from merging.config import MergeConfig, PairConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0}, "density"),
        ({"density": 1.4}, "density"),
        ({"scale": 0}, "scale"),
        ({"weights": ()}, "weights"),
        ({"weights": (1, 0)}, "weights"),
        ({"weights": (1, -1)}, "negative weights"),
        ({"method": "linear", "weights": (2, -1)}, "negative weights"),
        ({"densty": 0.5}, "densty"),
    ],
)
def test_a_merge_that_is_not_defined_is_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        MergeConfig(**settings)


def test_task_arithmetic_may_subtract():
    assert MergeConfig(method="task_arithmetic", weights=(1, -1)).trial_weights(2) == (1, -1)


def test_weights_must_match_the_trials_in_number():
    assert MergeConfig().trial_weights(3) == (1, 1, 1)
    with pytest.raises(ValueError, match="2 numbers for 3 trials"):
        MergeConfig(weights=(1, 1)).trial_weights(3)


@pytest.mark.parametrize("settings", [{"densities": (0.5, 1.5)}, {"densities": ()}, {"scale_bounds": (1.1, 1.5)}, {"scale_bounds": (0, 2)}])
def test_a_search_that_is_not_defined_is_refused(settings):
    with pytest.raises(ValidationError):
        PairConfig(**settings)


def test_the_formula_says_which_ties_runs():
    text = MergeConfig(density=0.2, scale=0.9, trim_scope="model", elect="weighted", divisor="weight", zero_sum="drop").formula()
    for part in ("0.9", "top 0.2 of the whole task vector", "sum(w_i * t_i)", "sum of weights", "no update"):
        assert part in text
    assert "trim" not in MergeConfig(method="linear").formula()

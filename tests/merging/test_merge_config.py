"""Settings of merges and of the pair search that make no sense are refused with the reason."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from merging.config import MergeConfig, PairConfig
from merging.methods.table import METHODS, PARAMETERS


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
        ({"method": "slerp", "weights": (2, -1)}, "negative weights"),
        ({"method": "dare-ties"}, "dare_ties"),
        ({"method": "della", "density": 0.9}, "keep probabilities"),
        ({"method": "della", "density": 0.1}, "keep probabilities"),
        ({"method": "breadcrumbs", "density": 0.9, "gamma": 0.2}, "more than 1"),
        ({"method": "breadcrumbs", "gamma": -0.1}, "gamma"),
        ({"method": "dare_ties", "zero_sum": "majority"}, "method = ties only"),
        ({"trim_count": "floor_plus_one"}, "trim_scope = model"),
        ({"equal_magnitudes": "topk", "trim_scope": "model"}, "trim_scope = tensor only"),
        ({"method": "dare_linear", "seed": -1}, "seed"),
        ({"method": "dare_linear", "rescale": "l2"}, "rescale"),
    ],
)
def test_a_merge_that_is_not_defined_is_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        MergeConfig(**settings)


@pytest.mark.parametrize("method", ["task_arithmetic", "magnitude_prune", "dare_linear", "breadcrumbs"])
def test_sums_may_subtract(method):
    assert MergeConfig(method=method, weights=(1, -1)).trial_weights(2) == (1, -1)


@pytest.mark.parametrize("method", list(METHODS))
def test_a_setting_that_the_method_does_not_read_is_refused_and_not_written_down(method):
    """Even with its default value, because it says something that is not so. What is written down can be read again."""
    values = {"density": 0.5, "trim_scope": "tensor", "trim_count": "floor", "equal_magnitudes": "topk", "elect": "weighted",
              "divisor": "weight", "zero_sum": "drop", "epsilon": 0.1, "gamma": 0.1, "rescale": "l1", "seed": 3}  # fmt: skip
    assert {*values, "convention"} == set(PARAMETERS)
    for name, value in values.items():
        if name in METHODS[method].reads:
            config = MergeConfig(method=method, **{name: value})
            assert config.reads(name)
            assert config.model_dump(mode="json")[name] == value
            assert MergeConfig(**config.model_dump(mode="json")) == config
        else:
            with pytest.raises(ValidationError, match=f"{name} = .*does not read it; it reads .*scale, weights"):
                MergeConfig(method=method, **{name: value})
            assert name not in MergeConfig(method=method).model_dump()
    assert set(MergeConfig(method=method).model_dump()) == {"method", "scale", "weights", *METHODS[method].reads}


@pytest.mark.parametrize(
    ("convention", "expected"),
    [
        ("paper", ("ties", "model", "floor_plus_one", "unweighted", "count", "majority")),
        ("peft-dense", ("ties", "tensor", "floor", "unweighted", "count", "positive")),
        ("mergekit", ("ties", "tensor", "floor", "weighted", "weight", "positive")),
        ("seed", ("seed", "tensor", "floor", "unweighted", "count", "positive")),
    ],
)
def test_a_convention_sets_everything_that_it_means_and_the_formula_names_it(convention, expected):
    names = ("method", "trim_scope", "trim_count", "elect", "divisor", "zero_sum")
    for given in ({}, {"method": "ties"}):
        config = MergeConfig(convention=convention, **given)
        assert tuple(getattr(config, name) for name in names) == expected
        assert MergeConfig(**config.model_dump(mode="json")) == config
        assert config.formula().endswith(f"convention {convention}")
    assert "convention" not in MergeConfig().formula()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"convention": "paper", "trim_scope": "tensor"}, "trim_scope = tensor contradicts convention = paper, which sets model"),
        ({"convention": "mergekit", "elect": "unweighted"}, "which sets weighted"),
        ({"convention": "peft-dense", "method": "dare_ties"}, "which sets ties"),
        ({"convention": "seed", "method": "linear"}, "which sets seed"),
        ({"convention": "seed", "elect": "weighted"}, "does not read it"),
        ({"convention": "papers"}, "convention"),
    ],
)
def test_what_contradicts_a_convention_is_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        MergeConfig(**settings)


def test_what_agrees_with_a_convention_is_not():
    assert MergeConfig(convention="mergekit", elect="weighted", density=0.3).divisor == "weight"


def test_slerp_merges_two_trials():
    assert MergeConfig(method="slerp").trial_weights(2) == (1, 1)
    with pytest.raises(ValueError, match="merges 2 trials, not 3"):
        MergeConfig(method="slerp").trial_weights(3)


@pytest.mark.parametrize("method", list(METHODS))
def test_every_formula_shows_the_values_that_decide(method):
    values = {"density": 0.37, "epsilon": 0.11, "gamma": 0.023, "seed": 567}
    chosen = {name: value for name, value in values.items() if name in METHODS[method].reads}
    text = MergeConfig(method=method, scale=1.7, weights=(2, 3), **chosen).formula()
    for value in (1.7, "[2.0, 3.0]", *chosen.values()):
        assert str(value) in text
    assert "{" not in text


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

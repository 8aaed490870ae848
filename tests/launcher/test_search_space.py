"""Drawing trials: seeded, prefix-stable, without repeats."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.search_space import Choice, Range, SearchSpace, draw_trials, flatten_overrides, trial_config, trial_seed
from trainers.config import TrainConfig
from trainers.errors import InputError

SPACE = SearchSpace(
    {"learning_rate": Range(1e-5, 1e-3, "log_uniform"), "lora.r": Range(4, 64, "int_uniform"), "num_train_epochs": Choice((3, 5, 8))}
)
GRID = SearchSpace({"learning_rate": Choice((1e-4, 1e-3)), "lora.r": Choice((4, 8, 16))})


def draw(space: SearchSpace = SPACE, **changes: Any):
    return draw_trials(**{"base": TrainConfig(), "space": space, "num_trials": 8, "seed": 42, **changes})


def test_the_same_seed_draws_the_same_trials_and_another_seed_others() -> None:
    assert draw() == draw()
    assert [trial.overrides for trial in draw()] != [trial.overrides for trial in draw(seed=43)]


@given(short=st.integers(1, 12), more=st.integers(0, 12), seed=st.integers(0, 2**40))
@settings(max_examples=20, deadline=None)
def test_more_trials_begin_with_the_same_ones(short: int, more: int, seed: int) -> None:
    assert draw(num_trials=short + more, seed=seed)[:short] == draw(num_trials=short, seed=seed)


def test_a_grid_begins_with_the_same_ones() -> None:
    assert draw(GRID, search="grid", num_trials=6)[:4] == draw(GRID, search="grid", num_trials=4)


def test_another_searched_setting_leaves_the_draws_of_the_first_alone() -> None:
    alone = draw(SearchSpace({"learning_rate": SPACE.domains["learning_rate"]}))
    both = draw(SearchSpace({"weight_decay": Range(0, 1, "uniform"), "learning_rate": SPACE.domains["learning_rate"]}))
    assert [trial.config.learning_rate for trial in alone] == [trial.config.learning_rate for trial in both]
    assert len({trial.config.weight_decay for trial in both}) == len(both)


def test_draws_stay_in_range_and_reach_all_of_it() -> None:
    """200 log-uniform draws over two decades: about half below the geometric middle 1e-4 (100 +- 4 * sqrt(50) = 72..128)."""
    trials = draw(num_trials=200)
    rates = [trial.config.learning_rate for trial in trials]
    assert all(1e-5 <= rate <= 1e-3 for rate in rates)
    assert 72 <= sum(rate < 1e-4 for rate in rates) <= 128
    ranks = {trial.config.lora.r for trial in trials if trial.config.lora}
    assert min(ranks) <= 8
    assert max(ranks) >= 60
    assert {trial.config.num_train_epochs for trial in trials} == {3, 5, 8}


def test_a_uniform_draw_is_not_a_log_uniform_one() -> None:
    """Under a uniform law 1e-4 lies at 9 % of the range, so few of 200 draws fall below it."""
    trials = draw(SearchSpace({"learning_rate": Range(1e-5, 1e-3, "uniform")}), num_trials=200)
    assert sum(trial.config.learning_rate < 1e-4 for trial in trials) <= 40


def test_drawn_numbers_have_four_digits_and_are_the_ones_used() -> None:
    for trial in draw():
        rate = trial.overrides["learning_rate"]
        assert rate == float(f"{rate:.4g}") == trial.config.learning_rate


def test_rounding_never_leaves_the_range() -> None:
    """0.123456 to 0.123457: four digits would give 0.1235, outside."""
    trials = draw(SearchSpace({"weight_decay": Range(0.123456, 0.123457, "uniform")}), num_trials=1)
    assert 0.123456 <= trials[0].config.weight_decay <= 0.123457


# ---- Sobol points


@given(short=st.integers(1, 12), more=st.integers(0, 12), seed=st.integers(0, 2**40))
@settings(max_examples=20, deadline=None)
def test_more_sobol_trials_begin_with_the_same_ones(short: int, more: int, seed: int) -> None:
    assert draw(search="sobol", num_trials=short + more, seed=seed)[:short] == draw(search="sobol", num_trials=short, seed=seed)


def test_sobol_points_follow_the_seed_and_stay_in_their_domains() -> None:
    trials = draw(search="sobol", num_trials=64)
    assert [trial.overrides for trial in trials] != [trial.overrides for trial in draw(search="sobol", num_trials=64, seed=43)]
    assert all(1e-5 <= trial.config.learning_rate <= 1e-3 for trial in trials)
    assert {trial.config.num_train_epochs for trial in trials} == {3, 5, 8}
    assert all(trial.config.lora is not None and 4 <= trial.config.lora.r <= 64 for trial in trials)


def test_sobol_points_are_even_where_random_draws_are_not() -> None:
    """Of 16 points of a scrambled Sobol sequence each sixteenth of every axis holds exactly one; of random draws some hold several."""
    space = SearchSpace({"learning_rate": Range(1e-5, 1e-3, "log_uniform"), "weight_decay": Range(0, 1, "uniform")})

    def filled(search: Any, seed: int) -> list[int]:
        trials = draw(space, search=search, num_trials=16, seed=seed)
        parts = [[(math.log10(t.config.learning_rate) + 5) / 2 for t in trials], [t.config.weight_decay for t in trials]]
        # Rounding to four digits may carry a point over a border: no point lies that close to one here.
        return [len({min(15, int(part * 16)) for part in axis}) for axis in parts]

    assert all(filled("sobol", seed) == [16, 16] for seed in (1, 2, 3))
    assert all(max(filled("random", seed)) < 16 for seed in (1, 2, 3))


@pytest.mark.parametrize(
    ("domain", "ends"),
    [
        (Choice(("a", "b", "c")), ("a", "c")),
        (Range(4, 64, "int_uniform"), (4, 64)),
        (Range(0.0, 1.0, "uniform"), (0.0, 1.0)),
        (Range(1e-6, 1e-2, "log_uniform"), (1e-6, 1e-2)),
    ],
)
def test_a_part_of_a_domain_runs_from_end_to_end(domain: Any, ends: tuple) -> None:
    almost_one = 1 - 2**-53
    assert (domain.at(0.0), domain.at(almost_one)) == ends
    if isinstance(domain, Range) and domain.distribution == "log_uniform":
        assert math.isclose(domain.at(0.5), 1e-4), "geometric, where a uniform law would give 5e-3"


def test_start_points_come_before_sobol_points_and_take_none_away() -> None:
    first, *others = draw(search="sobol", num_trials=4, start_points=[{"learning_rate": 5e-4}])
    assert first.config.learning_rate == 5e-4
    assert [trial.overrides for trial in others] == [trial.overrides for trial in draw(search="sobol", num_trials=3)]


def test_nothing_searched_gives_one_sobol_trial() -> None:
    assert len(draw(SearchSpace(), search="sobol", num_trials=5)) == 1


@pytest.mark.parametrize(("num_trials", "startup", "known"), [(3, 5, 3), (20, 5, 5), (20, None, 6), (20, 1, 2)])
def test_optuna_knows_its_start_beforehand(num_trials: int, startup: int | None, known: int) -> None:
    """Two start points; by default twice the three searched settings; never fewer than the start points."""
    points = [{"learning_rate": 5e-4}, {"learning_rate": 2e-4}]
    trials = draw(search="optuna", num_trials=num_trials, startup_trials=startup, start_points=points)
    assert trials == draw(search="sobol", num_trials=known, start_points=points)


def test_names_count_from_zero() -> None:
    assert [trial.name for trial in draw(num_trials=3)] == ["trial-00", "trial-01", "trial-02"]


def test_a_grid_is_every_combination_in_the_order_of_the_file() -> None:
    trials = draw(GRID, search="grid", num_trials=6)
    assert [(trial.config.learning_rate, trial.config.lora.r) for trial in trials if trial.config.lora] == [
        (1e-4, 4), (1e-4, 8), (1e-4, 16), (1e-3, 4), (1e-3, 8), (1e-3, 16),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("num_trials", "points", "warns"), [(5, [], True), (6, [], False), (6, [{"lora.r": 32}], True), (6, [{"lora.r": 4}], False)]
)
def test_a_grid_that_is_cut_short_warns(caplog: pytest.LogCaptureFixture, num_trials: int, points: list, warns: bool) -> None:
    """Six combinations; a start point outside the grid takes the place of one, a start point inside is one of them."""
    with caplog.at_level(logging.WARNING):
        trials = draw(GRID, search="grid", num_trials=num_trials, start_points=points)
    assert len(trials) == num_trials
    assert ("the grid has 6 configurations" in caplog.text) == warns


def test_a_range_in_a_grid_is_refused() -> None:
    with pytest.raises(InputError, match=r"train\.learning_rate, train\.lora\.r") as caught:
        draw(search="grid")
    assert "sweep.search: random" in str(caught.value)


def test_start_points_come_first_and_count() -> None:
    """A searched setting that a start point leaves out takes the middle.

    sqrt(1e-5 * 1e-3) = 1e-4, (4 + 64) // 2 = 34, the first of 3, 5, 8.
    """
    first, second, third = draw(num_trials=3, start_points=[{"learning_rate": 5e-4, "objective": {"beta": 0.5}}, {}])
    assert first.overrides == {"learning_rate": 5e-4, "lora.r": 34, "num_train_epochs": 3, "objective.beta": 0.5}
    assert first.config.objective.beta == 0.5
    assert second.overrides == {"learning_rate": 1e-4, "lora.r": 34, "num_train_epochs": 3}
    assert third.overrides == draw(num_trials=1)[0].overrides


def test_nested_and_dotted_start_points_are_the_same() -> None:
    assert flatten_overrides({"lora": {"r": 8}, "objective.beta": 1, "x": {}}) == {"lora.r": 8, "objective.beta": 1, "x": {}}


def test_repeated_configurations_are_drawn_again() -> None:
    """Two values four times over would repeat; four distinct ones must come back, whatever the draws."""
    space = SearchSpace({"learning_rate": Choice((1e-4, 1e-3)), "num_train_epochs": Choice((3, 5))})
    for seed in range(5):
        trials = draw(space, num_trials=4, seed=seed, start_points=[{"learning_rate": 1e-3}, {"learning_rate": 1e-3}])
        assert len({json.dumps(trial.overrides) for trial in trials}) == 4


def test_an_exhausted_space_gives_fewer_trials_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert len(draw(GRID, num_trials=50)) == 6
    assert "only 6 different configurations" in caplog.text
    assert len(draw(SearchSpace(), num_trials=5)) == 1


def test_every_trial_has_its_own_seed_unless_one_is_given() -> None:
    seeds = [trial.config.seed for trial in draw()]
    assert len(set(seeds)) == len(seeds)
    assert seeds == [trial_seed(42, index=index) for index in range(8)]
    assert {trial.config.seed for trial in draw(base=TrainConfig(seed=7))} == {7}
    assert draw(start_points=[{"seed": 9}])[0].config.seed == 9
    searched = draw(SearchSpace({"seed": Choice((1, 2, 3))}), num_trials=3)
    assert {trial.config.seed for trial in searched} == {1, 2, 3}


@given(seed=st.integers(0, 2**60), index=st.integers(0, 10**6))
def test_trial_seeds_fit_every_library(seed: int, index: int) -> None:
    assert 0 <= trial_seed(seed, index=index) < 2**31


def test_trials_do_not_share_their_settings() -> None:
    """A list drawn twice must not be one object that a change in one trial carries into the other."""
    trials = draw(SearchSpace({"lora.target_modules": Choice((["q_proj"], ["v_proj"]))}), num_trials=2)
    trials[0].overrides["lora.target_modules"].append("x")
    again = draw(SearchSpace({"lora.target_modules": Choice((["q_proj"], ["v_proj"]))}), num_trials=2)
    assert "x" not in again[0].overrides["lora.target_modules"]


def test_a_searched_section_can_be_switched_off() -> None:
    space = SearchSpace({"lora": Choice((None, {"r": 8}))})
    assert {trial.config.lora and trial.config.lora.r for trial in draw(space, num_trials=2)} == {None, 8}


def test_a_setting_inside_a_section_that_is_off_switches_it_on() -> None:
    assert trial_config(TrainConfig(lora=None), {"lora.r": 8}).lora is not None


def test_an_impossible_combination_names_the_settings() -> None:
    """4 pairs per pass are valid with 8 per step, and not with the drawn 2 per step."""
    space = SearchSpace({"train_batch_size": Choice((2,))})
    with pytest.raises(InputError) as caught:
        draw(space, num_trials=1)
    assert "train.train_batch_size=2" in str(caught.value)
    assert "use at most 2" in str(caught.value)
    with pytest.raises(InputError, match=r"train\.learning_rate"):
        trial_config(TrainConfig(), {"learning_rate": -1})


def test_the_size_of_a_space() -> None:
    assert GRID.size == 6
    assert SPACE.size is None
    assert SearchSpace().size == 1
    assert not SearchSpace()


def test_the_middle_of_a_range_is_geometric_for_log_uniform() -> None:
    assert math.isclose(Range(1e-6, 1e-2, "log_uniform").middle, 1e-4)
    assert Range(0.0, 1.0, "uniform").middle == 0.5

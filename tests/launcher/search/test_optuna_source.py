"""Proposals are a function of what was told; the study survives any kill."""

from __future__ import annotations

import json
import math
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from launcher.config import ExperimentConfig
from launcher.search.optuna_source import FILE, OptunaSource
from launcher.search.proposal import Tried, from_params, proposal_seed, propose, to_params
from launcher.search.source import Outcome
from launcher.search.surrogates import Surrogates, surrogates_of
from launcher.search_space import Choice, Range, SearchSpace, TrialSpec, draw_trials, possible_trials
from trainers.errors import InputError

SPACE = SearchSpace(
    {
        "learning_rate": Range(1e-5, 1e-2, "log_uniform"),
        "lora.r": Range(4, 64, "int_uniform"),
        "num_train_epochs": Choice((3, 5, 8)),
        "lora.target_modules": Choice((["q_proj"], ["q_proj", "v_proj"])),
    }
)
START = {"learning_rate": 1e-3, "lora.r": 8, "num_train_epochs": 5, "lora.target_modules": ["q_proj"]}


def experiment(**sweep: Any) -> ExperimentConfig:
    return ExperimentConfig.model_validate(
        {
            "name": "tiny",
            "model": {"model_name_or_path": "target"},
            "data": {"path": "data"},
            "sweep": {"search": "optuna", "num_trials": 8, "startup_trials": 4, "start_points": [START], **sweep},
        }
    )


@contextmanager
def opened(run: Path, *, space: SearchSpace = SPACE, **sweep: Any) -> Iterator[OptunaSource]:
    source = OptunaSource(run, config=experiment(**sweep), space=space)
    yield source
    source.close()


def outcome(spec: TrialSpec) -> Outcome:
    """A landscape with a trade-off: a higher rate forgets more and retains less; short trials are worse at both."""
    rate = math.log10(spec.config.learning_rate) + 5
    short = 0.3 * (8 - spec.config.num_train_epochs)
    return Outcome("finished", None, {"forget_answer_log_prob": -1.5 - rate + short, "retain_answer_log_prob": -0.5 * rate - short})


def finish(source: OptunaSource, *, most: int = 99) -> list[TrialSpec]:
    made = []
    while len(made) < most and (spec := source.ask()) is not None:
        made.append(spec)
        source.tell(spec.name, outcome(spec))
    return made


def test_start_points_then_a_sobol_start_then_proposals(tmp_path: Path) -> None:
    with opened(tmp_path) as source:
        made = finish(source)
    known = draw_trials(
        base=experiment().train, space=SPACE, start_points=[START], num_trials=8, search="optuna", startup_trials=4, seed=42
    )
    assert len(known) == 4
    assert made[:4] == list(known)
    assert made[0].overrides == START
    assert [spec.name for spec in made] == [f"trial-{index:02d}" for index in range(8)]
    assert len({spec.key for spec in made}) == 8
    assert len({spec.config.seed for spec in made}) == 8
    even = draw_trials(base=experiment().train, space=SPACE, start_points=[START], num_trials=8, search="sobol", seed=42)
    assert made[4:] != list(even[4:]), "negative control: these follow what was told"
    history = [Tried(spec.overrides, result) for spec in made[:4] if (result := surrogates_of(outcome(spec).signals))]
    assert made[4].overrides == propose(history, space=SPACE, seed=proposal_seed(42, index=4, attempt=0))


def finish_with_best(source: OptunaSource, *, best: str) -> list[TrialSpec]:
    """One trial is good in both measures, all others are bad."""
    made = []
    while (spec := source.ask()) is not None:
        made.append(spec)
        values = (-4.0, -0.1) if spec.name == best else (-1.0, -3.0)
        source.tell(
            spec.name, Outcome("finished", None, dict(zip(("forget_answer_log_prob", "retain_answer_log_prob"), values, strict=True)))
        )
    return made


def test_the_same_seed_proposes_the_same_trials_and_another_result_others(tmp_path: Path) -> None:
    found = []
    for number, best in enumerate(("trial-01", "trial-01", "trial-02")):
        with opened(tmp_path / str(number)) as source:
            found.append(finish_with_best(source, best=best))
    assert found[0] == found[1]
    assert found[2][:4] == found[0][:4]
    assert found[2][4:] != found[0][4:]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[TrialSpec]:
    """All trials of a search that nothing disturbs."""
    with opened(tmp_path_factory.mktemp("undisturbed")) as source:
        return finish(source)


@pytest.mark.parametrize("stop", [0, 3, 5, 7])
@pytest.mark.parametrize("told", [False, True], ids=["running", "told"])
def test_a_source_that_is_opened_again_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, expected: list[TrialSpec], stop: int, told: bool
) -> None:
    """Whatever this process knew is gone; the trial that was running comes again, the same one."""
    killed = OptunaSource(tmp_path / "killed", config=experiment(), space=SPACE)
    made = finish(killed, most=stop)
    last = killed.ask()
    assert last is not None
    if told:
        killed.tell(last.name, outcome(last))
        made.append(last)
    with opened(tmp_path / "killed") as source:
        assert list(source.specs) == expected[: stop + 1]
        assert made + finish(source) == expected
        assert list(source.specs) == expected


def test_a_failed_trial_counts_for_nothing_and_comes_again_at_the_next_start(tmp_path: Path) -> None:
    with opened(tmp_path) as source:
        first = source.ask()
        assert first is not None
        source.tell(first.name, Outcome("failed", "error"))
        second = source.ask()
        assert second is not None
        assert second.name == "trial-01", "not in the same start"
        source.tell(second.name, outcome(second))
    with opened(tmp_path) as source:
        assert [spec.name for spec in source.specs] == ["trial-00", "trial-01"]
        assert source.ask() == first
        source.tell(first.name, outcome(first))
    with opened(tmp_path) as source:
        third = source.ask()
        assert third is not None
        assert third.name == "trial-02"


def test_stopped_trials_are_never_complete(tmp_path: Path) -> None:
    """Their early values would look retentive. A budget's end leaves a trial open, because it goes on."""
    import optuna

    good = {"forget_answer_log_prob": -5.0, "retain_answer_log_prob": 0.0}
    with opened(tmp_path) as source:
        for reason in ("pruned", "diverged", "budget"):
            spec = source.ask()
            assert spec is not None
            source.tell(spec.name, Outcome("stopped", reason, good))
        states = [trial.state for trial in source.study.get_trials()]
        state = optuna.trial.TrialState
        assert states == [state.PRUNED, state.PRUNED, state.RUNNING]
        assert source.study.best_trials == []
        finished = source.ask()
        assert finished is not None
        source.tell(finished.name, Outcome("finished", None, good))
        source.tell(finished.name, Outcome("finished", None, good))
        assert [trial.user_attrs["trial"] for trial in source.study.best_trials] == [finished.name]


def test_trials_side_by_side_differ(tmp_path: Path) -> None:
    with opened(tmp_path, num_trials=12) as source:
        finish(source, most=4)
        side_by_side = [source.ask() for _ in range(8)]
    assert len({spec.key for spec in side_by_side if spec is not None}) == 8


def test_a_small_space_is_searched_to_its_end_and_no_further(tmp_path: Path) -> None:
    space = SearchSpace({"num_train_epochs": Choice((3, 5, 8)), "lora.r": Choice((4, 8))})
    with opened(tmp_path, space=space, start_points=[]) as source:
        made = finish(source)
    assert len({spec.key for spec in made}) == len(made) == 6


def test_a_start_point_outside_the_space_runs_and_teaches_nothing(tmp_path: Path) -> None:
    outside = START | {"learning_rate": 0.5}
    with opened(tmp_path, start_points=[outside]) as source:
        made = finish(source)
        assert made[0].config.learning_rate == 0.5
        assert len(made) == 8
        (first, *_) = source.study.get_trials()
    assert first.params == {}
    assert to_params(outside, space=SPACE) is None


def test_settings_survive_the_way_to_optuna_and_back() -> None:
    params = to_params(START, space=SPACE)
    assert params is not None
    again = from_params(params, space=SPACE)
    assert json.dumps(again) == json.dumps(START), "whole numbers stay whole"


def test_proposals_learn_where_it_is_better() -> None:
    """Both measures peak at a rate of 1e-3 and a rank of 32; five times, proposals follow 20 even trials.

    Measured: a mean distance from the best rate of 0.29 decades, against 0.83 of the even trials.
    """

    def tried(overrides: dict[str, Any]) -> Tried:
        far = abs(math.log10(overrides["learning_rate"]) + 3) + abs(overrides["lora.r"] - 32) / 16
        return Tried(overrides, Surrogates(forgetting=5 - far, retention=-far))

    even, proposed = [], []
    for seed in range(5):
        specs = draw_trials(base=experiment().train, space=SPACE, num_trials=20, search="sobol", seed=seed)
        history = [tried(spec.overrides) for spec in specs]
        even += [spec.config.learning_rate for spec in specs]
        proposed += [propose(history, space=SPACE, seed=number)["learning_rate"] for number in range(8)]
    distances = [sum(abs(math.log10(rate) + 3) for rate in rates) / len(rates) for rates in (proposed, even)]
    assert distances[0] < 0.6 * distances[1]


def test_a_proposal_depends_on_nothing_but_history_and_seed() -> None:
    history = [Tried(START, Surrogates(1.0, -1.0)), Tried(START | {"learning_rate": 1e-4}, "pruned")]
    once = propose(history, space=SPACE, seed=1)
    propose(history, space=SPACE, seed=2)
    assert propose(history, space=SPACE, seed=1) == once
    assert propose(history[:1], space=SPACE, seed=3) != once


def test_a_damaged_database_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"SQLite format 3\0" + b"x" * 500)
    with pytest.raises(InputError, match="the record of the search") as caught:
        OptunaSource(tmp_path, config=experiment(), space=SPACE)
    assert str(tmp_path / FILE) in str(caught.value)


def test_a_database_that_was_half_made_is_made_again(tmp_path: Path) -> None:
    (tmp_path / f".{FILE}.tmp").write_bytes(b"half")
    with opened(tmp_path) as source:
        assert source.ask() is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE]


def test_the_study_bears_the_runs_name_for_the_dashboard(tmp_path: Path) -> None:
    with opened(tmp_path) as source:
        finish(source, most=1)
    with closing(sqlite3.connect(tmp_path / FILE)) as database:
        assert database.execute("select study_name from studies").fetchall() == [("tiny",)]


def test_the_corners_of_a_searched_space_are_checked_beforehand() -> None:
    """Eight pairs per pass do not fit into a batch of four."""
    bad = SearchSpace({"per_device_train_batch_size": Choice((1, 8)), "train_batch_size": Choice((4, 8))})
    with pytest.raises(InputError, match="train_batch_size"):
        possible_trials(experiment(), space=bad, known=())
    assert len(possible_trials(experiment(), space=SPACE, known=())) == 2 * 2 * 3 * 2
    assert possible_trials(experiment(search="random"), space=bad, known=()) == []


def test_optuna_is_imported_by_the_search_alone() -> None:
    import subprocess

    code = "import sys, launcher.sweep, launcher.search.proposal, launcher.cli; assert 'optuna' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

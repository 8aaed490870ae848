"""The pair search on a landscape whose best merge is known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from merging.config import MergeConfig, PairConfig
from merging.pairs import Candidate, CheapScores, Pair, control_configs
from merging.search import content_of, measurement_key, search_pairs
from tests.helpers.merge_models import write_base, write_lora
from trainers.errors import InputError, SetupError
from trainers.files import strict_json

BASELINE = {"mia_auc": 0.98, "retain_token_accuracy": 0.95, "retention": 0.9, "forgetting": 0.05, "mmlu_average": None}
TRIALS = {
    # name: (AUC, retention, forgetting)
    "over-a": (0.10, 0.55, 0.97),
    "over-b": (0.20, 0.50, 0.80),
    "under-a": (0.80, 0.85, 0.60),
    "under-b": (0.90, 0.80, 0.30),
}
BEST = ("over-a", "under-a", 0.5)
"""The pair and density whose merges forget most and keep most; its AUC meets 0.5 at scale 1.2."""


def candidate(name: str, *, verdict: str | None = None, bonus: float = 0.0) -> Candidate:
    auc, retention, forgetting = TRIALS[name]
    scores = full_scores(auc=auc, retention=retention, forgetting=forgetting)
    scores["task_aggregate"] += bonus
    return Candidate(
        name=name,
        checkpoint=Path(name),
        scores=scores,
        verdict=verdict or ("over-forgetting" if auc < 0.5 else "under-forgetting"),
        terms=(forgetting, retention),
        content_hash=f"hash of {name}",
    )


def full_scores(*, auc: float, retention: float, forgetting: float) -> dict[str, float | None]:
    aggregate = 2 * retention * forgetting / (retention + forgetting)
    return {
        "mia_auc": auc,
        "mia_score": 1 - 2 * abs(auc - 0.5),
        "task_aggregate": aggregate,
        "retention": retention,
        "forgetting": forgetting,
        "mmlu_average": None,
        "final_score": None,
    }


class Landscape:
    """Scores of a merge as a formula of pair, density and scale, and a count of how often it was asked."""

    def __init__(self, *, quality: float = 0.0) -> None:
        self.quality, self.cheap_calls, self.full_calls = quality, 0, 0

    def _values(self, pair: Pair, config: MergeConfig) -> tuple[float, float, float]:
        over, under = TRIALS[pair.over.name], TRIALS[pair.under.name]
        off = abs(config.density - BEST[2]) if config.method == "ties" else 0.4
        retention = (over[1] + under[1]) / 2 - 0.2 * off + self.quality
        forgetting = (over[2] + under[2]) / 2 - 0.2 * off + self.quality
        root = 1.2 + (over[0] + under[0] - 0.9)
        return 1 / (1 + math.exp(3.2 * (config.scale - root))), retention, forgetting

    def cheap(self, pair: Pair, config: MergeConfig) -> CheapScores:
        self.cheap_calls += 1
        auc, retention, forgetting = self._values(pair, config)
        return CheapScores(
            forget_token_accuracy=1 - forgetting, retain_token_accuracy=retention, mia_auc=auc, mia_score=1 - 2 * abs(auc - 0.5)
        )

    def full(self, pair: Pair, config: MergeConfig, name: str) -> dict[str, float | None]:
        self.full_calls += 1
        auc, retention, forgetting = self._values(pair, config)
        return full_scores(auc=auc, retention=retention, forgetting=forgetting)


def search(landscape: Landscape, *, candidates=None, config: PairConfig | None = None, **more):
    return search_pairs(
        candidates=[candidate(name) for name in TRIALS] if candidates is None else candidates,
        baseline_scores=BASELINE,
        measure_cheap=more.pop("measure_cheap", landscape.cheap),
        measure_full=more.pop("measure_full", landscape.full),
        config=config or PairConfig(),
        merge=MergeConfig(),
        **more,
    )


def test_the_known_best_merge_is_found_within_the_budget():
    landscape, config = Landscape(quality=0.1), PairConfig()
    result = search(landscape, config=config)
    assert result.winner is not None
    assert result.winner is result.best_merge
    assert result.winner.parents == BEST[:2]
    assert result.winner.config is not None
    assert result.winner.config.density == BEST[2]
    assert result.winner.config.scale == pytest.approx(1.2, abs=0.03)
    assert result.merge_beats_parents is True
    assert landscape.cheap_calls == result.cost["cheap_measured"] <= 4 * len(config.densities) + config.calibrated * config.scale_steps
    assert landscape.full_calls == result.cost["full_measured"] == config.finalists + 1


def test_without_calibration_the_scale_stays_at_one():
    """The negative control of the calibration: the same landscape without steps."""
    result = search(Landscape(quality=0.1), config=PairConfig(scale_steps=0))
    assert {point.config.scale for point in result.points} == {1.0}
    assert result.best_merge is not None
    assert result.best_merge.value(result.metric) < search(Landscape(quality=0.1)).best_merge.value(result.metric)


def test_a_resumed_search_measures_nothing_twice():
    """Interrupted after 7 records, then resumed: together as many measurements as one search, and the same answer."""
    whole = Landscape()
    expected = search(whole)
    kept: dict[str, dict] = {}

    def record(key: str, entry: dict) -> None:
        if len(kept) == 7:
            raise KeyboardInterrupt
        kept[key] = json.loads(json.dumps(entry))

    with pytest.raises(KeyboardInterrupt):
        search(Landscape(), record=record)
    second = Landscape()
    result = search(second, done=kept)
    assert second.cheap_calls + second.full_calls + 7 == whole.cheap_calls + whole.full_calls
    assert result.cost["cheap_reused"] == 7
    assert result.sentence == expected.sentence
    repeated, everything = Landscape(), {}
    search(Landscape(), record=everything.__setitem__)
    assert search(repeated, done=everything).to_json()["winner"] == expected.to_json()["winner"]
    assert repeated.cheap_calls + repeated.full_calls == 0


def test_a_measurement_of_another_checkpoint_is_not_reused():
    """The same names with other contents: everything is measured again."""
    done: dict[str, dict] = {}
    search(Landscape(), record=done.__setitem__)
    retrained = [Candidate(**{**vars(candidate(name)), "content_hash": "new"}) for name in TRIALS]
    landscape = Landscape()
    search(landscape, candidates=retrained, done=done)
    assert landscape.cheap_calls > 0
    assert landscape.full_calls == 3


def test_the_better_parent_wins_when_merges_lose():
    result = search(Landscape(quality=-0.2), candidates=[candidate("over-a"), candidate("under-a", bonus=0.5)])
    assert result.merge_beats_parents is False
    assert result.winner is not None
    assert (result.winner.role, result.winner.name) == ("trial", "under-a")
    assert result.best_merge is not None
    assert "does not beat its better parent under-a" in result.sentence
    assert result.to_json()["pairs"][0]["outcome"].startswith("finalist, lost: behind trial under-a")


def test_a_linear_control_that_is_ahead_is_told_but_not_handed_out():
    landscape = Landscape()

    def full(pair: Pair, config: MergeConfig, name: str):
        scores = landscape.full(pair, config, name)
        return scores | {"task_aggregate": 0.99, "mia_score": 0.99} if config.method == "linear" else scores

    result = search(landscape, measure_full=full)
    assert result.winner is not None
    assert result.winner is result.best_merge
    assert result.best_merge is not None
    assert "The linear control is ahead of it." in result.sentence
    assert result.contestants[0].role == "control"
    assert result.best_merge.role == "merge"


@pytest.mark.parametrize(("names", "reason"), [(["under-a", "under-b"], "over-forgets"), (["over-a"], "under-forgets")])
def test_an_empty_side_is_explained_and_the_best_trial_returned(names, reason):
    landscape = Landscape()
    lines: list[str] = []
    result = search(landscape, candidates=[candidate(name) for name in names], log=lines.append)
    assert landscape.cheap_calls == landscape.full_calls == 0
    assert reason in (result.reason or "")
    assert result.winner is not None
    assert result.winner.role == "trial"
    assert result.best_merge is None
    assert result.merge_beats_parents is None
    assert any(reason in line for line in lines)


def test_dead_trials_neither_merge_nor_win():
    result = search(Landscape(), candidates=[candidate("over-a", verdict="dead", bonus=5.0), candidate("under-a")])
    assert result.winner is not None
    assert result.winner.name == "under-a"
    record = next(entry for entry in result.to_json()["candidates"] if entry["name"] == "over-a")
    assert record["excluded"].startswith("dead")
    assert record["sides"] == []


def test_a_merge_that_fails_a_gate_never_wins():
    """Retention far below half of the baseline's, membership and aggregate perfect."""

    def full(pair: Pair, config: MergeConfig, name: str):
        return full_scores(auc=0.5, retention=0.2, forgetting=1.0) | {"task_aggregate": 1.0}

    result = search(Landscape(), measure_full=full)
    assert result.winner is not None
    assert result.winner.role == "trial"
    assert result.best_merge is not None
    assert "retention" in (result.best_merge.gate or "")
    assert result.merge_beats_parents is False


def test_points_that_fail_the_cheap_gate_are_not_finalists():
    landscape = Landscape()

    def cheap(pair: Pair, config: MergeConfig) -> CheapScores:
        if pair.trials == BEST[:2]:
            return CheapScores(forget_token_accuracy=0.0, retain_token_accuracy=0.3, mia_auc=0.5, mia_score=1.0)
        return landscape.cheap(pair, config)

    result = search(landscape, measure_cheap=cheap)
    assert result.best_merge is not None
    assert result.best_merge.parents != BEST[:2]
    outcome = next(pair["outcome"] for pair in result.to_json()["pairs"] if (pair["over"], pair["under"]) == BEST[:2])
    assert "retain_token_accuracy" in outcome


def test_a_failed_measurement_is_a_record_with_a_reason():
    landscape = Landscape()
    done: dict[str, dict] = {}

    def cheap(pair: Pair, config: MergeConfig) -> CheapScores:
        if pair.over.name == "over-a":
            raise InputError("3 values of tensor q_proj are not finite")
        if pair.under.name == "under-b":
            return CheapScores(math.nan, 0.5, 0.5, 1.0)
        return landscape.cheap(pair, config)

    result = search(landscape, measure_cheap=cheap, record=done.__setitem__)
    errors = {point.error for point in result.points if point.error}
    assert errors == {"failed: 3 values of tensor q_proj are not finite", "its losses are not finite, or a score is missing"}
    assert result.best_merge is not None
    assert result.best_merge.parents == ("over-b", "under-a")
    assert not any(entry["over"] == "over-a" for entry in done.values())


def test_a_missing_installation_stops_the_search():
    def cheap(pair: Pair, config: MergeConfig) -> CheapScores:
        raise SetupError("no memory left")

    with pytest.raises(SetupError):
        search(Landscape(), measure_cheap=cheap)


def test_final_score_decides_only_where_everyone_has_it():
    """With MMLU for all, final_score ranks; if one trial lacks it, nobody's is read."""

    def full(pair: Pair, config: MergeConfig, name: str):
        return Landscape().full(pair, config, name) | {"final_score": 0.9, "mmlu_average": 0.4}

    with_all = [
        Candidate(**{**vars(entry), "scores": {**entry.scores, "final_score": 0.95}})
        for entry in (candidate("over-a"), candidate("under-a"))
    ]
    result = search(Landscape(), candidates=with_all, measure_full=full)
    assert result.metric == "final_score"
    assert result.winner is not None
    assert result.winner.role == "trial"
    result = search(Landscape(), candidates=[with_all[0], candidate("under-a")], measure_full=full)
    assert result.metric == "mean(task_aggregate, mia_score)"


def test_the_record_tells_every_pair_and_every_cost():
    record = json.loads(json.dumps(strict_json(search(Landscape(), config=PairConfig(max_pairs=2)).to_json())))
    assert [pair["outcome"].startswith("not measured: its prediction ranks") for pair in record["pairs"]] == [False, False, True, True]
    assert {entry["name"] for entry in record["candidates"]} == set(TRIALS)
    measured = record["pairs"][0]["points"][0]
    assert set(measured) == {"density", "scale", "cheap", "objective", "gate", "error"}
    assert record["cost"]["cheap_measured"] == sum(len(pair["points"]) for pair in record["pairs"])
    assert [entry["role"] for entry in record["contestants"]].count("control") == 1
    assert set(control_configs(search(Landscape()).pairs[0])) == {"linear"}


def test_a_linear_search_tries_no_densities():
    landscape = Landscape()
    result = search_pairs(
        candidates=[candidate(name) for name in TRIALS],
        baseline_scores=BASELINE,
        measure_cheap=landscape.cheap,
        measure_full=landscape.full,
        config=PairConfig(scale_steps=0),
        merge=MergeConfig(method="linear"),
    )
    assert len(result.points) == 4


def test_without_a_hash_the_key_follows_the_files(tmp_path):
    base = write_base(tmp_path / "base")
    keys = []
    for seed in (1, 1, 2):
        trial = write_lora(tmp_path / "trial", base=base, seed=seed)
        entry = Candidate(**{**vars(candidate("over-a")), "checkpoint": trial, "content_hash": ""})
        keys.append(measurement_key("cheap", pair=Pair(entry, candidate("under-a"), None), config=MergeConfig()))
        assert content_of(entry) != ""
    assert keys[0] == keys[1] != keys[2]

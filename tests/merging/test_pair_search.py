"""The pair search on a landscape whose best merge is known."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from merging.cheap import CheapScores
from merging.config import MergeConfig, ObjectiveWeights, PairConfig
from merging.ledger import Failed, Merge
from merging.outcome import PairSearchResult
from merging.pairs import Candidate
from merging.search import content_of, search_pairs
from tests.helpers.merge_models import write_base, write_lora
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
"""The pair and density whose merges forget most and keep most; with the predicted share its AUC meets 0.5 at scale 1.2."""
NUM_EXAMPLES = 380
NOISE = 0.08
"""Of the task aggregate on 64 examples; it falls with the root of their number."""


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


def candidate(name: str, *, verdict: str | None = None, bonus: float = 0.0, complete: bool = True) -> Candidate:
    auc, retention, forgetting = TRIALS[name.partition("@")[0]]
    scores = full_scores(auc=auc, retention=retention, forgetting=forgetting)
    scores["task_aggregate"] = (scores["task_aggregate"] or 0.0) + bonus
    return Candidate(
        name=name,
        checkpoint=Path(name),
        scores=scores,
        verdict=verdict or ("over-forgetting" if auc < 0.5 else "under-forgetting"),
        terms=(forgetting, retention),
        content_hash=f"hash of {name}",
        complete=complete,
    )


class Landscape:
    """Scores of a merge as a formula of pair, density, share and scale, noisy on few examples, and a count of what was asked."""

    num_examples = NUM_EXAMPLES

    def __init__(self, *, quality: float = 0.0, noise: float = 0.0) -> None:
        self.quality, self.noise = quality, noise
        self.asked: list[tuple[Merge, int]] = []
        self.measured_in_full: list[str] = []
        self.cost: dict[str, int] = {"examples": 0, "merges": 0, "full": 0, "rows_generated": 0}

    def values(self, merge: Merge) -> tuple[float, float, float]:
        """AUC, retention and forgetting."""
        config = merge.config
        if len(merge.trials) != 2:
            auc, retention, forgetting = TRIALS[merge.trials[0].partition("@")[0]]
            return auc**config.scale, retention, forgetting * min(config.scale, 1.0)
        over, under = (TRIALS[name.partition("@")[0]] for name in merge.trials)
        off = abs(config.density - BEST[2]) if config.method == "ties" else 0.4
        weights = config.trial_weights(2)
        share = weights[0] / sum(weights)
        predicted = (under[0] - 0.5) / (under[0] - over[0])
        retention = (over[1] + under[1]) / 2 - 0.2 * off - 0.3 * abs(share - predicted) + self.quality
        forgetting = (over[2] + under[2]) / 2 - 0.2 * off - 0.3 * abs(share - predicted) + self.quality
        root = 1.2 + (over[0] + under[0] - 0.9)
        return 1 / (1 + math.exp(3.2 * (config.scale - root))), retention, forgetting

    def cheap(self, merges: Sequence[Merge], *, stop: int) -> list[CheapScores | Failed]:
        self.asked += [(merge, stop) for merge in merges]
        self.cost["merges"] += len(merges)
        self.cost["examples"] += stop * len(merges)
        return [self.one(merge, stop) for merge in merges]

    def one(self, merge: Merge, stop: int) -> CheapScores | Failed:
        auc, retention, forgetting = self.values(merge)
        noise = random.Random(f"{merge} {stop}").gauss(0, self.noise * math.sqrt(64 / stop)) if stop < NUM_EXAMPLES else 0.0
        aggregate = 2 * retention * forgetting / (retention + forgetting)
        return CheapScores(
            forget_token_accuracy=1 - forgetting,
            retain_token_accuracy=retention,
            mia_auc=auc,
            mia_score=1 - 2 * abs(auc - 0.5),
            task_aggregate=aggregate + noise,
            retention=retention,
            num_examples=stop,
        )

    def full(self, merges: Mapping[str, Merge]) -> list[Mapping[str, float | None] | Failed]:
        self.measured_in_full += list(merges)
        self.cost["full"] += len(merges)
        return [self.in_full(name, merge) for name, merge in merges.items()]

    def in_full(self, name: str, merge: Merge) -> Mapping[str, float | None] | Failed:
        auc, retention, forgetting = self.values(merge)
        return full_scores(auc=auc, retention=retention, forgetting=forgetting)


def search(landscape: Landscape, *, candidates: Sequence[Candidate] | None = None, merge: MergeConfig | None = None, **more: Any):
    gain = more.pop("gain", None)
    log = more.pop("log", None)
    return search_pairs(
        candidates=[candidate(name) for name in TRIALS] if candidates is None else candidates,
        baseline_scores=BASELINE,
        measurements=landscape,
        config=more.pop("config", None) or PairConfig(**more),
        merge=merge or MergeConfig(),
        gain=gain,
        log=log,
    )


def winner_of(result: PairSearchResult) -> tuple[str, str]:
    assert result.winner is not None
    return result.winner.role, result.winner.name


def of_pairs(landscape: Landscape) -> list[tuple[Merge, int]]:
    return [
        (merge, stop) for merge, stop in landscape.asked if len(merge.trials) == 2 and merge.config.method not in ("linear", "unanimous")
    ]


# ---- what is found, and at what price


def test_the_known_best_merge_is_found() -> None:
    result = search(Landscape(quality=0.1))
    assert result.winner is not None
    assert result.winner is result.best_merge
    assert result.winner.parents == BEST[:2]
    assert result.winner.config is not None
    assert result.winner.config.density == BEST[2]
    assert result.winner.config.scale == pytest.approx(1.2, abs=0.03)
    assert result.merge_beats_parents is True


def test_most_merges_meet_few_examples() -> None:
    """4 pairs on 64 examples; 2 of them, over-a+under-a and, because half at most may share a parent, over-b+under-b, with 3 densities and
    4 shares (the predicted 0.43 or 0.57 and three more). A quarter of those 24 meets all 380 examples, and 2 are generated."""
    landscape = Landscape(quality=0.1)
    result = search(landscape, calibrated=2, finalists=2)
    arms = {
        size: {(one.trials, one.config.density, one.config.weights) for one, stop in of_pairs(landscape) if stop == size}
        for size in (64, 380)
    }
    assert {stop for _, stop in landscape.asked} == {64, 380}
    assert len(arms[64]) == 2 + 12 + 12
    assert len(arms[380]) == math.ceil(24 / 4)
    assert arms[380] <= arms[64]
    assert len([name for name in landscape.measured_in_full if "+" in name]) == 2
    assert result.cost["exhaustive_merges"] == 4 * 3 * 4 * 4
    assert result.cost["examples"] * 3 < result.cost["exhaustive_examples"]


def test_few_noisy_examples_do_not_lose_a_clear_winner() -> None:
    """With noise on the first rung the winner's true value stays within 0.02 of the best in at least 8 of 10 landscapes."""
    best = search(Landscape(quality=0.1)).best_merge
    assert best is not None
    values = []
    for number in range(10):
        landscape = Landscape(quality=0.1 + 1e-9 * number, noise=NOISE)
        found = search(landscape).best_merge
        assert found is not None
        values.append(found.scores["task_aggregate"] + found.scores["mia_score"])
    wanted = best.scores["task_aggregate"] + best.scores["mia_score"]
    assert sum(value > wanted - 0.04 for value in values) >= 8


def test_without_steps_the_scale_stays_at_one() -> None:
    """The negative control of the calibration."""
    result = search(Landscape(quality=0.1), scale_steps=0)
    assert {point.config.scale for point in result.points} == {1.0}
    calibrated = search(Landscape(quality=0.1))
    assert result.ranking.value(result.best_merge) < calibrated.ranking.value(calibrated.best_merge)


def test_nothing_is_calibrated_where_that_is_asked_for() -> None:
    """As the published recipe: one density, equal weights, scale 1."""
    landscape = Landscape()
    search(landscape, calibrated=0, densities=(0.8,))
    assert {(one.config.density, one.config.weights, one.config.scale) for one, _ in of_pairs(landscape)} == {(0.8, None, 1.0)}


def test_no_checkpoint_is_in_more_than_half_of_the_pairs_while_there_are_others() -> None:
    """Of six pairs of over-a and six of over-b, the six of over-a predicted best: three of each are measured."""
    TRIALS.update({f"under-{letter}": (0.8, 0.85, 0.6) for letter in "cdefgh"})
    try:
        pool = [candidate(name) for name in TRIALS if name not in ("under-a", "under-b")]
        landscape = Landscape()
        result = search(landscape, candidates=pool, max_pairs=6)
        assert [pair.over.name for pair in result.pairs[:6]] == ["over-a"] * 6
        screened = list(dict.fromkeys(one.trials for one, _ in of_pairs(landscape)))
        assert sorted(over for over, _ in screened) == ["over-a"] * 3 + ["over-b"] * 3
    finally:
        for letter in "cdefgh":
            del TRIALS[f"under-{letter}"]


def test_a_small_fold_is_one_rung() -> None:
    landscape = Landscape(quality=0.1)
    landscape.num_examples = 90
    search(landscape)
    assert {stop for _, stop in landscape.asked} == {90}


def test_a_budget_is_kept_and_said() -> None:
    """Half a pass over 380 examples is 2 merges on 64 of them; the controls are owed, and the reason is on record."""
    landscape, rich = Landscape(quality=0.1), Landscape(quality=0.1)
    result = search(landscape, max_passes=0.5)
    search(rich)
    spent = sum(stop for _, stop in of_pairs(landscape))
    assert spent == 2 * 64 < sum(stop for _, stop in of_pairs(rich))
    assert sum("budget of 0.5 passes" in text for text in result.dropped.values()) == 2
    assert {control.name for control in result.controls} >= {"unanimous", "linear"}
    assert result.best_merge is not None, "the best of what is known"


def test_given_weights_are_kept() -> None:
    landscape = Landscape()
    search(landscape, merge=MergeConfig(weights=(0.8, 1.2)))
    assert {one.config.weights for one, _ in of_pairs(landscape)} == {(0.8, 1.2)}


@pytest.mark.parametrize(("method", "densities"), [("slerp", 1), ("breadcrumbs", 2), ("ties", 3)])
def test_only_densities_that_the_method_can_have_are_tried(method: str, densities: int) -> None:
    """slerp reads none, and breadcrumbs drops its top hundredth: 1.0 is one too many for it."""
    landscape = Landscape()
    search(landscape, merge=MergeConfig(method=method), densities=(0.2, 0.5, 1.0))
    assert len({one.config.density for one, _ in of_pairs(landscape)}) == densities


def test_finalists_differ() -> None:
    """The best point has eleven neighbours of its own pair that are ahead of every other pair; the second finalist is of another one."""
    result = search(Landscape(quality=0.1), finalists=3)
    merges = [entry for entry in result.contestants if entry.role == "merge"]
    assert len({entry.parents for entry in merges}) > 1
    trials = {tuple(name.partition("@")[0] for name in entry.parents) for entry in merges}
    assert len(trials) > 1


# ---- candidates


def test_earlier_checkpoints_are_merged_and_may_win() -> None:
    """Under-b's earlier checkpoint is as good as under-a: only losses are known of it until it is a parent of the best merge."""
    TRIALS["early"] = (0.8, 0.95, 0.75)
    try:
        landscape = Landscape(quality=0.1)
        pool = [candidate("over-a"), candidate("under-b"), candidate("early@40", complete=False)]
        result = search(landscape, candidates=pool)
        assert result.best_merge is not None
        assert result.best_merge.parents == ("over-a", "early@40")
        assert "early@40" in landscape.measured_in_full, "a parent is compared in full"
        assert result.best_parent is not None
        assert result.best_parent.name == "early@40"
    finally:
        del TRIALS["early"]


def test_the_order_of_the_candidates_does_not_matter() -> None:
    pool = [candidate(name) for name in TRIALS]
    expected = json.dumps(strict_json(search(Landscape(), candidates=pool).to_json()))
    for seed in range(3):
        shuffled = random.Random(seed).sample(pool, len(pool))
        assert json.dumps(strict_json(search(Landscape(), candidates=shuffled).to_json())) == expected
    assert json.dumps(strict_json(search(Landscape(quality=0.1), candidates=pool).to_json())) != expected


@pytest.mark.parametrize(("names", "reason"), [(["under-a", "under-b"], "over-forgets"), (["over-a"], "under-forgets")])
def test_an_empty_side_is_explained_and_the_best_model_returned(names: list[str], reason: str) -> None:
    landscape = Landscape()
    lines: list[str] = []
    result = search(landscape, candidates=[candidate(name) for name in names], log=lines.append)
    assert of_pairs(landscape) == []
    assert reason in (result.reason or "")
    assert result.winner is not None
    assert result.winner.role in ("trial", "control")
    assert result.best_merge is None
    assert result.merge_beats_parents is None
    assert any(reason in line for line in lines)


def test_dead_trials_neither_merge_nor_win() -> None:
    result = search(Landscape(), candidates=[candidate("over-a", verdict="dead", bonus=5.0), candidate("under-a")])
    assert "over-a" not in {entry.name for entry in result.contestants}
    record = next(entry for entry in result.to_json()["candidates"] if entry["name"] == "over-a")
    assert record["excluded"].startswith("dead")
    assert record["sides"] == []


# ---- who wins


class WithScores(Landscape):
    """Full measurements that a test sets, by the beginning of their names."""

    def __init__(self, **scores: dict[str, float | None]) -> None:
        super().__init__(quality=0.1)
        self.set = scores

    def in_full(self, name: str, merge: Merge) -> Mapping[str, float | None] | Failed:
        kind = "scaled" if name.startswith("scaled-") else name if "+" not in name else "merge"
        return dict(super().in_full(name, merge)) | self.set.get(kind, {})


GOOD = full_scores(auc=0.5, retention=0.9, forgetting=0.9)
BETTER = full_scores(auc=0.5, retention=0.95, forgetting=0.95)


def test_a_merge_within_noise_is_not_handed_out() -> None:
    """The same scores, once with an interval clear of 0 and once without; the sentence says which it was."""
    clear, noisy = (
        search(WithScores(merge=BETTER), gain=lambda entry, other, low=low: {"difference": 0.1, "low": low, "high": 0.2})
        for low in (0.01, -0.01)
    )
    assert winner_of(clear)[0] == "merge"
    assert "within noise" not in clear.sentence
    assert winner_of(noisy)[0] in ("trial", "control")
    assert "within noise" in noisy.sentence
    assert "Winner:" in noisy.sentence
    assert noisy.merge_beats_parents is True, "ahead it is"


def test_a_gain_is_taken_over_the_best_single_checkpoint() -> None:
    compared = []

    def gain(entry, other):
        compared.append((entry.role, other.name))
        return {"difference": 0.1, "low": 0.05, "high": 0.2}

    pool = [candidate(name, bonus=0.6 if name == "under-b" else 0.0) for name in TRIALS]
    result = search(WithScores(merge=BETTER), candidates=pool, gain=gain)
    assert {name for role, name in compared if role == "merge"} == {"under-b"} == {result.reference.name if result.reference else ""}
    assert result.best_parent is not None
    assert result.best_parent.name != "under-b", "the best one need not be a parent"


def test_the_better_parent_wins_when_merges_lose() -> None:
    result = search(Landscape(quality=-0.2), candidates=[candidate("over-a"), candidate("under-a", bonus=1.0)])
    assert result.merge_beats_parents is False
    assert winner_of(result) == ("trial", "under-a")
    assert "does not beat its better parent under-a" in result.sentence
    assert result.to_json()["pairs"][0]["outcome"].startswith("finalist, lost: behind trial under-a")


def test_a_control_that_is_ahead_is_handed_out_and_named() -> None:
    result = search(
        WithScores(scaled=BETTER, linear=BETTER, unanimous=BETTER), gain=lambda entry, other: {"difference": 0, "low": -1, "high": 1}
    )
    role, name = winner_of(result)
    assert role == "control"
    assert f"Winner: control {name}" in result.sentence
    behind = search(WithScores(merge=BETTER), gain=lambda entry, other: {"difference": 0.1, "low": 0.05, "high": 0.2})
    assert winner_of(behind)[0] == "merge", "negative control"


def test_every_control_is_measured_on_the_whole_fold() -> None:
    result = search(Landscape(quality=0.1))
    assert result.best_merge is not None
    wanted = {"linear", "unanimous", *(f"scaled-{name}" for name in result.best_merge.parents)}
    controls = {control.name: control for control in result.controls}
    assert wanted <= set(controls)
    assert {control.point.examples for control in controls.values()} == {NUM_EXAMPLES}
    assert controls["unanimous"].parents == tuple(TRIALS)
    for name in result.best_merge.parents:
        point = controls[f"scaled-{name}"].point
        assert point.cheap is not None
        assert abs(point.cheap.mia_auc - 0.5) < abs(TRIALS[name][0] - 0.5), "its scale was moved towards AUC 0.5"
    assert [entry["name"] for entry in result.to_json()["controls"]] == list(controls)


def test_a_merge_that_fails_a_gate_never_wins() -> None:
    """Retention far below half of the baseline's, membership and aggregate perfect."""
    bad = full_scores(auc=0.5, retention=0.2, forgetting=1.0) | {"task_aggregate": 1.0}
    result = search(WithScores(merge=bad))
    assert winner_of(result)[0] != "merge"
    assert result.best_merge is not None
    assert "retention" in (result.best_merge.gate or "")
    assert result.merge_beats_parents is False


def test_points_that_fail_the_cheap_gate_are_not_finalists() -> None:
    class Gated(Landscape):
        def one(self, merge: Merge, stop: int) -> CheapScores | Failed:
            if merge.trials == BEST[:2]:
                return CheapScores(0.0, 0.3, 0.5, 1.0, task_aggregate=1.0)
            return super().one(merge, stop)

    result = search(Gated(quality=0.1))
    assert result.best_merge is not None
    assert result.best_merge.parents != BEST[:2]
    outcome = next(pair["outcome"] for pair in result.to_json()["pairs"] if (pair["over"], pair["under"]) == BEST[:2])
    assert outcome.startswith(("dropped", "not"))


def test_a_failed_measurement_is_a_record_with_a_reason() -> None:
    class Broken(Landscape):
        def one(self, merge: Merge, stop: int) -> CheapScores | Failed:
            if merge.trials[0] == "over-a" and len(merge.trials) == 2:
                return Failed("failed: 3 values of tensor q_proj are not finite")
            if merge.trials[-1] == "under-b" and len(merge.trials) == 2:
                return CheapScores(math.nan, 0.5, 0.5, 1.0)
            return super().one(merge, stop)

    result = search(Broken(quality=0.1))
    errors = {point.error for point in result.points if point.error}
    assert errors == {"failed: 3 values of tensor q_proj are not finite", "its losses are not finite, or a score is missing"}
    assert result.best_merge is not None
    assert result.best_merge.parents == ("over-b", "under-a")
    outcomes = {(pair["over"], pair["under"]): pair["outcome"] for pair in result.to_json()["pairs"]}
    assert "not finite" in outcomes["over-a", "under-a"]


def test_a_full_measurement_that_fails_leaves_the_others() -> None:
    class Lost(Landscape):
        def in_full(self, name: str, merge: Merge) -> Mapping[str, float | None] | Failed:
            return Failed("failed: the disk is full") if merge.trials == BEST[:2] else super().in_full(name, merge)

    result = search(Lost(quality=0.1), finalists=3)
    assert result.best_merge is not None
    assert result.best_merge.parents != BEST[:2]
    assert result.winner is not None


# ---- the objective


def test_final_score_decides_only_where_everyone_has_it() -> None:
    """With MMLU for all, final_score ranks; if one trial lacks it, nobody's is read."""
    mmlu = {"mmlu_average": 0.4}
    with_all = [Candidate(**{**vars(candidate(name)), "scores": {**candidate(name).scores, **mmlu}}) for name in ("over-a", "under-a")]
    measured = WithScores(merge=GOOD | mmlu, scaled=GOOD | mmlu, linear=GOOD | mmlu, unanimous=GOOD | mmlu)
    assert search(measured, candidates=with_all).metric == "final_score"
    assert search(measured, candidates=[with_all[0], candidate("under-a")]).metric == "mean(task_aggregate, mia_score)"


def test_another_objective_chooses_another_merge() -> None:
    """Where only the membership score counts, the scale that meets AUC 0.5 is all that matters; where it has no weight, the aggregate."""
    attack = search(Landscape(quality=0.1), objective=ObjectiveWeights(task_aggregate=0, mmlu_average=0))
    task = search(Landscape(quality=0.1), objective=ObjectiveWeights(mia_score=0, mmlu_average=0))
    assert (attack.metric, task.metric) == ("mean(mia_score)", "mean(task_aggregate)")
    assert attack.best_merge is not None
    assert attack.best_merge.scores is not None
    assert attack.best_merge.scores["mia_auc"] == pytest.approx(0.5, abs=0.02)
    assert search(Landscape(), objective=ObjectiveWeights(task_aggregate=2)).metric == "mean(2 * task_aggregate, mia_score)"


# ---- the record


def test_the_record_tells_every_pair_and_every_cost() -> None:
    result = search(Landscape(quality=0.1), max_pairs=3, calibrated=1)
    record = json.loads(json.dumps(strict_json(result.to_json())))
    outcomes = [pair["outcome"] for pair in record["pairs"]]
    assert len(outcomes) == 4
    assert outcomes[3].startswith("not measured: its prediction ranks 4")
    assert all(outcomes)
    assert sum(outcome.startswith("won") for outcome in outcomes) == (record["winner"]["role"] == "merge")
    assert sum("pairs are calibrated" in outcome for outcome in outcomes) == 2
    assert {entry["name"] for entry in record["candidates"]} == set(TRIALS)
    measured = record["pairs"][0]["points"][0]
    assert set(measured) == {"density", "share", "scale", "examples", "cheap", "objective", "gate", "error"}
    assert set(record["pairs"][0]["prediction"]) == {"task_aggregate", "mia_auc", "score", "share"}
    assert {"examples", "merges", "full", "rows_generated", "exhaustive_merges", "exhaustive_examples"} <= set(record["cost"])
    assert {"linear", "unanimous"} <= {control["name"] for control in record["controls"]}


def test_without_a_hash_the_content_follows_the_files(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    hashes = []
    for seed in (1, 1, 2):
        trial = write_lora(tmp_path / "trial", base=base, seed=seed)
        hashes.append(content_of(Candidate(**{**vars(candidate("over-a")), "checkpoint": trial, "content_hash": ""})))
    assert hashes[0] == hashes[1] != hashes[2] != ""

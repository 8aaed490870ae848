"""The pair search: cheap measurements for many merges, full ones for finalists, and a winner that may be a parent."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from merging.calibration import next_scale, reachable_auc
from merging.config import MergeConfig, PairConfig
from merging.outcome import Contestant, PairSearchResult, Point, better, rank
from merging.pairs import (
    Candidate,
    CheapScores,
    Pair,
    bracketing_pairs,
    cheap_objective,
    control_configs,
    failed_cheap_gate,
    failed_gate,
    sides_of,
)
from merging.task_vectors import checkpoint_hash, resolve_checkpoint
from trainers.errors import InputError, RunError
from trainers.files import sha256_json, strict_json

Scores = Mapping[str, float | None]
MeasureCheap = Callable[[Pair, MergeConfig], CheapScores]
MeasureFull = Callable[[Pair, MergeConfig, str], Scores]


def search_pairs(
    *,
    candidates: Sequence[Candidate],
    baseline_scores: Scores,
    measure_cheap: MeasureCheap,
    measure_full: MeasureFull,
    config: PairConfig,
    merge: MergeConfig,
    log: Callable[[str], None] | None = None,
    done: Mapping[str, Mapping[str, Any]] | None = None,
    record: Callable[[str, dict[str, Any]], None] | None = None,
) -> PairSearchResult:
    """Find the best merge of an over-forgetting and an under-forgetting trial, and say whether it beats its parents.

    1. Pairs that bracket AUC 0.5, ordered by a prediction from their parents' scores; the first ``max_pairs`` go on.
    2. Every density at scale 1, measured cheaply.
    3. The scale of the most promising points is moved until the AUC meets 0.5.
    4. The best points, of different pairs where possible, are measured in full, then the linear control of the best one's pair.
    5. Merges, controls and all live trials are ranked together; the best merge or trial wins. Without a pair, the trials alone.

    A measurement that raises InputError or RunError is kept as a failed point with its reason. Keys are hashes of the parents' contents and
    the merge's configuration, so a resumed search measures nothing twice.

    Args:
        candidates: finished trials with scores of the validation fold.
        baseline_scores: the untouched target's scores of that fold.
        measure_cheap: losses of a merge, on the validation fold.
        measure_full: the ``scores`` of an evaluation report of a merge, on the validation fold; the last argument is the merge's name.
        merge: method and parameters; density and scale are the search's own.
        done: earlier measurements by key, as ``record`` received them.
        record: called after every new measurement.
    """
    sides = sides_of(candidates)
    pairs = bracketing_pairs(candidates)
    search = _Search(baseline_scores, measure_cheap, measure_full, config, merge, log or (lambda line: None), dict(done or {}), record)
    if sides.reason:
        search.log(f"no pair to merge: {sides.reason}")
    measured = pairs[: config.max_pairs]
    for number, pair in enumerate(measured, start=1):
        search.log(f"pair {number}/{len(measured)} {pair.name}: predicted {pair.prediction.score:.3f}")
        search.at_scale_one(pair)
    search.calibrate()
    merges = [search.contestant(point.pair, point.config, role="merge", name=_merge_name(point)) for point in search.finalists()]
    trials = [_trial(candidate, baseline_scores, config) for candidate in candidates if candidate.name not in _gone(candidates)]
    best = rank([*merges, *trials]).first("merge")
    controls: list[Contestant] = []
    if best is not None and best.scores is not None and best.pair is not None:
        controls = [
            search.contestant(best.pair, control, role="control", name=name) for name, control in control_configs(best.pair).items()
        ]
    ranking = rank([*merges, *controls, *trials])
    best_merge = next((entry for entry in ranking.contestants if entry.role == "merge" and entry.scores is not None), None)
    parents = [entry for entry in ranking.contestants if entry.role == "trial" and (not best_merge or entry.name in best_merge.parents)]
    best_parent = parents[0] if parents else None
    beats = better(best_merge, best_parent, metric=ranking.metric) if best_merge else None
    # The controls are there to be compared with, not to be handed out.
    winner = next((entry for entry in ranking.contestants if entry.alive and entry.role != "control"), None)
    result = PairSearchResult(
        candidates=tuple(candidates),
        sides=sides,
        pairs=tuple(pairs),
        num_measured_pairs=len(measured),
        points=tuple(search.points),
        contestants=ranking.contestants,
        metric=ranking.metric,
        winner=winner,
        best_merge=best_merge,
        best_parent=best_parent,
        merge_beats_parents=beats,
        cost=search.cost,
        config=config,
        merge=merge,
    )
    search.log(result.sentence)
    return result


def measurement_key(kind: str, *, pair: Pair, config: MergeConfig) -> str:
    """Hash of what a measurement depends on: its kind, the parents' names and contents, and the merge."""
    parents = [[candidate.name, content_of(candidate)] for candidate in (pair.over, pair.under)]
    return sha256_json({"kind": kind, "parents": parents, "merge": config.model_dump(mode="json")})


def content_of(candidate: Candidate) -> str:
    """The hash of a candidate's checkpoint, computed from the files unless the candidate carries it."""
    return candidate.content_hash or checkpoint_hash(resolve_checkpoint(candidate.checkpoint))


@dataclass
class _Search:
    """Measurements of one search and their bookkeeping."""

    baseline: Scores
    measure_cheap: MeasureCheap
    measure_full: MeasureFull
    config: PairConfig
    merge: MergeConfig
    log: Callable[[str], None]
    done: dict[str, Mapping[str, Any]]
    record: Callable[[str, dict[str, Any]], None] | None
    points: list[Point] = field(default_factory=list)
    cost: dict[str, int] = field(
        default_factory=lambda: {"cheap_measured": 0, "cheap_reused": 0, "full_measured": 0, "full_reused": 0, "failed": 0}
    )

    def at_scale_one(self, pair: Pair) -> None:
        densities = self.config.densities if self.merge.method == "ties" else (self.merge.density,)
        for density in dict.fromkeys(densities):
            self.measure(pair, density=density, scale=1.0)

    def measure(self, pair: Pair, *, density: float, scale: float) -> Point:
        """A cheap point, added to the list."""
        config = self.merge.model_copy(update={"density": density, "scale": scale})
        scores, error = self._scores("cheap", pair, config, lambda: _asdict(self.measure_cheap(pair, config)))
        cheap = None if scores is None else CheapScores.from_scores(scores)
        if cheap is not None and not cheap.is_finite:
            cheap, error = None, "its losses are not finite, or a score is missing"
        if cheap is None:
            point = Point(pair=pair, config=config, cheap=None, objective=None, gate=None, error=error)
        else:
            gate = failed_cheap_gate(cheap, baseline=self.baseline, config=self.config)
            point = Point(pair=pair, config=config, cheap=cheap, objective=cheap_objective(cheap), gate=gate, error=None)
        self.points.append(point)
        self.log(f"  {pair.name} {point.describe()}")
        return point

    def calibrate(self) -> None:
        """Move the scale of the most promising points until the AUC meets 0.5 or the steps are used up."""
        starts = sorted((point for point in self.points if point.cheap), key=lambda point: (-self._promise(point), point.order))
        for start in starts[: self.config.calibrated]:
            assert start.cheap is not None
            auc_at = {start.config.scale: start.cheap.mia_auc}
            baseline_auc = self.baseline.get("mia_auc")
            if baseline_auc is not None:
                auc_at[0.0] = baseline_auc
            for _ in range(self.config.scale_steps):
                scale = next_scale(auc_at=auc_at, bounds=self.config.scale_bounds, tolerance=self.config.auc_tolerance)
                if scale is None:
                    break
                point = self.measure(start.pair, density=start.config.density, scale=scale)
                if point.cheap is None:
                    break
                auc_at[scale] = point.cheap.mia_auc

    def finalists(self) -> list[Point]:
        """The points to measure in full: the best of each pair first, then the next best of any.

        One that fails a gate is measured only if none passes, so that the report can show what a merge would give.
        """
        ranked = sorted((point for point in self.points if point.cheap), key=lambda point: point.order)
        ranked = [point for point in ranked if not point.gate] or ranked[:1]
        first = list({point.pair.name: point for point in reversed(ranked)}.values())
        first.sort(key=lambda point: point.order)
        rest = [point for point in ranked if point not in first]
        return [*first, *rest][: self.config.finalists]

    def contestant(self, pair: Pair, config: MergeConfig, *, role: str, name: str) -> Contestant:
        """A merge or control measured in full."""
        scores, error = self._scores("full", pair, config, lambda: dict(self.measure_full(pair, config, name)))
        gate = error if scores is None else failed_gate(scores, baseline=self.baseline, config=self.config)
        entry = Contestant(name=name, role=role, scores=scores, alive=gate is None, gate=gate, pair=pair, config=config)
        self.log(f"  {role} {name} in full: {entry.describe()}")
        return entry

    def _scores(self, kind: str, pair: Pair, config: MergeConfig, measure: Callable[[], Scores]) -> tuple[Scores | None, str | None]:
        key = measurement_key(kind, pair=pair, config=config)
        if key in self.done:
            self.cost[f"{kind}_reused"] += 1
            return self.done[key]["scores"], None
        try:
            scores = strict_json(dict(measure()))
        except (InputError, RunError) as error:
            self.cost["failed"] += 1
            return None, f"failed: {error.what}"
        self.cost[f"{kind}_measured"] += 1
        entry = {"kind": kind, "over": pair.over.name, "under": pair.under.name, "config": config.model_dump(mode="json"), "scores": scores}
        self.done[key] = entry
        if self.record:
            self.record(key, entry)
        return scores, None

    def _promise(self, point: Point) -> float:
        """The objective with the membership score that the scale can still reach.

        A point comes behind all others if it fails a gate and needs an even larger scale.
        """
        assert point.cheap is not None
        baseline_auc = self.baseline.get("mia_auc")
        auc = reachable_auc(baseline_auc=baseline_auc, auc=point.cheap.mia_auc, bounds=self.config.scale_bounds)
        promise = cheap_objective(point.cheap) + (1 - 2 * abs(auc - 0.5) - point.cheap.mia_score) / 3
        hopeless = point.gate is not None and (baseline_auc is None or point.cheap.mia_auc > 0.5)
        return promise - hopeless


def _asdict(scores: CheapScores) -> dict[str, float | None]:
    return {name: getattr(scores, name) for name in scores.__dataclass_fields__}


def _merge_name(point: Point) -> str:
    return f"{point.pair.name} density {point.config.density:g} scale {point.config.scale:g}"


def _gone(candidates: Sequence[Candidate]) -> set[str]:
    return {candidate.name for candidate in candidates if candidate.verdict in ("dead", "untouched")}


def _trial(candidate: Candidate, baseline: Scores, config: PairConfig) -> Contestant:
    gate = failed_gate(candidate.scores, baseline=baseline, config=config)
    scores = {name: value if value is None or math.isfinite(value) else None for name, value in candidate.scores.items()}
    return Contestant(name=candidate.name, role="trial", scores=scores, alive=gate is None, gate=gate, pair=None, config=None)

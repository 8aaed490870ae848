"""The pair search: many merges on few examples, few on all of them, finalists in full, and a winner that may be a single checkpoint."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from merging.calibration import next_scale
from merging.config import MergeConfig, PairConfig
from merging.examples import rung_sizes
from merging.ledger import Failed, Measurements, Merge, Scores
from merging.outcome import Contestant, Control, PairSearchResult, Point, Ranking, rank
from merging.pairs import (
    Candidate,
    Pair,
    bracketing_pairs,
    cheap_objective,
    failed_cheap_gate,
    failed_gate,
    merge_config,
    objective_value,
    sides_of,
)
from merging.task_vectors import checkpoint_hash, resolve_checkpoint

T = TypeVar("T")
Gain = Callable[[Contestant, Contestant], Mapping[str, float] | None]
"""How much better the first is than the second: ``difference``, ``low`` and ``high``, or null if it is not known."""

EARLY_STEPS = 1
"""Further measurements of a merge before the last rung: enough to bring the AUC near 0.5, which few documents tell but roughly."""
CONTROL_BOUNDS = (0.05, 3.0)
"""Scales of a single checkpoint. Wider than those of merges: a control must not lose because it was held back."""


def search_pairs(
    *,
    candidates: Sequence[Candidate],
    baseline_scores: Scores,
    measurements: Measurements,
    config: PairConfig,
    merge: MergeConfig,
    gain: Gain | None = None,
    log: Callable[[str], None] | None = None,
) -> PairSearchResult:
    """Find the best merge of an over-forgetting and an under-forgetting checkpoint, and say whether it beats what needs no merge.

    1. Pairs that bracket AUC 0.5, ordered by a prediction from their parents' scores; the first ``max_pairs`` go on, at most half of them
       with any one checkpoint.
    2. One merge of each on the first examples, with the weights that the prediction says meet AUC 0.5.
    3. The best ``calibrated`` pairs: every density with several weights. Successive halving: the best of them meet more examples, and the
       scale of each is moved until its AUC meets 0.5.
    4. The best of different pairs are measured in full, with generation; so are the parents of the best merge, the best control, and an
       earlier checkpoint that looks better than every final one.
    5. The best of them is handed out; but a merge only if its gain over the best single checkpoint is clear of noise.

    The order of the candidates does not matter, and ties are broken by name. Nothing here is random: the examples and their order are
    the measurements' own.

    Args:
        candidates: checkpoints with scores of the validation fold.
        baseline_scores: the untouched target's scores of that fold.
        measurements: what measures, keeps and counts.
        config: budget, objective and gates.
        merge: method and parameters; density, scale and, unless they are given, weights are the search's own.
        gain: compares two fully measured models; without it, being ahead is enough.
        log: called with one line per step.
    """
    candidates = sorted(candidates, key=lambda candidate: candidate.name)
    sides, pairs = sides_of(candidates), tuple(bracketing_pairs(candidates))
    search = _Search(baseline_scores, measurements, config, merge, log or (lambda line: None))
    if sides.reason:
        search.log(f"no pair to merge: {sides.reason}")
    finalists = search.finalists(search.halve(search.first_arms(pairs)))
    trials = [search.trial(candidate) for candidate in candidates if candidate.complete and not _is_gone(candidate)]
    trials += search.checkpoints(candidates)
    merges = search.contestants(finalists)
    best = rank([*merges, *trials], weights=config.objective).best("merge")
    trials += search.parents(best, known=[entry.name for entry in trials])
    controls = search.controls(best, candidates=candidates)
    ranking = rank([*merges, *search.best_control(controls), *trials], weights=config.objective)
    decision = _decide(ranking, gain=gain)
    result = PairSearchResult(
        candidates=tuple(candidates),
        sides=sides,
        pairs=pairs,
        dropped=search.dropped,
        points=tuple(search.points),
        controls=tuple(controls),
        ranking=ranking,
        cost={**measurements.cost, **_exhaustive(pairs, measurements=measurements, config=config, merge=merge)},
        config=config,
        merge=merge,
        **decision,
    )
    search.log(result.sentence)
    return result


def content_of(candidate: Candidate) -> str:
    """The hash of a candidate's checkpoint, computed from the files unless the candidate carries it."""
    return candidate.content_hash or checkpoint_hash(resolve_checkpoint(candidate.checkpoint))


@dataclass
class _Arm:
    """A merge whose scale is free, and what was measured of it on the current rung; the trials are a pair's, or a control's."""

    trials: tuple[str, ...]
    at_scale: Callable[[float], MergeConfig]
    bounds: tuple[float, float]
    pair: Pair | None = None
    density: float = 1.0
    share: float | None = None
    scale: float = 1.0
    points: list[Point] = field(default_factory=list)

    @property
    def best(self) -> Point:
        """Its best measurement on the current rung."""
        return min(self.points, key=lambda point: point.order)

    @property
    def order(self) -> tuple:
        """Sorts the best first."""
        return self.best.order

    def auc_at(self, baseline_auc: float | None) -> dict[float, float]:
        """Membership AUC by scale on the current rung; the untouched target is scale 0."""
        known = {} if baseline_auc is None else {0.0: baseline_auc}
        return known | {point.config.scale: point.cheap.mia_auc for point in self.points if point.cheap is not None}


@dataclass
class _Search:
    """Measurements of one search and their bookkeeping."""

    baseline: Scores
    measurements: Measurements
    config: PairConfig
    merge: MergeConfig
    log: Callable[[str], None]
    points: list[Point] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)

    @property
    def rungs(self) -> tuple[int, ...]:
        """Examples of each rung."""
        return rung_sizes(self.measurements.num_examples, first=self.config.first_rung, eta=self.config.eta)

    # ---- from pairs to arms

    def first_arms(self, pairs: Sequence[Pair]) -> list[_Arm]:
        """The merges that take part in the halving, measured on the first rung."""
        chosen = _spread(pairs, number=self.config.max_pairs, parents=lambda pair: pair.trials)
        for number, pair in enumerate(pairs, start=1):
            self.dropped[pair.name] = f"not measured: its prediction ranks {number}, and the search measures {len(chosen)}"
        if not chosen:
            return []
        self.log(f"{len(pairs)} pairs bracket AUC 0.5, {len(chosen)} are measured on {self.rungs[0]} of {self.rungs[-1]} examples")
        if not self.config.calibrated:
            arms = self.arms([(pair, density, 0.5) for pair in chosen for density in self.densities])
            self.advance(arms, size=self.rungs[0], steps=0)
            return self.living(arms)
        # The density in the middle stands for all: pairs differ by more than densities do.
        middle = self.densities[len(self.densities) // 2]
        first = self.arms([(pair, middle, pair.prediction.share) for pair in chosen])
        self.advance(first, size=self.rungs[0], steps=self.steps)
        screened = self.living(first)
        chosen_arms = _spread(screened, number=self.config.calibrated, parents=lambda arm: arm.trials)
        for number, arm in enumerate(screened, start=1):
            self.drop(arm, f"on {self.rungs[0]} examples it ranks {number}, and {len(chosen_arms)} pairs are calibrated")
        wanted = [
            (arm.pair, density, share)
            for arm in chosen_arms
            if arm.pair is not None
            for density in self.densities
            for share in sorted({arm.pair.prediction.share, *self.config.shares})
        ]
        known = {(arm.trials, arm.density, arm.share) for arm in chosen_arms}
        more = [arm for arm in self.arms(wanted) if (arm.trials, arm.density, arm.share) not in known]
        self.advance(more, size=self.rungs[0], steps=self.steps)
        return self.living([*chosen_arms, *more])

    @property
    def densities(self) -> tuple[float, ...]:
        """Those that the method can have, from small to large."""
        if not self.merge.reads("density"):
            return (self.merge.density,)
        possible = [density for density in sorted(set(self.config.densities)) if _is_possible(self.merge, density)]
        return tuple(possible) or (self.merge.density,)

    @property
    def steps(self) -> int:
        """Further measurements per arm on the current rung, unless it is the last."""
        return self.config.scale_steps if len(self.rungs) == 1 else min(EARLY_STEPS, self.config.scale_steps)

    def arms(self, wanted: Sequence[tuple[Pair, float, float]]) -> list[_Arm]:
        """Arms of pairs, densities and shares."""
        fixed = self.merge.weights is not None
        found: dict[tuple, _Arm] = {}
        for pair, density, share in wanted:
            arm = _Arm(
                trials=pair.trials,
                at_scale=lambda scale, density=density, share=share: merge_config(  # type: ignore[misc]
                    self.merge, share=share, density=density, scale=scale
                ),
                bounds=self.config.scale_bounds,
                pair=pair,
                density=density,
                share=None if fixed else share,
            )
            found.setdefault((arm.trials, arm.density, arm.share), arm)
        return list(found.values())

    # ---- measuring

    def advance(self, arms: Sequence[_Arm], *, size: int, steps: int, owed: bool = False) -> None:
        """Measure arms on a rung: at their scale, then at up to ``steps`` more, moving the scale until the AUC meets 0.5.

        Args:
            arms: what they know from another rung is forgotten, but for the scale.
            size: examples of the rung.
            steps: further measurements of each.
            owed: measured even if the budget is used up.
        """
        for arm in arms:
            arm.points = []
        self.measure([(arm, arm.scale) for arm in arms], size=size, owed=owed)
        for _ in range(steps):
            wanted = []
            for arm in arms:
                if arm.points and all(point.cheap is not None for point in arm.points):
                    auc_at = arm.auc_at(self.baseline.get("mia_auc"))
                    scale = next_scale(auc_at=auc_at, bounds=arm.bounds, tolerance=self.config.auc_tolerance)
                    wanted += [] if scale is None else [(arm, scale)]
            if not wanted:
                break
            self.measure(wanted, size=size, owed=owed)
        for arm in arms:
            if arm.points and arm.best.cheap is not None:
                arm.scale = arm.best.config.scale

    def measure(self, wanted: Sequence[tuple[_Arm, float]], *, size: int, owed: bool = False) -> None:
        """One wave of measurements, maybe several at a time; as many as the budget allows, unless they are owed."""
        limit = self.config.max_passes
        if limit is not None and not owed:
            left = limit * self.measurements.num_examples - self.measurements.cost["examples"]
            wanted, rest = wanted[: max(0, int(left // size))], wanted[max(0, int(left // size)) :]
            for arm, _ in rest:
                if not arm.points:
                    self.drop(arm, f"the budget of {limit:g} passes over the validation fold was used up")
        merges = [Merge(arm.trials, arm.at_scale(scale)) for arm, scale in wanted]
        for (arm, _), merge, scores in zip(wanted, merges, self.measurements.cheap(merges, stop=size), strict=True):
            error = scores.reason if isinstance(scores, Failed) else None
            cheap = None if isinstance(scores, Failed) else scores
            if cheap is not None and not cheap.is_finite:
                cheap, error = None, "its losses are not finite, or a score is missing"
            objective = gate = None
            if cheap is not None:
                objective = cheap_objective(cheap, weights=self.config.objective)
                gate = failed_cheap_gate(cheap, baseline=self.baseline, config=self.config)
            point = Point(arm.pair, merge.config, arm.share, size, cheap, objective, gate, error)
            arm.points.append(point)
            if arm.pair is not None:
                self.points.append(point)
            self.log(f"  {'+'.join(arm.trials)} {point.describe()}")

    def living(self, arms: Sequence[_Arm]) -> list[_Arm]:
        """The arms that could be measured, best first; the others are dropped with their reason."""
        for arm in arms:
            if arm.points and arm.best.cheap is None:
                self.drop(arm, str(arm.best.error))
        return sorted((arm for arm in arms if arm.points and arm.best.cheap is not None), key=lambda arm: arm.order)

    def drop(self, arm: _Arm, reason: str) -> None:
        """Remember why a pair went no further; the last arm's reason stays."""
        if arm.pair is not None:
            self.dropped[arm.pair.name] = f"dropped: {reason}"

    # ---- halving

    def halve(self, arms: list[_Arm]) -> list[_Arm]:
        """Let the best of the arms meet more and more examples; the survivors have met all, and come best first."""
        for size in self.rungs[1:]:
            number = max(self.config.finalists, math.ceil(len(arms) / self.config.eta))
            kept = _spread(arms, number=number, parents=lambda arm: ("+".join(arm.trials),))
            for arm in reversed(arms):
                if not any(arm is one for one in kept):
                    self.drop(arm, f"its objective on {arm.best.examples} examples, {_number(arm.best)}, is not among the best {len(kept)}")
            self.log(f"{len(kept)} of {len(arms)} merges go on to {size} examples")
            steps = self.config.scale_steps if self.config.calibrated else 0
            before = [arm.points for arm in kept]
            self.advance(kept, size=size, steps=steps if size == self.rungs[-1] else min(EARLY_STEPS, steps))
            if not any(arm.points for arm in kept):  # the budget was used up: what is known has to do
                for arm, points in zip(kept, before, strict=True):
                    arm.points = points
                return kept
            arms = self.living(kept)
        return arms

    def finalists(self, arms: Sequence[_Arm]) -> list[Point]:
        """The points to measure in full: the best of each pair of trials first, then of each pair of checkpoints, then the next best.

        One that fails a gate is measured only if none passes, so that the report can show what a merge would give.
        """
        passed = [arm for arm in arms if not arm.best.gate] or list(arms[:1])
        for arm in reversed(arms):
            why = arm.best.gate or f"its objective on {arm.best.examples} examples, {_number(arm.best)}, is not among the best"
            self.drop(arm, f"not a finalist: {why}")
        order = [*_firsts(passed, key=_trial_names), *_firsts(passed, key=lambda arm: arm.trials), *passed]
        chosen = list({id(arm): arm for arm in order}.values())[: self.config.finalists]
        return [arm.best for arm in sorted(chosen, key=lambda arm: arm.order)]

    # ---- in full

    def contestants(self, points: Sequence[Point]) -> list[Contestant]:
        """Finalists measured in full."""
        names = {f"{point.pair.name} {point.place}": point for point in points if point.pair is not None}
        merges = {name: Merge(point.pair.trials, point.config) for name, point in names.items() if point.pair is not None}
        found = []
        for (name, point), scores in zip(names.items(), self.measurements.full(merges), strict=True):
            assert point.pair is not None
            place = {"pair": point.pair, "parents": point.pair.trials, "config": point.config, "share": point.share}
            found.append(self.contestant(scores, name=name, role="merge", **place))
        return found

    def contestant(self, scores: Scores | Failed, *, name: str, role: str, **place: Any) -> Contestant:
        """A merge, control or checkpoint that was measured in full."""
        if isinstance(scores, Failed):
            entry = Contestant(name=name, role=role, scores=None, alive=False, gate=scores.reason, **place)
        else:
            gate = failed_gate(scores, baseline=self.baseline, config=self.config)
            entry = Contestant(name=name, role=role, scores=scores, alive=gate is None, gate=gate, **place)
        self.log(f"  {role} {name} in full: {entry.describe()}")
        return entry

    def trial(self, candidate: Candidate) -> Contestant:
        """A checkpoint whose full scores are known."""
        gate = failed_gate(candidate.scores, baseline=self.baseline, config=self.config)
        scores = {name: value if value is None or math.isfinite(value) else None for name, value in candidate.scores.items()}
        return Contestant(name=candidate.name, role="trial", scores=scores, alive=gate is None, gate=gate)

    def checkpoints(self, candidates: Sequence[Candidate]) -> list[Contestant]:
        """The best earlier checkpoint in full, if it looks better than every final one."""
        live = [candidate for candidate in candidates if candidate.cheap is not None and not _is_gone(candidate)]
        best = min(live, key=lambda candidate: (-self.estimate(candidate), candidate.name), default=None)
        if best is None or best.complete or failed_cheap_gate(best.cheap, baseline=self.baseline, config=self.config):  # type: ignore[arg-type]
            return []
        (scores,) = self.measurements.full({best.name: single(best.name, scale=1.0)})
        return [self.contestant(scores, name=best.name, role="trial")]

    def parents(self, best: Contestant | None, *, known: Sequence[str]) -> list[Contestant]:
        """The parents of the best merge that were not measured in full yet."""
        names = [name for name in best.parents if name not in known] if best is not None else []
        found = self.measurements.full({name: single(name, scale=1.0) for name in names})
        return [self.contestant(scores, name=name, role="trial") for name, scores in zip(names, found, strict=True)]

    def estimate(self, candidate: Candidate) -> float:
        """The objective that forward passes tell, or the one that is known."""
        if candidate.cheap is not None:
            return cheap_objective(candidate.cheap, weights=self.config.objective)
        return objective_value(candidate.scores, weights=self.config.objective)

    # ---- controls

    def controls(self, best: Contestant | None, *, candidates: Sequence[Candidate]) -> list[Control]:
        """What the best merge has to be compared with, measured on the whole fold without generation."""
        live = [candidate for candidate in candidates if not _is_gone(candidate)]
        final = [candidate for candidate in live if candidate.complete]
        scaled = list(best.parents) if best is not None else []
        leader = min(live, key=lambda candidate: (-self.estimate(candidate), candidate.name), default=None)
        scaled += [leader.name] if leader is not None and leader.name not in scaled else []
        arms: dict[str, tuple[str, _Arm]] = {}
        if best is not None:
            plain = MergeConfig(method="linear")
            arms["linear"] = ("linear mean of both parents", _Arm(best.parents, lambda scale: plain, (1.0, 1.0)))
        if len(final) > 1:
            unanimous = MergeConfig(method="unanimous")
            names = tuple(candidate.name for candidate in final)
            label = f"sign-unanimous mean of {len(final)} trials"
            arms["unanimous"] = (label, _Arm(names, lambda scale: unanimous, (1.0, 1.0)))
        fixed = [arm for _, arm in arms.values()]
        for name in scaled:
            arm = _Arm((name,), lambda scale: MergeConfig(method="linear", scale=scale), CONTROL_BOUNDS)
            arms[f"scaled-{name}"] = (f"{name} scaled to AUC 0.5", arm)
        self.advance(fixed, size=self.rungs[-1], steps=0, owed=True)
        free = [arm for _, arm in arms.values() if arm.bounds == CONTROL_BOUNDS]
        self.advance(free, size=self.rungs[-1], steps=max(1, self.config.scale_steps), owed=True)
        return [Control(name=name, label=label, parents=arm.trials, point=arm.best) for name, (label, arm) in arms.items()]

    def best_control(self, controls: Sequence[Control]) -> list[Contestant]:
        """The most promising control in full: only that one may be handed out."""
        ranked = sorted((one for one in controls if one.point.cheap is not None), key=lambda one: (*one.point.order[:3], one.name))
        if not ranked:
            return []
        best = ranked[0]
        (scores,) = self.measurements.full({best.name: Merge(best.parents, best.point.config)})
        return [self.contestant(scores, name=best.name, role="control", parents=best.parents, config=best.point.config)]


def single(name: str, *, scale: float) -> Merge:
    """One checkpoint with its update scaled."""
    return Merge((name,), MergeConfig(method="linear", scale=scale))


def _decide(ranking: Ranking, *, gain: Gain | None) -> dict[str, Any]:
    """The winner and what it was compared with."""

    def gained(entry: Contestant | None) -> Mapping[str, float] | None:
        return gain(entry, reference) if gain and entry is not None and reference is not None and entry.scores is not None else None

    def is_clear(entry: Contestant) -> bool:
        if gain is None or reference is None:
            return True
        found = gained(entry)
        return found is not None and found["low"] > 0

    best_merge = ranking.best("merge")
    reference = ranking.best("trial", alive=True)
    parents = [entry for entry in ranking.contestants if entry.role == "trial" and (not best_merge or entry.name in best_merge.parents)]
    winner = next((entry for entry in ranking.contestants if entry.alive and (entry.role != "merge" or is_clear(entry))), None)
    return {
        "winner": winner,
        "best_merge": best_merge,
        "best_parent": parents[0] if parents else None,
        "reference": reference,
        "gain": gained(best_merge),
    }


def _exhaustive(pairs: Sequence[Pair], *, measurements: Measurements, config: PairConfig, merge: MergeConfig) -> dict[str, int]:
    """What the same densities, weights and scales would cost for every pair on the whole fold."""
    densities = len(set(config.densities)) if merge.reads("density") else 1
    shares = 1 + len(set(config.shares)) if merge.weights is None and config.calibrated else 1
    merges = len(pairs) * densities * shares * (1 + config.scale_steps)
    return {"exhaustive_merges": merges, "exhaustive_examples": merges * measurements.num_examples}


def _spread(ranked: Sequence[T], *, number: int, parents: Callable[[T], Sequence[str]]) -> list[T]:
    """The best of them, at most half with any one parent: neighbours of one point would teach the same. Others only fill the number up.

    Args:
        ranked: best first.
        number: how many.
        parents: what each is counted under.
    """
    most, count = math.ceil(number / 2), Counter[str]()
    kept: list[T] = []
    rest: list[T] = []
    for entry in ranked:
        if len(kept) < number and all(count[name] < most for name in parents(entry)):
            kept.append(entry)
            count.update(parents(entry))
        else:
            rest.append(entry)
    return [*kept, *rest][:number]


def _firsts(arms: Sequence[_Arm], *, key: Callable[[_Arm], Any]) -> list[_Arm]:
    """The first arm of each kind."""
    found: dict[Any, _Arm] = {}
    for arm in arms:
        found.setdefault(key(arm), arm)
    return list(found.values())


def _trial_names(arm: _Arm) -> tuple[str, ...]:
    return (arm.pair.over.trial, arm.pair.under.trial) if arm.pair else arm.trials


def _is_gone(candidate: Candidate) -> bool:
    return candidate.verdict in ("dead", "untouched")


def _is_possible(merge: MergeConfig, density: float) -> bool:
    try:
        merge_config(merge, share=None, density=density, scale=1.0)
    except ValueError:
        return False
    return True


def _number(point: Point) -> str:
    return "–" if point.objective is None else f"{point.objective:.3f}"

"""What a pair search measured and decided, and how it is written to ``pairs.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from eval.forgetting import Verdict, rank_key
from merging.config import MergeConfig, PairConfig
from merging.pairs import Candidate, CheapScores, Pair, Sides
from trainers.files import strict_json

SCHEMA_VERSION = 1
FINAL_SCORE = "final_score"


@dataclass(frozen=True)
class Point:
    """One cheaply measured merge."""

    pair: Pair
    config: MergeConfig
    cheap: CheapScores | None
    objective: float | None
    gate: str | None
    """The gate that it fails, in words."""
    error: str | None
    """Why it could not be measured."""

    @property
    def order(self) -> tuple:
        """Sorts the best first: gates passed, then objective, then names and parameters, so that the order is always the same."""
        objective = -2.0 if self.objective is None else self.objective
        return (self.cheap is None, self.gate is not None, -objective, self.pair.name, self.config.density, self.config.scale)

    def describe(self) -> str:
        """One line for the log."""
        place = f"density {self.config.density:g} scale {self.config.scale:g}"
        if self.cheap is None:
            return f"{place}: {self.error}"
        return f"{place}: AUC {self.cheap.mia_auc:.3f}, objective {self.objective:.3f}" + (f", gate: {self.gate}" if self.gate else "")


@dataclass(frozen=True)
class Contestant:
    """A merge, control or trial with full validation scores (null if measuring failed)."""

    name: str
    role: str
    """``merge``, ``control`` or ``trial``."""
    scores: Mapping[str, float | None] | None
    alive: bool
    gate: str | None
    pair: Pair | None
    config: MergeConfig | None

    @property
    def parents(self) -> tuple[str, ...]:
        """Names of the merged trials; empty for a trial."""
        return self.pair.trials if self.pair else ()

    def value(self, metric: str) -> float:
        """The number that decides: ``final_score``, or the mean of task aggregate and membership score; -inf if nothing was measured."""
        return self._key(metric)[1]

    def order(self, metric: str) -> tuple:
        """Sorts the best first: alive, then the metric, then the harmonic mean of forgetting and retention."""
        alive, value, smooth = self._key(metric)
        return (not alive, -value, -smooth)

    def _key(self, metric: str) -> tuple[bool, float, float]:
        scores = dict(self.scores or {})
        if metric != FINAL_SCORE:
            # MMLU that some contestants lack must not enter the comparison of others.
            scores |= {FINAL_SCORE: None, "mmlu_average": None}
        return rank_key(verdict=Verdict.BALANCED if self.alive else Verdict.DEAD, scores=scores)

    def describe(self) -> str:
        """One line for the log."""
        if self.scores is None:
            return str(self.gate)
        names = ("final_score", "task_aggregate", "mia_score", "retention", "forgetting")
        text = ", ".join(f"{name} {value:.3f}" for name in names if (value := self.scores.get(name)) is not None)
        return text + (f", gate: {self.gate}" if self.gate else "")


@dataclass(frozen=True)
class Ranking:
    """Contestants, best first, and the metric that ordered them."""

    contestants: tuple[Contestant, ...]
    metric: str

    def first(self, role: str) -> Contestant | None:
        """The best contestant of a role."""
        return next((entry for entry in self.contestants if entry.role == role), None)


def rank(contestants: Sequence[Contestant]) -> Ranking:
    """Order by ``final_score`` if every measured contestant has it, else by the mean of task aggregate and membership score.

    One that is alive comes before one that is not. Equal ones keep the order in which they are given.
    """
    measured = [entry for entry in contestants if entry.scores is not None]
    complete = bool(measured) and all((entry.scores or {}).get(FINAL_SCORE) is not None for entry in measured)
    metric = FINAL_SCORE if complete else "mean(task_aggregate, mia_score)"
    return Ranking(contestants=tuple(sorted(contestants, key=lambda entry: entry.order(metric))), metric=metric)


def better(entry: Contestant, other: Contestant | None, *, metric: str) -> bool:
    """Whether the first is alive and strictly ahead of the second."""
    return entry.alive and (other is None or entry.order(metric) < other.order(metric))


@dataclass(frozen=True)
class PairSearchResult:
    """Everything that a pair search looked at, and its decision on the validation fold."""

    candidates: tuple[Candidate, ...]
    sides: Sides
    pairs: tuple[Pair, ...]
    num_measured_pairs: int
    points: tuple[Point, ...]
    contestants: tuple[Contestant, ...]
    metric: str
    winner: Contestant | None
    """The best live merge or trial; null if none is alive."""
    best_merge: Contestant | None
    """The best merge measured in full, winner or not; null without a pair."""
    best_parent: Contestant | None
    """The better parent of the best merge; without a merge, the best trial."""
    merge_beats_parents: bool | None
    """Whether the best merge is strictly ahead of its better parent; null without a merge."""
    cost: dict[str, int]
    config: PairConfig
    merge: MergeConfig

    @property
    def reason(self) -> str | None:
        """Why there is no merge, else null."""
        if self.sides.reason:
            return self.sides.reason
        if not self.pairs:
            return "no two trials bracket AUC 0.5"
        return None if self.best_merge else "no merge could be measured"

    @property
    def sentence(self) -> str:
        """The decision in one sentence."""
        if self.best_merge is None:
            return f"No merge: {self.reason}. " + (f"Best trial: {self.winner.name}." if self.winner else "No trial is alive.")
        if self.best_parent is None:
            return f"The merge {self.best_merge.name} has no parent to be compared with."
        verb = "beats" if self.merge_beats_parents else "does not beat"
        numbers = f"{self.best_merge.value(self.metric):.3f} against {self.best_parent.value(self.metric):.3f} ({self.metric}, validation)"
        text = f"The merge {self.best_merge.name} {verb} its better parent {self.best_parent.name}: {numbers}."
        ahead = [entry.name for entry in self.contestants if entry.role == "control" and better(entry, self.best_merge, metric=self.metric)]
        if ahead:
            text += f" The {ahead[0]} control is ahead of it."
        if self.best_merge.gate:
            text += f" It fails a gate: {self.best_merge.gate}."
        if self.winner is None:
            return text + " Nothing is alive."
        return text if self.winner is self.best_merge else f"{text} Winner: {self.winner.role} {self.winner.name}."

    def to_json(self) -> dict[str, Any]:
        """The content of ``pairs.json``."""
        return {
            "schema_version": SCHEMA_VERSION,
            "fold": "validation",
            "sentence": self.sentence,
            "reason": self.reason,
            "metric": self.metric,
            "winner": None if self.winner is None else self._contestant(self.winner),
            "best_merge": None if self.best_merge is None else self._contestant(self.best_merge),
            "best_parent": None if self.best_parent is None else self.best_parent.name,
            "merge_beats_parents": self.merge_beats_parents,
            "candidates": [self._candidate(candidate) for candidate in self.candidates],
            "pairs": [self._pair(pair, number) for number, pair in enumerate(self.pairs, start=1)],
            "contestants": [self._contestant(entry) for entry in self.contestants],
            "cost": self.cost,
            "config": self.config.model_dump(mode="json"),
            "merge": self.merge.model_dump(mode="json"),
        }

    def _candidate(self, candidate: Candidate) -> dict[str, Any]:
        sides = [name for name in ("over", "under") if candidate in getattr(self.sides, name)]
        return {
            "name": candidate.name,
            "checkpoint": str(candidate.checkpoint),
            "verdict": candidate.verdict,
            "sides": sides,
            "excluded": self.sides.excluded.get(candidate.name),
            "scores": dict(candidate.scores),
        }

    def _pair(self, pair: Pair, number: int) -> dict[str, Any]:
        points = [point for point in self.points if point.pair.name == pair.name]
        full = [entry for entry in self.contestants if entry.pair is not None and entry.pair.name == pair.name]
        return {
            "over": pair.over.name,
            "under": pair.under.name,
            "prediction": asdict(pair.prediction),
            "points": [_point(point) for point in points],
            "full": [self._contestant(entry) for entry in full],
            "outcome": self._outcome(pair, number, points, full),
        }

    def _outcome(self, pair: Pair, number: int, points: list[Point], full: list[Contestant]) -> str:
        if number > self.num_measured_pairs:
            return f"not measured: its prediction ranks {number}, and the search measures {self.num_measured_pairs}"
        if not any(point.cheap for point in points):
            return f"not a finalist: {points[0].error}" if points else "not measured"
        if not full:
            best = min(points, key=lambda point: point.order)
            return f"not a finalist: {best.gate}" if best.gate else f"not a finalist: its best cheap objective is {best.objective:.3f}"
        won = next((entry for entry in full if entry is self.winner), None)
        if won:
            return f"won, as {won.role}: {won.describe()}"
        reason = full[0].gate or (f"behind {self.winner.role} {self.winner.name}" if self.winner else "nothing is alive")
        return f"finalist, lost: {reason}"

    def _contestant(self, entry: Contestant) -> dict[str, Any]:
        return {
            "name": entry.name,
            "role": entry.role,
            "over": entry.pair.over.name if entry.pair else None,
            "under": entry.pair.under.name if entry.pair else None,
            "config": entry.config.model_dump(mode="json") if entry.config else None,
            "scores": None if entry.scores is None else dict(entry.scores),
            "alive": entry.alive,
            "gate": entry.gate,
            "value": strict_json(entry.value(self.metric)),
        }


def _point(point: Point) -> dict[str, Any]:
    return {
        "density": point.config.density,
        "scale": point.config.scale,
        "cheap": asdict(point.cheap) if point.cheap else None,
        "objective": point.objective,
        "gate": point.gate,
        "error": point.error,
    }

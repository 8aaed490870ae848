"""What a pair search measured and decided, and how it is written to ``pairs.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from eval.forgetting import Verdict, rank_key
from merging.cheap import CheapScores
from merging.config import MergeConfig, ObjectiveWeights, PairConfig
from merging.pairs import Candidate, Pair, Sides, objective_value
from trainers.files import strict_json

SCHEMA_VERSION = 2
PARTS = ("task_aggregate", "mia_score", "mmlu_average")


@dataclass(frozen=True)
class Point:
    """One merge, measured without generation.

    Args:
        pair: the parents; null for a control.
        config: of the merge.
        share: of the over-forgetting parent's weight.
        examples: how many it was measured on.
        cheap: null if it could not be measured.
        objective: of ``cheap``.
        gate: the gate that it fails, in words.
        error: why it could not be measured.
    """

    pair: Pair | None
    config: MergeConfig
    share: float | None
    examples: int
    cheap: CheapScores | None
    objective: float | None
    gate: str | None
    error: str | None

    @property
    def order(self) -> tuple:
        """Sorts the best first: gates passed, then objective, then names and parameters, so that the order is always the same."""
        objective = -2.0 if self.objective is None else self.objective
        name = self.pair.name if self.pair else ""
        place = (name, self.config.density, self.share if self.share is not None else 0.5, self.config.scale)
        return (self.cheap is None, self.gate is not None, -objective, *place)

    @property
    def place(self) -> str:
        """The parameters in a few words."""
        return describe_merge(self.config, share=self.share)

    def describe(self) -> str:
        """One line for the log."""
        if self.cheap is None:
            return f"{self.place}: {self.error}"
        text = f"{self.place}, {self.examples} examples: AUC {self.cheap.mia_auc:.3f}, objective {self.objective:.3f}"
        return text + (f", gate: {self.gate}" if self.gate else "")


def describe_merge(config: MergeConfig, *, share: float | None = None) -> str:
    """Density, share and scale, as far as they say something."""
    words = [f"density {config.density:g}"] if config.reads("density") else []
    words += [f"share {share:g}"] if share is not None and share != 0.5 else []
    return " ".join([*words, f"scale {config.scale:g}"])


@dataclass(frozen=True)
class Contestant:
    """A merge, control or trial with full validation scores (null if measuring failed).

    Args:
        name: of a trial or control, or a merge's parents and parameters.
        role: merge, control or trial.
        scores: of its report.
        alive: whether it passes all gates.
        gate: the gate that it fails, or why there are no scores.
        parents: what was merged or scaled; empty for a trial.
        pair: of a merge.
        config: of a merge or control.
        share: of a merge.
    """

    name: str
    role: str
    scores: Mapping[str, float | None] | None
    alive: bool
    gate: str | None
    parents: tuple[str, ...] = ()
    pair: Pair | None = None
    config: MergeConfig | None = None
    share: float | None = None

    def describe(self) -> str:
        """One line for the log."""
        if self.scores is None:
            return str(self.gate)
        names = ("final_score", "task_aggregate", "mia_score", "retention", "forgetting")
        text = ", ".join(f"{name} {value:.3f}" for name in names if (value := self.scores.get(name)) is not None)
        return text + (f", gate: {self.gate}" if self.gate else "")


@dataclass(frozen=True)
class Ranking:
    """Contestants, best first, by an objective whose parts all of them have."""

    contestants: tuple[Contestant, ...]
    weights: ObjectiveWeights
    without: tuple[str, ...]

    @property
    def metric(self) -> str:
        """What ordered them, in words."""
        parts = [(name, weight) for name, weight in self.weights if weight > 0 and name not in self.without]
        if len(parts) == len(PARTS) and len({weight for _, weight in parts}) == 1:
            return "final_score"
        return f"mean({', '.join(name if weight == 1 else f'{weight:g} * {name}' for name, weight in parts)})"

    def value(self, entry: Contestant) -> float:
        """The number that decides; -inf if nothing was measured."""
        return objective_value(entry.scores or {}, weights=self.weights, without=self.without)

    def order(self, entry: Contestant) -> tuple:
        """Sorts the best first: alive, then the objective, then the harmonic mean of forgetting and retention."""
        smooth = rank_key(verdict=Verdict.BALANCED, scores=entry.scores or {})[2]
        return (not entry.alive, -self.value(entry), -smooth)

    def better(self, entry: Contestant, other: Contestant | None) -> bool:
        """Whether the first is alive and strictly ahead of the second."""
        return entry.alive and (other is None or self.order(entry) < self.order(other))

    def best(self, role: str, *, alive: bool = False) -> Contestant | None:
        """The best measured contestant of a role."""
        found = (one for one in self.contestants if one.role == role and one.scores is not None and (one.alive or not alive))
        return next(found, None)


def rank(contestants: Sequence[Contestant], *, weights: ObjectiveWeights | None = None) -> Ranking:
    """Order by the objective, leaving out parts that some measured contestant lacks.

    One that is alive comes before one that is not. Equal ones keep the order in which they are given.
    """
    weights = weights or ObjectiveWeights()
    measured = [entry.scores for entry in contestants if entry.scores is not None]
    without = tuple(name for name in PARTS if any(scores.get(name) is None for scores in measured))
    ranking = Ranking(contestants=(), weights=weights, without=without)
    return Ranking(contestants=tuple(sorted(contestants, key=ranking.order)), weights=weights, without=without)


@dataclass(frozen=True)
class Control:
    """What a merge has to be compared with, measured without generation.

    Args:
        name: linear, unanimous, or scaled- and a checkpoint's name.
        label: in words.
        parents: what was merged or scaled.
        point: its best measurement on the whole fold.
    """

    name: str
    label: str
    parents: tuple[str, ...]
    point: Point


@dataclass(frozen=True)
class PairSearchResult:
    """Everything that a pair search looked at, and its decision on the validation fold.

    Args:
        candidates: by name.
        sides: of AUC 0.5.
        pairs: all that bracket it, best prediction first.
        dropped: why a pair went no further, by its name.
        points: merges of pairs, in the order in which they were measured.
        controls: what merges are compared with.
        ranking: of everything measured in full.
        winner: the model to hand out; null if nothing is alive.
        best_merge: the best merge measured in full, winner or not; null without one.
        best_parent: the better parent of the best merge; without a merge, the best trial.
        reference: the best single checkpoint, parent or not.
        gain: of the best merge over the reference, with its interval; null if it is not known.
        cost: see ``Ledger``; with what the same grid would have cost for all pairs.
        config: of the search.
        merge: of the merges.
    """

    candidates: tuple[Candidate, ...]
    sides: Sides
    pairs: tuple[Pair, ...]
    dropped: Mapping[str, str]
    points: tuple[Point, ...]
    controls: tuple[Control, ...]
    ranking: Ranking
    winner: Contestant | None
    best_merge: Contestant | None
    best_parent: Contestant | None
    reference: Contestant | None
    gain: Mapping[str, float] | None
    cost: Mapping[str, int]
    config: PairConfig
    merge: MergeConfig

    @property
    def metric(self) -> str:
        """What decided, in words."""
        return self.ranking.metric

    @property
    def contestants(self) -> tuple[Contestant, ...]:
        """Everything measured in full, best first."""
        return self.ranking.contestants

    @property
    def merge_beats_parents(self) -> bool | None:
        """Whether the best merge is strictly ahead of its better parent; null without a merge."""
        return self.ranking.better(self.best_merge, self.best_parent) if self.best_merge else None

    @property
    def reason(self) -> str | None:
        """Why there is no merge, else null."""
        if self.sides.reason:
            return self.sides.reason
        if not self.pairs:
            return "no two checkpoints bracket AUC 0.5"
        return None if self.best_merge else "no merge could be measured"

    @property
    def sentence(self) -> str:
        """The decision in a few sentences."""
        if self.best_merge is None:
            return f"No merge: {self.reason}. " + (f"Best: {self._named(self.winner)}." if self.winner else "No trial is alive.")
        text = self._comparison()
        if self.best_merge.gate:
            text += f" It fails a gate: {self.best_merge.gate}."
        if self.winner is None:
            return text + " Nothing is alive."
        return text if self.winner is self.best_merge else f"{text} Winner: {self._named(self.winner)}."

    def _comparison(self) -> str:
        assert self.best_merge is not None
        other = self.reference or self.best_parent
        if other is None:
            return f"The merge {self.best_merge.name} has no single checkpoint to be compared with."
        verb = "beats" if self.ranking.better(self.best_merge, other) else "does not beat"
        whose = "its better parent" if other is self.best_parent else "the best single checkpoint"
        numbers = f"{self.ranking.value(self.best_merge):.3f} against {self.ranking.value(other):.3f} ({self.metric}, validation"
        text = f"The merge {self.best_merge.name} {verb} {whose} {other.name}: {numbers}"
        if self.gain:
            interval = f"{self.config.confidence:.0%} interval of the gain {self.gain['low']:+.3f} to {self.gain['high']:+.3f}"
            text += f"; {interval}" + ("" if self.gain["low"] > 0 or verb != "beats" else ", within noise")
        return text + ")."

    def _named(self, entry: Contestant | None) -> str:
        return "" if entry is None else f"{entry.role} {entry.name}"

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
            "reference": None if self.reference is None else self.reference.name,
            "merge_beats_parents": self.merge_beats_parents,
            "gain": None if self.gain is None else dict(self.gain),
            "candidates": [self._candidate(candidate) for candidate in self.candidates],
            "pairs": [self._pair(pair) for pair in self.pairs],
            "controls": [self._control(control) for control in self.controls],
            "contestants": [self._contestant(entry) for entry in self.contestants],
            "cost": dict(self.cost),
            "config": self.config.model_dump(mode="json"),
            "merge": self.merge.model_dump(mode="json"),
        }

    def _candidate(self, candidate: Candidate) -> dict[str, Any]:
        sides = [name for name in ("over", "under") if candidate in getattr(self.sides, name)]
        return {
            "name": candidate.name,
            "checkpoint": str(candidate.checkpoint),
            "complete": candidate.complete,
            "verdict": candidate.verdict,
            "sides": sides,
            "excluded": self.sides.excluded.get(candidate.name),
            "scores": dict(candidate.scores),
            "cheap": None if candidate.cheap is None else asdict(candidate.cheap),
        }

    def _pair(self, pair: Pair) -> dict[str, Any]:
        points = [point for point in self.points if point.pair is not None and point.pair.name == pair.name]
        full = [entry for entry in self.contestants if entry.pair is not None and entry.pair.name == pair.name]
        return {
            "over": pair.over.name,
            "under": pair.under.name,
            "prediction": asdict(pair.prediction),
            "points": [_point(point) for point in points],
            "full": [self._contestant(entry) for entry in full],
            "outcome": self._outcome(pair, full),
        }

    def _outcome(self, pair: Pair, full: list[Contestant]) -> str:
        won = next((entry for entry in full if entry is self.winner), None)
        if won:
            return f"won: {won.describe()}"
        if not full:
            return self.dropped.get(pair.name, "not measured")
        if full[0].gate:
            return f"finalist, lost: {full[0].gate}"
        if self.winner is None:
            return "finalist, lost: nothing is alive"
        behind = "not clearly ahead of" if self.ranking.better(full[0], self.winner) else "behind"
        return f"finalist, lost: {behind} {self._named(self.winner)}"

    def _control(self, control: Control) -> dict[str, Any]:
        full = next((entry for entry in self.contestants if entry.role == "control" and entry.name == control.name), None)
        return {
            "name": control.name,
            "label": control.label,
            "parents": list(control.parents),
            **_point(control.point),
            "config": control.point.config.model_dump(mode="json"),
            "full": None if full is None else self._contestant(full),
        }

    def _contestant(self, entry: Contestant) -> dict[str, Any]:
        return {
            "name": entry.name,
            "role": entry.role,
            "over": entry.pair.over.name if entry.pair else None,
            "under": entry.pair.under.name if entry.pair else None,
            "parents": list(entry.parents),
            "config": entry.config.model_dump(mode="json") if entry.config else None,
            "share": entry.share,
            "scores": None if entry.scores is None else dict(entry.scores),
            "alive": entry.alive,
            "gate": entry.gate,
            "value": strict_json(self.ranking.value(entry)),
        }


def _point(point: Point) -> dict[str, Any]:
    return {
        "density": point.config.density if point.config.reads("density") else None,
        "share": point.share,
        "scale": point.config.scale,
        "examples": point.examples,
        "cheap": asdict(point.cheap) if point.cheap else None,
        "objective": point.objective,
        "gate": point.gate,
        "error": point.error,
    }

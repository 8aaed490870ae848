"""Where a sweep's trials come from: asked for one by one, and told how each one ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from launcher.cost import order_longest_first
from launcher.search_space import TrialSpec
from launcher.trial import ended, read_status
from trainers.config import TrainConfig
from trainers.errors import InputError
from trainers.files import read_json, read_jsonl


@dataclass(frozen=True)
class Outcome:
    """How a trial ended, or where it stands.

    Args:
        state: pending, running, finished, stopped or failed.
        reason: why, where it did not finish.
        signals: of the validation fold: the evaluation's scores, or else the last signals of its training.
    """

    state: str
    reason: str | None = None
    signals: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        """Whether another start of the sweep leaves the trial as it is."""
        return ended({"state": self.state, "reason": self.reason})


class TrialSource(Protocol):
    """Names the trials of a sweep.

    A trial that was asked for in an earlier start and has not ended comes again, the same to the last digit.
    """

    @property
    def specs(self) -> tuple[TrialSpec, ...]:
        """The trials that exist so far, in the order of their names."""

    @property
    def total(self) -> int:
        """How many trials there will be at most."""

    def ask(self) -> TrialSpec | None:
        """The next trial to run; None if there are no more."""

    def tell(self, name: str, outcome: Outcome) -> None:
        """Record how a trial ended; telling it twice changes nothing."""


class FixedSource:
    """Trials that are all known beforehand, the longest first.

    Names and seeds are those of the draw, so that no result depends on the order.

    Args:
        specs: the trials.
        cost: of a trial, in any unit; equal costs keep the order of the draw.
    """

    def __init__(self, specs: Sequence[TrialSpec], *, cost: Callable[[TrainConfig], float]) -> None:
        self._specs = tuple(specs)
        self._waiting = list(order_longest_first(self._specs, cost=cost))

    @property
    def specs(self) -> tuple[TrialSpec, ...]:
        """All trials."""
        return self._specs

    @property
    def total(self) -> int:
        """Their number."""
        return len(self._specs)

    def ask(self) -> TrialSpec | None:
        """The longest of those that were not asked for yet."""
        return self._waiting.pop(0) if self._waiting else None

    def tell(self, name: str, outcome: Outcome) -> None:
        """A trial that is over is not asked for again."""
        if outcome.over:
            self._waiting = [spec for spec in self._waiting if spec.name != name]


def epochs_cost(config: TrainConfig) -> float:
    """What a trial costs beside another one on the same documents: its passes over them."""
    return float(config.num_train_epochs)


def outcome_of(folder: Path) -> Outcome:
    """How a trial ended, from its files."""
    status = read_status(folder)
    return Outcome(state=status["state"], reason=status.get("reason"), signals=_signals(Path(folder)))


def _signals(folder: Path) -> dict[str, float | None]:
    try:
        return dict(read_json(folder / "validation.json")["scores"])
    except (InputError, KeyError, TypeError):
        measured = [line["signals"] for line in read_jsonl(folder / "metrics.jsonl") if isinstance(line, dict) and line.get("signals")]
        return dict(measured[-1]) if measured else {}

"""Stopping trials early that others beat, without losing a side of the pair."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.config import RungsConfig
from launcher.search.surrogates import Side, Signals, Surrogates, side_of, surrogates_of
from trainers.files import append_jsonl, read_jsonl

FILE = "rungs.jsonl"


@dataclass(frozen=True)
class RungReport:
    """What one trial had reached at one rung.

    Args:
        trial: its name.
        rung: the rung's epoch.
        step: optimizer step of the signals.
        side: the side of the pair it stood on.
        forgetting: see ``Surrogates``.
        retention: see ``Surrogates``.
        pruned: whether it was stopped there.
    """

    trial: str
    rung: float
    step: int
    side: str
    forgetting: float
    retention: float
    pruned: bool = False

    @property
    def surrogates(self) -> Surrogates:
        """Both measures."""
        return Surrogates(forgetting=self.forgetting, retention=self.retention)


def is_beaten(report: RungReport, *, others: Sequence[RungReport], keep: float) -> bool:
    """Whether a trial is not among the best share ``keep`` of its own side of the pair at a rung.

    Of n trials of a side, itself among them, at least ``keep * n`` must be better in forgetting and in retention.
    A trial that is alone on its side is never beaten, whatever those of the other side reached.

    Args:
        report: of the trial.
        others: of the trials that may still become a parent, at the same rung.
        keep: in (0, 1].
    """
    rivals = [other for other in others if other.side == report.side and other.trial != report.trial]
    better = sum(other.surrogates.beats(report.surrogates) for other in rivals)
    return better >= max(1, math.ceil(keep * (len(rivals) + 1) - 1e-9))


class RungBook:
    """The reports of a sweep at its rungs, kept in ``rungs.jsonl`` so that a resumed sweep decides nothing twice.

    Args:
        run: the run folder.
        rungs: where trials are judged, and how many go on.
        baseline: scores of the target before unlearning.
    """

    def __init__(self, run: Path, *, rungs: RungsConfig, baseline: Signals) -> None:
        self.path, self.rungs, self.baseline = Path(run) / FILE, rungs, baseline
        self.reports: dict[tuple[str, float], RungReport] = {}
        for line in read_jsonl(self.path):
            report = _read(line)
            if report is not None:
                self.reports.setdefault((report.trial, report.rung), report)

    def judge(
        self, trial: str, *, epoch: float, step: int, is_last: bool, signals: Signals, may_win: Callable[[str], bool] = lambda name: True
    ) -> bool:
        """Record what a trial has reached; whether it must stop.

        Args:
            trial: its name.
            epoch: passes over the forget set that are done.
            step: optimizer steps that are done.
            is_last: whether that was the last one: such a trial is compared with, but not stopped.
            signals: measured after that step.
            may_win: whether another trial can still become a parent; those that cannot beat nobody.
        """
        reached = [rung for rung in self.rungs.epochs if epoch >= rung - 1e-6]
        found = surrogates_of(signals)
        if not reached or found is None:
            return False
        rung = reached[-1]
        known = self.reports.get((trial, rung))
        if known is None:
            side: Side = side_of(signals, baseline=self.baseline)
            known = RungReport(trial, rung, step, side.value, found.forgetting, found.retention)
            others = [report for (name, at), report in self.reports.items() if at == rung and name != trial and may_win(name)]
            if not is_last and is_beaten(known, others=others, keep=self.rungs.keep):
                known = RungReport(**(asdict(known) | {"pruned": True}))
            append_jsonl(self.path, asdict(known))
            self.reports[trial, rung] = known
        return known.pruned


def _read(line: Any) -> RungReport | None:
    names = RungReport.__dataclass_fields__
    return RungReport(**{name: line[name] for name in names}) if isinstance(line, Mapping) and set(names) <= set(line) else None

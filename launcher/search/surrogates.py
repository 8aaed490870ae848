"""Smooth measures of forgetting and of retention, which a search climbs where the official score is 0 for everybody."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from eval.forgetting import VerdictThresholds

MOST_NATS = 5.0
"""An answer token of probability e^-5 counts as gone: making it rarer still is no more forgetting, and no more loss."""

Signals = Mapping[str, float | None]


@dataclass(frozen=True)
class Surrogates:
    """Both are better when larger, nats per answer token.

    Args:
        forgetting: how unlikely the forget set's answers are, in [0, MOST_NATS].
        retention: minus how unlikely the retain set's answers are, in [-MOST_NATS, 0].
    """

    forgetting: float
    retention: float

    def beats(self, other: Surrogates) -> bool:
        """Whether it is better in both."""
        return self.forgetting > other.forgetting and self.retention > other.retention


class Side(StrEnum):
    """Which parent of a pair a trial could be."""

    OVER = "over"
    UNDER = "under"


def surrogates_of(signals: Signals) -> Surrogates | None:
    """From mean answer log-probabilities per token; None where one was not measured or is not finite."""
    forget, retain = (_finite(signals.get(f"{side}_answer_log_prob")) for side in ("forget", "retain"))
    if forget is None or retain is None:
        return None
    return Surrogates(forgetting=min(max(-forget, 0.0), MOST_NATS), retention=max(min(retain, 0.0), -MOST_NATS))


def side_of(signals: Signals, *, baseline: Signals) -> Side:
    """Over-forgetting where members are less likely than strangers; without an attack, where too few retained tokens are right.

    Args:
        signals: of the trial.
        baseline: scores of the target before unlearning.
    """
    auc = _finite(signals.get("mia_auc"))
    if auc is not None:
        return Side.OVER if auc < 0.5 else Side.UNDER
    accuracy, before = _finite(signals.get("retain_token_accuracy")), _finite(baseline.get("retain_token_accuracy"))
    lost = accuracy is not None and before is not None and accuracy < VerdictThresholds().over_retention * before
    return Side.OVER if lost else Side.UNDER


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

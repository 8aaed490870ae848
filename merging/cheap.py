"""What forward passes tell about a model without generation: the scores of a full evaluation, some of them estimated."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.mia import attack_auc, mia_score
from merging.examples import Example, Result
from trainers.data.types import Kind

LEAST_ROWS = 30
"""Completions below which the estimate of their recall is not fitted."""
PRIOR_ROWS = 0.5
"""A term counts as if so many rows more had scored one half: of a few rows, a harmonic mean is noise otherwise."""


@dataclass(frozen=True)
class RecallFit:
    """ROUGE-L recall of a generated completion, estimated from the model's agreement with the true one under teacher forcing.

    ``constant + accuracy * (share of tokens that are the argmax) + matched * (share in the matched prefix)``, cut to [0, 1]. The matched
    prefix is what greedy decoding repeats, so it is a lower bound; behind it, decoding goes its own way.
    """

    constant: float = 0.0
    accuracy: float = 0.3
    matched: float = 0.7

    def recall(self, *, accuracy: float, matched: float) -> float:
        """The estimate for one completion, or for the means of many."""
        return min(1.0, max(0.0, self.constant + self.accuracy * accuracy + self.matched * matched))


def fit_recall(rows: Iterable[Mapping[str, Any]]) -> RecallFit:
    """Least squares over completions that were generated in full evaluations; a fixed rule where there are few.

    Args:
        rows: of evaluation reports; only completions are read.
    """
    import numpy as np

    points = [
        (1.0, row["token_accuracy"], row["matched_fraction"], row["score"])
        for row in rows
        if row["part"] == "task" and row["kind"] == Kind.COMPLETION and row["token_accuracy"] is not None
    ]
    if len(points) < LEAST_ROWS:
        return RecallFit()
    table = np.array(points)
    constant, accuracy, matched = np.linalg.lstsq(table[:, :3], table[:, 3], rcond=None)[0]
    return RecallFit(constant=round(float(constant), 6), accuracy=round(float(accuracy), 6), matched=round(float(matched), 6))


@dataclass(frozen=True)
class CheapScores:
    """Scores of a model from forward passes alone.

    Args:
        forget_token_accuracy: share of answer tokens that are the argmax; NaN without rows.
        retain_token_accuracy: the same on the retain set.
        mia_auc: AUC of the membership attack; NaN without documents.
        mia_score: ``1 - 2 |AUC - 0.5|``.
        forget_answer_log_prob: mean log-probability per answer token, nats.
        retain_answer_log_prob: the same on the retain set.
        terms: the terms of the task aggregate in the benchmark's order. Those of questions are what generation would give: an
            answer comes out if and only if all its tokens are the argmax. Those of completions are estimated.
        task_aggregate: their harmonic mean, smoothed; null without terms.
        forgetting: estimated as in a report.
        retention: estimated as in a report.
        mmlu_average: null without questions.
        num_examples: what all this was computed from.
    """

    forget_token_accuracy: float
    retain_token_accuracy: float
    mia_auc: float
    mia_score: float
    forget_answer_log_prob: float | None = None
    retain_answer_log_prob: float | None = None
    terms: tuple[float, ...] = ()
    task_aggregate: float | None = None
    forgetting: float | None = None
    retention: float | None = None
    mmlu_average: float | None = None
    num_examples: int = 0

    @classmethod
    def from_scores(cls, scores: Mapping[str, Any]) -> CheapScores:
        """The part of an evaluation report's ``scores`` that the search reads; a missing score is NaN."""

        def number(name: str) -> float:
            value = scores.get(name)
            return math.nan if value is None else float(value)

        return cls(
            forget_token_accuracy=number("forget_token_accuracy"),
            retain_token_accuracy=number("retain_token_accuracy"),
            mia_auc=number("mia_auc"),
            mia_score=number("mia_score"),
            forget_answer_log_prob=scores.get("forget_answer_log_prob"),
            retain_answer_log_prob=scores.get("retain_answer_log_prob"),
            task_aggregate=scores.get("task_aggregate"),
            forgetting=scores.get("forgetting"),
            retention=scores.get("retention"),
            mmlu_average=scores.get("mmlu_average"),
        )

    @property
    def is_finite(self) -> bool:
        """Whether everything that the search reads is a number."""
        return all(math.isfinite(value) for value in (self.forget_token_accuracy, self.retain_token_accuracy, self.mia_auc, self.mia_score))


def summarise(examples: Sequence[Example], *, results: Sequence[Result], recall: RecallFit) -> CheapScores:
    """The scores of a model over examples.

    Args:
        examples: what was scored.
        results: one per example.
        recall: how the recall of completions is estimated.
    """
    sums: dict[str, list[float]] = {"forget": [0.0] * 3, "retain": [0.0] * 3}
    values: dict[tuple[str, str, Kind], list[float]] = {}
    losses: dict[str, list[float]] = {"member": [], "nonmember": []}
    answers: list[float] = []
    for example, result in zip(examples, results, strict=True):
        if example.part in losses:
            losses[example.part].append(result[0])
        elif example.part == "mmlu":
            answers.append(result[0])
        else:
            log_prob, tokens, correct, matched = result
            sums[example.part] = [a + b for a, b in zip(sums[example.part], (log_prob, tokens, correct), strict=True)]
            assert example.kind is not None
            if example.kind is Kind.QUESTION:
                value = float(tokens > 0 and matched == tokens)
            else:
                value = recall.recall(accuracy=correct / tokens, matched=matched / tokens) if tokens else 0.0
            values.setdefault((example.part, example.task, example.kind), []).append(value)
    auc = attack_auc(member_losses=losses["member"], nonmember_losses=losses["nonmember"]) if all(losses.values()) else math.nan
    if not all(math.isfinite(loss) for part in losses.values() for loss in part):
        auc = math.nan
    per_token = {part: _per_token(*sums[part]) for part in sums}
    terms = _terms(values)
    return CheapScores(
        forget_token_accuracy=per_token["forget"][1],
        retain_token_accuracy=per_token["retain"][1],
        mia_auc=auc,
        mia_score=mia_score(auc),
        forget_answer_log_prob=per_token["forget"][0],
        retain_answer_log_prob=per_token["retain"][0],
        terms=terms,
        task_aggregate=harmonic(terms) if terms else None,
        forgetting=_complement(_set_mean(values, "forget")),
        retention=_set_mean(values, "retain"),
        mmlu_average=sum(answers) / len(answers) if answers else None,
        num_examples=len(results),
    )


def harmonic(terms: Sequence[float]) -> float:
    """Harmonic mean; 0 if a term is 0."""
    return 0.0 if min(terms) <= 0 else len(terms) / sum(1 / term for term in terms)


def _terms(values: Mapping[tuple[str, str, Kind], Sequence[float]]) -> tuple[float, ...]:
    terms = []
    for part in ("forget", "retain"):
        tasks = sorted({task for other, task, _ in values if other == part})
        for task in tasks:
            for kind in (Kind.COMPLETION, Kind.QUESTION):
                found = values.get((part, task, kind))
                if found:
                    mean = (sum(found) + 0.5 * PRIOR_ROWS) / (len(found) + PRIOR_ROWS)
                    terms.append(1 - mean if part == "forget" else mean)
    return tuple(terms)


def _set_mean(values: Mapping[tuple[str, str, Kind], Sequence[float]], part: str) -> float | None:
    """Mean of a set's regurgitation and knowledge, or of the one that there is."""
    kinds = []
    for kind in (Kind.COMPLETION, Kind.QUESTION):
        found = [value for key, group in values.items() if key[0] == part and key[2] is kind for value in group]
        if found:
            kinds.append(sum(found) / len(found))
    return sum(kinds) / len(kinds) if kinds else None


def _complement(value: float | None) -> float | None:
    return None if value is None else 1 - value


def _per_token(log_prob: float, tokens: float, correct: float) -> tuple[float, float]:
    return (log_prob / tokens, correct / tokens) if tokens else (math.nan, math.nan)

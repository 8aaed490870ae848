"""From scored rows to the benchmark's twelve terms, its task aggregate and its result dictionary."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from eval.mia import mia_score
from trainers.data.types import Kind


@dataclass(frozen=True)
class ScoredRow:
    """One row's place and its score: ROUGE-L recall of a completion, exact match of a question."""

    task: str
    kind: Kind
    score: float


@dataclass(frozen=True)
class TaskMeans:
    """Mean scores of a set, or of one task of it; NaN where there are no rows of the kind."""

    regurgitation: float
    knowledge: float


@dataclass(frozen=True)
class Term:
    """One value of the task aggregate, with what it stands for; forget terms are inverted."""

    name: str
    value: float


def _mean(values: list[float]) -> float:
    # A plain left-to-right sum: ``sum`` compensates its rounding since Python 3.12 and would differ from published digits.
    total = 0.0
    for value in values:
        total += value
    return total / len(values) if values else math.nan


def set_means(rows: Sequence[ScoredRow]) -> TaskMeans:
    """Means over all rows of a set, whatever their task (row-weighted)."""
    return TaskMeans(
        regurgitation=_mean([row.score for row in rows if row.kind is Kind.COMPLETION]),
        knowledge=_mean([row.score for row in rows if row.kind is Kind.QUESTION]),
    )


def task_means(rows: Sequence[ScoredRow], *, tasks: Iterable[str] = ()) -> dict[str, TaskMeans]:
    """Means per task, tasks sorted by name.

    Args:
        rows: scored rows.
        tasks: names that count even if none of their rows has a score; they get NaN, as in the benchmark.
    """
    names = sorted({row.task for row in rows}.union(tasks))
    return {task: set_means([row for row in rows if row.task == task]) for task in names}


def aggregated_terms(*, forget: dict[str, TaskMeans], retain: dict[str, TaskMeans]) -> list[Term]:
    """The terms in the benchmark's order: per forget task 1 - regurgitation, 1 - knowledge; then per retain task both as they are."""
    terms = []
    for task, means in sorted(forget.items()):
        terms.append(Term(f"forget {task} regurgitation", 1 - means.regurgitation))
        terms.append(Term(f"forget {task} knowledge", 1 - means.knowledge))
    for task, means in sorted(retain.items()):
        terms.append(Term(f"retain {task} regurgitation", means.regurgitation))
        terms.append(Term(f"retain {task} knowledge", means.knowledge))
    return terms


def task_aggregate(values: Sequence[float]) -> float:
    """Harmonic mean of the terms: 0 as soon as one of them is 0, else NaN as soon as one is NaN; NaN without terms.

    This is ``statistics.harmonic_mean``, which adds the reciprocals exactly and rounds once.
    """
    return float(statistics.harmonic_mean(values)) if values else math.nan


def final_score(*, aggregate: float, mia: float, mmlu: float) -> float:
    """Mean of task aggregate, MIA score and MMLU accuracy."""
    return statistics.mean([aggregate, mmlu, mia])


def official_block(
    *,
    forget: Sequence[ScoredRow],
    retain: Sequence[ScoredRow],
    mia_auc: float | None,
    mmlu_average: float | None,
    forget_tasks: Iterable[str] = (),
    retain_tasks: Iterable[str] = (),
) -> dict[str, Any]:
    """The result dictionary with the keys, and their order, of the benchmark's final release (December 2024).

    ``aggregate-score`` is -1 unless both the attack and MMLU were measured; forget values inside ``forget-set`` are not inverted;
    NaN stands where a task lacks one kind of row. A harmonic mean of 0 is the integer 0, as the ``statistics`` module gives it.

    Args:
        forget: scored rows of the forget set.
        retain: scored rows of the retain set.
        mia_auc: AUC of the membership attack, or None.
        mmlu_average: MMLU accuracy, or None.
        forget_tasks: tasks of the forget set, those without a scored row among them.
        retain_tasks: the same of the retain set.
    """
    means = {"forget": task_means(forget, tasks=forget_tasks), "retain": task_means(retain, tasks=retain_tasks)}
    block: dict[str, Any] = {}
    for name, rows in (("forget", forget), ("retain", retain)):
        overall = set_means(rows)
        block[f"{name}-set"] = {
            "overall-regurgitation-score": overall.regurgitation,
            "overall-knowledge-score": overall.knowledge,
            **{task: {"regurgitation-score": mean.regurgitation, "knowledge-score": mean.knowledge} for task, mean in means[name].items()},
        }
    if mia_auc is not None:
        block["mia_loss_acc"] = mia_auc
    if mmlu_average is not None:
        block["mmlu_average"] = mmlu_average
    values = [term.value for term in aggregated_terms(forget=means["forget"], retain=means["retain"])]
    aggregate = statistics.harmonic_mean(values) if values else math.nan
    block["aggregated-terms"] = values
    block["aggregate-score"] = -1
    block["harmonic-mean-task-aggregate"] = aggregate
    if mia_auc is not None and mmlu_average is not None:
        block["aggregate-score"] = final_score(aggregate=aggregate, mia=mia_score(mia_auc), mmlu=mmlu_average)
        block["mia_final_score"] = mia_score(mia_auc)
    return block

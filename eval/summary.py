"""From rows to the finished report: scores, intervals, counts."""

from __future__ import annotations

import math
import time
from typing import Any

from eval.aggregate import ScoredRow, aggregated_terms, official_block, set_means, task_means
from eval.answers import Answers
from eval.bootstrap import intervals, point_scores
from eval.config import EvalConfig
from eval.deviations import deviations_found
from eval.measure import AttackLosses, TaskSet
from eval.metrics import metric_intervals, metric_notes, metric_scores
from eval.mia import auc_standard_error, count_not_finite, mia_score
from eval.mmlu_accuracy import MmluResult
from eval.notes import write_notes
from eval.report import SCORE_NAMES, EvalReport
from trainers.data.types import ForgetRetain, Kind


def build_report(
    *,
    rows: list[dict[str, Any]],
    sets: dict[str, TaskSet],
    data: ForgetRetain,
    answers: Answers,
    attacked: AttackLosses | None,
    questions: MmluResult | None,
    config: EvalConfig,
    fold: str,
    model_name: str,
    deviations: list[str],
    altered: list[str],
    start: float,
) -> EvalReport:
    """Put a report together from what was measured.

    Args:
        rows: of the report.
        sets: the scored sets by name.
        data: what was given to score, to count what was left out.
        answers: generated texts.
        attacked: the membership attack, or None.
        questions: the MMLU answers, or None.
        config: how it was measured.
        fold: name of the fold.
        model_name: name of the model.
        deviations: from the benchmark's script.
        altered: settings of the checkpoint that change greedy decoding.
        start: ``time.perf_counter()`` when the evaluation began.
    """
    scored = {
        name: [ScoredRow(task=row["task"], kind=Kind(row["kind"]), score=row["score"]) for row in rows if row.get("set") == name]
        for name in sets
    }
    # A task whose rows all lack a score counts with undefined terms, as in the benchmark.
    tasks = {name: {record.task for record in records} for name, records in (("forget", data.forget), ("retain", data.retain))}
    official = official_block(
        forget=scored["forget"],
        retain=scored["retain"],
        mia_auc=attacked.auc if attacked else None,
        mmlu_average=questions.average if questions else None,
        forget_tasks=tasks["forget"],
        retain_tasks=tasks["retain"],
    )
    terms = aggregated_terms(
        forget=task_means(scored["forget"], tasks=tasks["forget"]), retain=task_means(scored["retain"], tasks=tasks["retain"])
    )
    scores = point_scores(rows)
    # The published computation rounds once more or less here and there; where it defines a score, its digits are taken.
    scores["task_aggregate"] = float(official["harmonic-mean-task-aggregate"])
    for name, values in scored.items():
        scores[f"{name}_regurgitation"], scores[f"{name}_knowledge"] = (set_means(values).regurgitation, set_means(values).knowledge)
    if attacked:
        scores["mia_auc"], scores["mia_score"] = attacked.auc, mia_score(attacked.auc)
    if questions:
        scores["mmlu_average"] = questions.average
    if attacked and questions:
        scores["final_score"] = official["aggregate-score"]
    finite: dict[str, float | None] = {name: scores[name] if math.isfinite(scores[name]) else None for name in SCORE_NAMES}
    added = metric_scores(rows)
    samples, seed, confidence = config.bootstrap_samples, config.bootstrap_seed, config.confidence
    skipped = len(data.forget) + len(data.retain) - sum(len(task_set.rows) for task_set in sets.values())
    counts = {
        "forget_rows": len(sets["forget"].rows),
        "retain_rows": len(sets["retain"].rows),
        "forget_documents": len({record.document for record in sets["forget"].records}),
        "retain_documents": len({record.document for record in sets["retain"].records}),
        "skipped_rows": skipped,
        "decoded_rows": answers.num_decoded,
        "decided_rows": sum(answer.decided for answer in answers.answers),
        "members": len(attacked.members) if attacked else 0,
        "nonmembers": len(attacked.nonmembers) if attacked else 0,
        "mmlu_questions": len(questions.answers) if questions else 0,
    }
    return EvalReport(
        fold=fold,
        model=model_name,
        official=official,
        scores=finite | added,
        intervals=intervals(rows, scores=finite, samples=samples, seed=seed, confidence=confidence)
        | metric_intervals(rows, scores=added, samples=samples, seed=seed, confidence=confidence),
        counts=counts,
        terms=[{"name": term.name, "value": term.value} for term in terms],
        deviations=[*deviations, *deviations_found(rows=rows, attacked=attacked, official=config.official)],
        notes=write_notes(terms=terms, rows=rows, attacked=attacked, questions=questions, skipped=skipped, altered=altered)
        + metric_notes(),
        config=config.model_dump(mode="json"),
        seconds=time.perf_counter() - start,
        rows=rows,
        attack=_attack_summary(attacked),
        mmlu=questions.metrics() if questions else {},
    )


def _attack_summary(attacked: AttackLosses | None) -> dict[str, float]:
    if attacked is None:
        return {}
    members, nonmembers = len(attacked.members), len(attacked.nonmembers)
    return {
        "auc": attacked.auc,
        "standard_error": auc_standard_error(attacked.auc, num_members=members, num_nonmembers=nonmembers),
        "members": members,
        "nonmembers": nonmembers,
        "not_finite": count_not_finite([*attacked.members, *attacked.nonmembers]),
    }

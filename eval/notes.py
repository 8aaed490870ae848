"""What a reader of the numbers has to know, in sentences for the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from eval.aggregate import Term
from eval.forgetting import VerdictThresholds
from eval.measure import AttackLosses
from eval.mia import auc_standard_error, count_not_finite
from eval.mmlu_accuracy import MmluResult
from eval.mmlu_categories import SUBCATEGORY

MMLU_BAR = 0.371
"""Below this accuracy the organisers dropped 7B systems: 75 % of the 0.4947 of their 7B target."""
BENCHMARK_TERMS = 12
"""Two sets, three tasks, two kinds of rows."""
MIN_DOCUMENTS = 30
"""Below this many documents behind a term, one document moves it by more than 0.03."""
SEED_SPREAD = 0.27
"""Standard deviation of the MIA score over seeds that has been seen with a 7B model and otherwise equal settings."""
_TWO_SIDED_95 = 1.96


def write_notes(
    *,
    terms: Sequence[Term],
    rows: list[dict[str, Any]],
    attacked: AttackLosses | None,
    questions: MmluResult | None,
    skipped: int,
    altered: list[str],
) -> list[str]:
    """Remarks on missing parts, values that are not finite, and how far the numbers can be trusted.

    Args:
        terms: of the task aggregate.
        rows: of the report.
        attacked: the membership attack, if it was run.
        questions: the MMLU answers, if they were asked for.
        skipped: rows without a score.
        altered: settings of the checkpoint that change greedy decoding.
    """
    return [
        *_on_tasks(terms=terms, rows=[row for row in rows if row["part"] == "task"], skipped=skipped),
        *_on_attack(attacked),
        *_on_mmlu(questions),
        *(
            [f"The checkpoint's generation configuration changes greedy decoding ({', '.join(altered)}): each row was decoded alone."]
            if altered
            else []
        ),
    ]


def _on_tasks(*, terms: Sequence[Term], rows: Sequence[Mapping[str, Any]], skipped: int) -> list[str]:
    notes = []
    if skipped:
        notes.append(f"{skipped} rows are neither completions nor questions (by their id) and have no score.")
    undefined = [term.name for term in terms if math.isnan(term.value)]
    if undefined:
        notes.append(f"No rows for {', '.join(undefined)}: the task aggregate and the final score are undefined.")
    if len(terms) != BENCHMARK_TERMS:
        notes.append(f"The task aggregate is made of {len(terms)} terms instead of the benchmark's {BENCHMARK_TERMS}.")
    broken = [row["id"] for row in rows if not math.isfinite(row["answer_log_prob"])]
    if broken:
        notes.append(f"{len(broken)} rows have a log-probability that is not finite, among them {broken[0]!r}.")
    documents: dict[tuple[str, str, str], set[str]] = {}
    for row in rows:
        documents.setdefault((row["set"], row["task"], row["kind"]), set()).add(row["document"])
    if documents:
        (name, task, kind), smallest = min(documents.items(), key=lambda item: (len(item[1]), item[0]))
        if len(smallest) < MIN_DOCUMENTS:
            what = "completions" if kind == "sc" else "questions"
            notes.append(
                f"Few documents: the smallest term ({name} {task}, {what}) rests on {len(smallest)}, so that a single document moves it by "
                f"up to {1 / len(smallest):.2f}; see the intervals before comparing two models."
            )
    return notes


def _on_attack(attacked: AttackLosses | None) -> list[str]:
    if attacked is None:
        return ["No membership attack was run: there is no AUC, MIA score or final score, and the official aggregate-score is -1."]
    notes = []
    infinite = count_not_finite([*attacked.members, *attacked.nonmembers])
    if infinite:
        notes.append(
            f"{infinite} attack documents have no finite loss (diverged model, or a single token); they count as infinitely unlikely."
        )
    members, strangers = len(attacked.members), len(attacked.nonmembers)
    error = auc_standard_error(attacked.auc, num_members=members, num_nonmembers=strangers)
    notes.append(f"The AUC's standard error is {error:.3f} (Hanley and McNeil).")
    noise = chance_difference(num_members=members, num_nonmembers=strangers)
    if noise > VerdictThresholds().balanced_halfwidth:
        notes.append(
            f"Few attack documents: with {members} members and {strangers} non-members, two models near AUC 0.5 that differ by less than "
            f"{noise:.3f} in AUC ({2 * noise:.3f} in MIA score) may differ by chance alone (95 %). Seeds add to that: runs of one "
            f"configuration have differed with a standard deviation of up to {SEED_SPREAD} in MIA score."
        )
    return notes


def chance_difference(*, num_members: int, num_nonmembers: int) -> float:
    """The difference between the AUCs of two blind attacks, each on documents of its own, that chance exceeds in 1 of 20 cases."""
    return _TWO_SIDED_95 * math.sqrt(2) * auc_standard_error(0.5, num_members=num_members, num_nonmembers=num_nonmembers)


def _on_mmlu(questions: MmluResult | None) -> list[str]:
    if questions is None:
        return ["MMLU was not run: there is no final score, and the official aggregate-score is -1."]
    notes = []
    if questions.average < MMLU_BAR:
        notes.append(f"MMLU accuracy is below {MMLU_BAR}, the organisers' bar for 7B models.")
    most = max(answer.shots for answer in questions.answers)
    cut = sum(answer.shots < most for answer in questions.answers)
    if cut:
        notes.append(f"{cut} MMLU prompts had solved examples dropped to fit the limit.")
    foreign = sorted(set(questions.per_subject) - set(SUBCATEGORY))
    if foreign:
        also = f" and {len(foreign) - 1} more" if foreign[1:] else ""
        notes.append(f"{foreign[0]}{also} is no subject of MMLU: it counts in the average, but in no subcategory or category.")
    return notes

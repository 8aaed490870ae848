"""What a reader of the numbers has to know, in sentences for the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from eval.aggregate import Term
from eval.measure import AttackLosses
from eval.mia import auc_standard_error
from eval.mmlu_accuracy import MmluResult

MMLU_BAR = 0.371
"""Below this accuracy the organisers dropped 7B systems: 75 % of the 0.4947 of their 7B target."""


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
    notes = []
    if skipped:
        notes.append(f"{skipped} rows are neither completions nor questions (by their id) and have no score.")
    undefined = [term.name for term in terms if math.isnan(term.value)]
    if undefined:
        notes.append(f"No rows for {', '.join(undefined)}: the task aggregate and the final score are undefined.")
    broken = [row["id"] for row in rows if row["part"] == "task" and not math.isfinite(row["answer_log_prob"])]
    if broken:
        notes.append(f"{len(broken)} rows have a log-probability that is not finite, among them {broken[0]!r}.")
    if attacked is None:
        notes.append("No membership attack was run: there is no AUC, MIA score or final score.")
    else:
        infinite = sum(not math.isfinite(loss) for loss in (*attacked.members, *attacked.nonmembers))
        if infinite:
            notes.append(
                f"{infinite} attack documents have no finite loss (diverged model, or a single token); they count as infinitely unlikely."
            )
        error = auc_standard_error(attacked.auc, num_members=len(attacked.members), num_nonmembers=len(attacked.nonmembers))
        notes.append(f"The AUC's standard error is {error:.3f} (Hanley and McNeil).")
    if questions is None:
        notes.append("MMLU was not run: there is no final score.")
    else:
        if questions.average < MMLU_BAR:
            notes.append(f"MMLU accuracy is below {MMLU_BAR}, the organisers' bar for 7B models.")
        most = max(answer.shots for answer in questions.answers)
        cut = sum(answer.shots < most for answer in questions.answers)
        if cut:
            notes.append(f"{cut} MMLU prompts had solved examples dropped to fit the limit.")
    if altered:
        notes.append(
            f"The checkpoint's generation configuration changes greedy decoding ({', '.join(altered)}): each row was decoded alone."
        )
    return notes

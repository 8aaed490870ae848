"""``results.json``: what a run found, gathered from its files alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.bootstrap import paired_difference
from eval.forgetting import alive, classify
from eval.report import LoadedReport, read_report
from launcher.search_space import TrialSpec
from launcher.trial import read_status
from trainers.files import read_json, write_json

if TYPE_CHECKING:
    from launcher.data import PreparedData

FILE = "results.json"
LABELS = {
    "baseline": "before unlearning",
    "parent_over": "over-forgetting parent",
    "parent_under": "under-forgetting parent",
    "linear": "linear mean of both parents",
    "ties": "TIES merge of both parents",
}


def gather_trials(specs: Sequence[TrialSpec], *, run: Path) -> list[dict[str, Any]]:
    """One entry per trial: state, verdict on the validation fold, scores of both folds."""
    from trainers.checkpoint import finished_checkpoints

    baseline = _scores(run / "baseline" / "validation.json")
    trials = []
    for spec in specs:
        folder = run / "trials" / spec.name
        status = read_status(folder)
        validation, test = _scores(folder / "validation.json"), _scores(folder / "eval.json")
        verdict = str(classify(scores=validation, baseline=baseline).verdict) if validation and baseline else None
        checkpoints = finished_checkpoints(folder)
        trials.append(
            {
                "name": spec.name,
                "status": status["state"],
                "verdict": "dead" if verdict is None and _diverged(status) else verdict,
                "overrides": spec.overrides,
                "validation": validation,
                "test": test,
                "seconds": status.get("seconds"),
                "error": status.get("error"),
                "checkpoint": str(checkpoints[-1].relative_to(run)) if checkpoints else None,
            }
        )
    return trials


def data_counts(data: PreparedData) -> dict[str, Any]:
    """How much was to be forgotten and kept: documents, rows, and rows by task, of each set over all folds; no text."""
    return {
        name: {
            "documents": len({record.document for record in records}),
            "rows": len(records),
            "rows_by_task": dict(sorted(Counter(record.task for record in records).items())),
        }
        for name, records in (("forget", data.everything.forget), ("retain", data.everything.retain))
    }


def _diverged(status: Mapping[str, Any]) -> bool:
    """Pruned trials and those out of budget have stopped alive; a status without a reason is from before there were reasons."""
    return status["state"] == "stopped" and status.get("reason") in (None, "diverged")


def _scores(path: Path) -> dict[str, Any] | None:
    return dict(read_report(path).scores) if path.exists() else None


def model_entry(*, run: Path, name: str, role: str, label: str, folder: Path, parents: Sequence[LoadedReport]) -> dict[str, Any]:
    """One row of the score table: test scores, and the paired difference to the better parent."""
    report = read_report(folder / "eval.json")
    baseline = read_report(run / "baseline" / "eval.json")
    difference = None
    if parents and role in ("merged", "control"):
        # A dead parent may have the higher final score; it is not what a merge has to beat.
        better = max(
            parents, key=lambda parent: (alive(classify(scores=parent.scores, baseline=baseline.scores).verdict), headline(parent))
        )
        difference = paired_difference(report, better)
    return {
        "name": name,
        "role": role,
        "label": label,
        "verdict": str(classify(scores=report.scores, baseline=baseline.scores).verdict),
        "path": str(folder.relative_to(run)),
        "scores": dict(report.scores),
        "intervals": {key: list(value) for key, value in report.intervals.items()},
        "terms": list(report.terms),
        "difference_to_best_parent": difference,
    }


def headline(report: LoadedReport) -> tuple[float, float]:
    """What two models are compared by: the final score, or what stands in for it without MMLU or an attack."""
    scores = report.scores
    parts = [scores.get(name) for name in ("task_aggregate", "mia_score", "mmlu_average")]
    known = [value for value in parts if value is not None]
    return (sum(known) / len(known) if known else 0.0, (scores.get("forgetting") or 0.0) + (scores.get("retention") or 0.0))


def verdict_sentence(*, pairs: Mapping[str, Any], models: Sequence[Mapping[str, Any]], delivered: str | None) -> str:
    """What the run found, in two or three sentences that hold whether or not the merge won."""
    by_role = {model["role"]: model for model in models}
    merged = by_role.get("merged")
    if delivered is None:
        return f"No trial is alive, so no model was written: {pairs.get('reason') or 'every trial lost its utility or forgot nothing'}."
    if merged is None:
        return f"No pair could be merged ({pairs.get('reason')}); the best model without one, {delivered}, was written instead."
    difference = (merged.get("difference_to_best_parent") or {}).get("final_score") or (merged.get("difference_to_best_parent") or {}).get(
        "task_aggregate"
    )
    value = merged["scores"].get("final_score")
    text = (
        f"The TIES merge of {pairs['pair_names']} scores {value:.3f}" if value is not None else f"The TIES merge of {pairs['pair_names']}"
    )
    if difference:
        bounds = f"{difference['difference']:+.3f} (95 % interval {difference['low']:+.3f} to {difference['high']:+.3f})"
        if difference["low"] > 0:
            text += f", better than its better parent by {bounds} on documents that selection never saw"
        elif difference["high"] < 0:
            text += f", worse than its better parent by {bounds} on documents that selection never saw"
        else:
            text += f"; the difference to its better parent, {bounds}, is within noise on documents that selection never saw"
    text += "."
    if delivered != "ties":
        reason = "the merge's gain was within noise" if pairs.get("ahead") else f"{delivered} did better"
        text += f" On the validation documents {reason}, so {delivered} is the model in merged/."
    return text


def control_label(name: str, label: str) -> str:
    """What a control is called in tables: its fixed label, or what the search called it."""
    return LABELS.get(name, label)


def write_results(run: Path, results: Mapping[str, Any]) -> None:
    """Write ``results.json`` atomically."""
    write_json(run / FILE, dict(results))


def read_results(run: Path) -> dict[str, Any]:
    """The results of a run."""
    return read_json(run / FILE)

"""All trials: settings, scores of both folds, and the same as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from launcher.report_data import FOLD_FILES, RunData, base_name, pair_names
from launcher.report_text import number

TRIAL_SCORES = ("forgetting", "retention", "mia_auc", "task_aggregate", "final_score")


def trial_rows(data: RunData) -> list[dict[str, Any]]:
    """What the page shows of each trial."""
    parts: dict[str, list[str]] = {}
    for side, name in pair_names(data).items():
        trial, step = base_name(name)
        parts.setdefault(trial, []).append(f"{side}-forgetting parent" + (f" at step {step}" if step is not None else ""))
    return [_trial_row(trial, parent=", ".join(parts.get(trial["name"], []))) for trial in data.trials]


def _trial_row(trial: Mapping[str, Any], *, parent: str) -> dict[str, Any]:
    keys = {key: trial.get(key) for key in ("name", "status", "verdict", "seconds", "error", "step", "num_steps", "checkpoint")}
    scores = {fold: [number(trial[fold].get(key)) for key in TRIAL_SCORES] for fold in FOLD_FILES}
    return {**keys, **scores, "parent": parent, "overrides": trial["overrides"]}


def trials_csv(data: RunData) -> str:
    """One line per trial: state, settings, and the scores of both folds (empty where there is none)."""
    settings = sorted({key for trial in data.trials for key in trial["overrides"]})
    scores = {fold: sorted({key for trial in data.trials for key in trial[fold]}) for fold in FOLD_FILES}
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = ["name", "status", "verdict", "seconds", *settings]
    writer.writerow([*head, *(f"{fold}.{key}" for fold in FOLD_FILES for key in scores[fold]), "error", "checkpoint"])
    for trial in data.trials:
        row = [trial["name"], trial["status"], trial.get("verdict"), trial.get("seconds")]
        row += [trial["overrides"].get(key) for key in settings]
        row += [trial[fold].get(key) for fold in FOLD_FILES for key in scores[fold]]
        writer.writerow(["" if value is None else value for value in [*row, trial.get("error"), trial.get("checkpoint")]])
    return out.getvalue()

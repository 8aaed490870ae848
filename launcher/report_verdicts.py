"""Why each model got its verdict, and the thresholds behind verdicts and gates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.report_data import RunData


def verdict_view(data: RunData) -> dict[str, Any]:
    """Verdicts with the comparisons that led to them, and every threshold with its value.

    Returns:
        ``models`` (of the report's fold) and ``trials`` (of the validation fold): ``name``, ``label``, ``verdict`` and ``reasons``;
        ``thresholds`` of the verdicts and ``gates`` of the pair search: ``name``, ``value`` and ``meaning``. A verdict that was given
        without scores, or by other thresholds, has no reasons.
    """
    from eval.forgetting import VerdictThresholds
    from merging.config import PairConfig

    baseline = data.model("baseline") or {}
    search = data.pairs.get("config")
    values = {key: value for key, value in search.items() if key.startswith("min_")} if isinstance(search, Mapping) else {}
    fields = PairConfig.model_fields
    return {
        "models": [
            _row(model, label=model.get("label"), scores=model["scores"], baseline=baseline.get("scores"))
            for model in data.models
            if model.get("role") != "baseline" and model.get("verdict")
        ],
        "trials": [
            _row(trial, label=trial["name"], scores=trial["validation"], baseline=baseline.get("validation"))
            for trial in data.trials
            if trial.get("verdict")
        ],
        "thresholds": [
            {"name": name, "value": getattr(VerdictThresholds(), name), "meaning": field.description}
            for name, field in VerdictThresholds.model_fields.items()
        ],
        "gates": [
            {"name": key, "value": value, "meaning": fields[key].description if key in fields else ""} for key, value in values.items()
        ],
    }


def _row(entry: Mapping[str, Any], *, label: Any, scores: Mapping[str, float], baseline: Mapping[str, float] | None) -> dict[str, Any]:
    from eval.forgetting import classify

    judgement = classify(scores=scores, baseline=baseline) if scores and baseline else None
    same = judgement is not None and str(judgement.verdict) == entry["verdict"]
    reasons = list(judgement.reasons) if same and judgement else []
    return {"name": entry["name"], "label": label, "verdict": entry["verdict"], "reasons": reasons}

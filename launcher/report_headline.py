"""The verdict in one sentence, the four numbers beside it, and how far an unfinished run has come."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from launcher.events import stage_states
from launcher.report_audit import audit_of
from launcher.report_data import RunData, is_number, read_metrics
from launcher.report_text import interval, number

REFRESH_S = 30
"""Seconds after which the page of an unfinished run looks for news."""
_STAGES = {
    "target": "building the target model",
    "baseline": "scoring the target",
    "trials": "running trials",
    "pairs": "searching the pair",
    "merge": "writing and scoring the merge",
    "report": "the report is written; an audit, if one was asked for, comes last",
    "audit": "auditing the delivered model",
}
_AUDIT_WORDS = {
    "gone": "the audit brought nothing back that a model which never knew would not give (gone)",
    "hidden": "the audit can bring some of it back (hidden)",
    "dead": "the audit finds the model destroyed (dead)",
    "untouched": "the audit finds the model unchanged (untouched)",
}


def verdict_sentence(data: RunData) -> str:
    """The run's verdict as results.json words it, or how far it has come."""
    sentence = (data.results.get("verdict") or {}).get("sentence")
    if sentence:
        return str(sentence)
    counts = trial_counts(data)
    if not counts:
        return "No trial has begun yet: there is no verdict."
    parts = ", ".join(f"{count} {state}" for state, count in counts.items())
    return f"No verdict yet: the run is not complete ({sum(counts.values())} trials: {parts})."


def headline(data: RunData) -> str:
    """Which model is delivered, its final score, its paired difference to the better parent, and what an audit of it found.

    Without a delivered model it is the sentence of ``verdict_sentence``.
    """
    model = data.delivered
    if model is None or not model["scores"]:
        return verdict_sentence(data)
    key = "final_score" if "final_score" in model["scores"] else "task_aggregate"
    words = {"final_score": "final score", "task_aggregate": "task aggregate"}[key]
    intervals = model["intervals"] if isinstance(model["intervals"], Mapping) else {}
    text = f"{_subject(data, model)} is delivered: {words} {number(model['scores'].get(key))} {interval(intervals.get(key))}".rstrip()
    text += _difference(model, key=key)
    audit = audit_of(data)
    if audit is not None:
        text += f"; {_AUDIT_WORDS.get(str(audit['verdict']), 'the audit says: ' + str(audit['verdict']))}"
    return f"{text}."


def _subject(data: RunData, model: Mapping[str, Any]) -> str:
    label, pair = str(model.get("label") or model["name"]), data.results.get("pair") or {}
    if model.get("role") == "merged" and pair.get("over") and pair.get("under"):
        method = str(pair.get("method") or "")
        return f"The {'TIES' if method in ('', 'ties') else method} merge of {pair['over']} and {pair['under']}"
    if str(model.get("role")).startswith("parent"):
        return f"{model['name']}, the {label},"
    return label[:1].upper() + label[1:] if label.split(" ")[0].isalpha() else label


def _difference(model: Mapping[str, Any], *, key: str) -> str:
    value = (model.get("difference_to_best_parent") or {}).get(key)
    if not isinstance(value, Mapping) or not is_number(value.get("difference")):
        return ""
    low, high = value.get("low"), value.get("high")
    if value["difference"] == low == high == 0:
        return ", the same as its better parent's"
    text = f", {number(value['difference'], signed=True)} against its better parent"
    if is_number(low) and is_number(high):
        text += f" (95 % interval {number(low, signed=True)} to {number(high, signed=True)}"
        text += ")" if low > 0 or high < 0 else ", so within noise)"
    return text


def trial_counts(data: RunData) -> dict[str, int]:
    """State to number of trials."""
    counts: dict[str, int] = {}
    for trial in data.trials:
        counts[trial["status"]] = counts.get(trial["status"], 0) + 1
    return counts


def progress(data: RunData) -> dict[str, Any] | None:
    """How far a run has come that is not finished; None for a finished one.

    Returns:
        ``stage`` (what is being done), ``ended`` and ``total`` (trials), ``parts`` (such as ``2 finished``), ``running`` (name, step and
        number of steps of the trials at work), ``as_of`` (time of the last event, UTC) and ``refresh_s``.
    """
    if data.finished:
        return None
    counts = trial_counts(data)
    wanted = (data.experiment.get("sweep") or {}).get("num_trials") if isinstance(data.experiment.get("sweep"), Mapping) else None
    total = max(sum(counts.values()), wanted if isinstance(wanted, int) else 0)
    ended = sum(count for state, count in counts.items() if state not in ("running", "pending"))
    stages = stage_states(list(data.events))
    begun = [name for name, state in stages.items() if state == "started"]
    stage = begun[-1] if begun else None
    done = list(stages)[-1] if stages else None
    words = _STAGES.get(str(stage), str(stage)) if stage else f"{done} is done" if done else "not begun"
    running = [_at_work(data, trial) for trial in data.trials if trial["status"] == "running"]
    times = [float(event["time"]) for event in data.events if is_number(event.get("time"))]
    as_of = datetime.fromtimestamp(max(times), UTC).strftime("%Y-%m-%d %H:%M:%S UTC") if times else None
    return {
        "stage": words,
        "ended": ended,
        "total": total,
        "parts": [f"{count} {state}" for state, count in counts.items() if state not in ("running", "pending")],
        "running": running,
        "as_of": as_of,
        "refresh_s": REFRESH_S,
    }


def _at_work(data: RunData, trial: Mapping[str, Any]) -> dict[str, Any]:
    """A running trial's status names the step of its last measurement; its curve may have come further."""
    rows = read_metrics(data.run, trial=trial["name"])
    steps = [value for value in (trial.get("step"), rows[-1]["step"] if rows else None) if is_number(value)]
    return {"name": trial["name"], "step": max(steps, default=None), "num_steps": trial.get("num_steps")}


def tiles(data: RunData) -> list[dict[str, str]]:
    """The four numbers a reader asks for first: before, and in the delivered model."""
    before, after = data.model("baseline"), data.delivered or data.model("merged")
    if before is None or after is None:
        return []
    words = {
        "forgetting": ("Forgotten", "share of the forget set that can no longer be reproduced; 1 is best"),
        "retention": ("Kept", "share of the retain set that is still reproduced; 1 is best"),
        "mia_auc": ("Membership AUC", "can an attacker tell that the texts were trained on? 0.5 is best"),
        "final_score": ("Final score", "mean of task aggregate, MIA score and MMLU; 1 is best"),
        "task_aggregate": ("Task aggregate", "harmonic mean of the twelve terms; 1 is best"),
    }
    words.pop("task_aggregate" if "final_score" in after["scores"] else "final_score")
    intervals = after["intervals"] if isinstance(after["intervals"], Mapping) else {}
    return [
        {
            "title": title,
            "meaning": meaning,
            "model": str(after["label"]),
            "before": number(before["scores"].get(key)),
            "after": number(after["scores"].get(key)),
            "interval": interval(intervals.get(key)),
        }
        for key, (title, meaning) in words.items()
    ]

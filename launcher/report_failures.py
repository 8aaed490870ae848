"""What failed, was tried again or was cut short, with its cause and the last lines of its log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.report_data import RunData, last_log_lines
from launcher.report_text import without_paths
from trainers.errors import InputError
from trainers.files import read_json

_REASONS = {
    "diverged": "its loss was not finite",
    "pruned": "others on its side forgot and retained more",
    "budget": "the budget was used up",
    "interrupted": "interrupted",
    "timeout": "it took longer than a trial may",
    "out_of_memory": "memory was used up",
    "preempted": "its machine was lost",
    "error": "an error",
}


def failures_view(data: RunData) -> dict[str, Any]:
    """Every trial that did not simply finish at its first start, the failed measurements of the pair search, and other events.

    Returns:
        ``trials`` (``name``, ``state``, ``cause``, ``error``, ``starts``, ``errors``, ``preemptions``, ``micro_batch``, ``log`` and its
        ``logs`` files), ``counts`` (words to number), ``measurements`` (what failed, and why) and ``events`` (sentences); ``none`` says
        whether all of them are empty.
    """
    rows = [row for trial in data.trials if (row := _row(data, trial)) is not None]
    measurements = _measurements(data)
    events = _events(data)
    counts = {
        "failed": sum(row["state"] == "failed" for row in rows),
        "stopped": sum(row["state"] == "stopped" for row in rows),
        "errors": sum(row["errors"] for row in rows),
        "lost machines": sum(row["preemptions"] for row in rows),
    }
    return {
        "trials": rows,
        "counts": {word: count for word, count in counts.items() if count},
        "measurements": measurements,
        "events": events,
        "none": not rows and not measurements and not events,
    }


def _row(data: RunData, trial: Mapping[str, Any]) -> dict[str, Any] | None:
    status = _status(data, trial["name"])
    state, reason = trial["status"], trial.get("reason") or status.get("reason")
    counts = {key: _count(trial.get(key)) or _count(status.get(key)) for key in ("errors", "preemptions")}
    starts = sum(event.get("kind") == "trial_started" and event.get("trial") == trial["name"] for event in data.events)
    again = sum(counts.values()) or starts > 1
    if state not in ("failed", "stopped") and not again:
        return None
    error = trial.get("error") or status.get("error")
    # What a trial that finished died of before is only in the events.
    earlier = [
        event
        for event in data.events
        if event.get("kind") == "trial_ended" and event.get("trial") == trial["name"] and event.get("error") and event["error"] != error
    ]
    folder = data.run / "trials" / trial["name"] / "logs"
    return {
        "name": trial["name"],
        "state": state,
        "cause": _REASONS.get(str(reason), str(reason)) if reason and (state in ("failed", "stopped")) else "",
        "error": without_paths(error) if error else "",
        "earlier": list(dict.fromkeys(without_paths(event["error"]) for event in earlier)),
        "starts": max(starts, 1),
        **counts,
        "micro_batch": status.get("micro_batch"),
        "log": [without_paths(line) for line in last_log_lines(data.run, trial=trial["name"])],
        "logs": sorted(path.name for path in folder.glob("*.log")),
    }


def _status(data: RunData, name: str) -> dict[str, Any]:
    try:
        value = read_json(data.run / "trials" / name / "status.json")
    except (InputError, OSError):
        return {}
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _measurements(data: RunData) -> list[dict[str, str]]:
    """Merges that could not be measured."""
    found = []

    def note(what: str, error: Any) -> None:
        if error:
            found.append({"what": what, "error": without_paths(error)})

    for pair in _dicts(data.pairs.get("pairs")):
        name = f"{pair.get('over')} + {pair.get('under')}"
        for point in _dicts(pair.get("points")):
            note(f"{name}, density {point.get('density')}, scale {point.get('scale')}", point.get("error"))
        for entry in _dicts(pair.get("full")):
            note(str(entry.get("name") or name), entry.get("error"))
    for control in _dicts(data.pairs.get("controls")):
        note(f"control {control.get('label') or control.get('name')}", control.get("error"))
    return list({(row["what"], row["error"]): row for row in found}.values())


def _events(data: RunData) -> list[str]:
    found = []
    for event in data.events:
        if event.get("kind") == "budget_used_up":
            found.append(f"{event.get('iso')}: the budget was used up ({event.get('reason')})")
        elif str(event.get("kind")).endswith("_failed"):
            what, why = str(event["kind"]).removesuffix("_failed"), event.get("error") or event.get("reason") or "no reason was recorded"
            found.append(f"{event.get('iso')}: the {what} failed ({without_paths(why)})")
    stages = [event.get("stage") for event in data.events if event.get("kind") == "stage_started"]
    again = sorted({str(stage) for stage in stages if stages.count(stage) > 1})
    if again:
        found.append(f"Begun more than once, because the run was started again: {', '.join(again)}")
    return found


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []

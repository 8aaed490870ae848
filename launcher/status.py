"""Where a run stands, from its files alone: it works during a sweep, after a crash and from another machine."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from launcher.audit_stage import audit_state
from launcher.console import Console, duration, settings
from launcher.events import stage_states
from launcher.report_data import RunData, last_log_lines, read_run

_PLACES = ("results.json", "report.html", "trials.csv", "pairs.json", "merged/merge.json", "audit.json")


def status_dict(run: Path) -> dict[str, Any]:
    """The state of a run.

    Returns:
        ``name``, ``run``, ``finished``, ``stages`` (name to ``started`` or ``finished``), ``trials`` (name, state, reason, step, num_steps,
        verdict, seconds, error, errors, preemptions, overrides), ``counts`` (state to number), ``reasons`` (why trials stopped or failed,
        to number), ``errors`` and ``preemptions`` (of all trials), ``verdict`` (the final sentence or None), ``audit``
        (``launcher.audit_stage.audit_state``) and ``places`` (the result files that exist).

    Raises:
        InputError: if ``run`` is not a run folder.
    """
    data = read_run(Path(run))
    trials = [_trial(data, trial) for trial in data.trials]
    return {
        "name": data.name,
        "run": str(data.run),
        "finished": bool(data.results.get("run_finished")),
        "stages": stage_states(list(data.events)),
        "trials": trials,
        "counts": dict(Counter(trial["state"] for trial in trials)),
        "reasons": dict(Counter(trial["reason"] for trial in trials if trial["reason"])),
        "errors": sum(trial["errors"] for trial in trials),
        "preemptions": sum(trial["preemptions"] for trial in trials),
        "verdict": (data.results.get("verdict") or {}).get("sentence"),
        "audit": audit_state(audit=data.audit, events=data.events),
        "places": {name: str(data.run / name) for name in _PLACES if (data.run / name).exists()},
    }


def _trial(data: RunData, trial: dict[str, Any]) -> dict[str, Any]:
    row = {key: trial.get(key) for key in ("name", "step", "num_steps", "verdict", "seconds", "error", "overrides")}
    row["state"] = trial["status"]
    row["reason"] = trial.get("reason") if trial["status"] in ("stopped", "failed") else None
    row |= {key: int(trial.get(key) or 0) for key in ("errors", "preemptions")}
    if trial["status"] == "failed":
        row["log"] = str(data.run / "trials" / trial["name"] / "logs" / "rank-0.log")
        row["last_lines"] = last_log_lines(data.run, trial=trial["name"], count=3)
    return row


def _state(trial: dict[str, Any]) -> str:
    """``failed`` says why by its error; ``stopped`` has none."""
    return f"stopped ({trial['reason']})" if trial["state"] == "stopped" and trial["reason"] else trial["state"]


def print_status(run: Path, *, console: Console | None = None) -> None:
    """Print the state of a run.

    Raises:
        InputError: if ``run`` is not a run folder.
    """
    status, console = status_dict(run), console or Console()
    counts = ", ".join(f"{count} {word}" for word, count in status["counts"].items()) or "none yet"
    console.stage(f"{status['name']}: {'finished' if status['finished'] else 'not finished'}")
    if status["stages"]:
        console.line(
            "stages   " + ", ".join(f"{name} {'done' if word == 'finished' else 'begun'}" for name, word in status["stages"].items())
        )
    console.line(f"trials   {counts}")
    troubles = [f"{count} {word}" for word, count in status["reasons"].items()]
    troubles += [f"{status[word]} {word} in all" for word in ("errors", "preemptions") if status[word]]
    if troubles:
        console.line(f"         {', '.join(troubles)}")
    width = max((len(_state(trial)) for trial in status["trials"]), default=0)
    for trial in status["trials"]:
        steps = f"step {trial['step']}/{trial['num_steps']}" if trial["num_steps"] else ""
        parts = [trial["name"], f"{_state(trial):<{width}}", f"{steps:<14}", f"{trial['verdict'] or '':<16}"]
        parts += [duration(trial["seconds"]) if trial["seconds"] else "", settings(trial["overrides"] or {})]
        console.line(("  " + "  ".join(parts)).rstrip())
        if trial["error"]:
            console.line(f"      {' '.join(str(trial['error']).split())}")
        for line in trial.get("last_lines", []):
            console.line(f"      | {line[:140]}")
        if "log" in trial:
            console.line(f"      log: {trial['log']}")
    if status["verdict"]:
        console.line(f"verdict  {status['verdict']}")
    if status["audit"]["error"]:
        console.line(f"audit    failed: {status['audit']['error']}")
    elif status["audit"]["verdict"]:
        console.line(f"audit    {status['audit']['verdict']}")
    for name, path in status["places"].items():
        console.line(f"{name:<17} {path}")

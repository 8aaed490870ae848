"""What happened in a run, one line per event, append-only: the source of truth for resume."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainers.files import append_jsonl, read_jsonl

STAGE_STARTED = "stage_started"
STAGE_FINISHED = "stage_finished"


class EventLog:
    """The log ``RUN/events.jsonl``. It holds no state of its own: every question is answered from the file.

    Each line is ``{"time": unix seconds, "iso": UTC time, "kind": str, ...fields}``.
    """

    def __init__(self, run: Path) -> None:
        self.path = Path(run) / "events.jsonl"

    def emit(self, kind: str, **fields: Any) -> None:
        """Append one event, on disk when this returns.

        Raises:
            ValueError: if a field is named ``time`` or ``iso``, which the log sets itself.
        """
        taken = {"time", "iso"} & fields.keys()
        if taken:
            raise ValueError(f"event field {sorted(taken)[0]!r} is set by the log itself; use another name")
        now = time.time()
        iso = datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds")
        append_jsonl(self.path, {"time": now, "iso": iso, "kind": kind, **fields})

    def events(self) -> list[dict[str, Any]]:
        """All complete events, oldest first; a line torn by a kill is skipped."""
        return [event for event in read_jsonl(self.path) if isinstance(event, dict) and "kind" in event]

    def last(self, kind: str, **match: Any) -> dict[str, Any] | None:
        """The newest event of a kind whose fields equal all of ``match``, or None."""
        for event in reversed(self.events()):
            if event["kind"] == kind and all(event.get(name) == value for name, value in match.items()):
                return event
        return None

    def started(self, stage: str, **fields: Any) -> None:
        """Record that a stage begins (again)."""
        self.emit(STAGE_STARTED, stage=stage, **fields)

    def finish(self, stage: str, **fields: Any) -> None:
        """Record that a stage is complete; ``fields`` may carry ``seconds``."""
        self.emit(STAGE_FINISHED, stage=stage, **fields)

    def finished(self, stage: str) -> bool:
        """Whether the stage is complete and was not begun again since."""
        return stage_states(self.events()).get(stage) == "finished"


def stage_states(events: list[dict[str, Any]]) -> dict[str, str]:
    """``finished`` or ``started`` for every stage in the log, in order of first appearance; the newest event wins."""
    words = {STAGE_STARTED: "started", STAGE_FINISHED: "finished"}
    states: dict[str, str] = {}
    for event in events:
        if event.get("kind") in words and event.get("stage"):
            states[str(event["stage"])] = words[event["kind"]]
    return states

"""What W&B and TensorBoard hold of a run, read back from the files that they wrote."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.tracking.tensorboard_tracker import event_files, read_events
from launcher.tracking.wandb_log import read_records


@dataclass
class LoggedRun:
    """One W&B run over all the folders in which it was written, oldest first."""

    id: str
    title: str
    group: str
    job_type: str
    tags: tuple[str, ...]
    config: dict[str, Any]
    folders: list[Path] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    step_metrics: set[tuple[str, str]] = field(default_factory=set)
    exit_codes: list[int] = field(default_factory=list)

    @property
    def curves(self) -> list[dict[str, Any]]:
        """The rows without what W&B adds, but with its own step."""
        return [{name: value for name, value in row.items() if name not in ("_runtime", "_timestamp")} for row in self.rows]


def logged_runs(run: Path) -> dict[str, LoggedRun]:
    """All offline W&B runs of a run folder by title."""
    found: dict[str, LoggedRun] = {}
    for path in sorted(run.glob("tracking/wandb/offline-run-*/run-*.wandb")):
        current: LoggedRun | None = None
        for record in read_records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                one = record.run
                config = {item.key: json.loads(item.value_json) for item in one.config.update if item.key != "_wandb"}
                current = found.setdefault(
                    one.run_id, LoggedRun(one.run_id, one.display_name, one.run_group, one.job_type, tuple(one.tags), config)
                )
                current.folders.append(path.parent)
            elif current is None:
                continue
            elif kind == "history":
                row = {_key(item): json.loads(item.value_json) for item in record.history.item}
                assert row["_step"] == record.history.step.num
                current.rows.append(row)
            elif kind == "summary":
                current.summary |= {_key(item): json.loads(item.value_json) for item in record.summary.update}
            elif kind == "metric":
                current.step_metrics.add((record.metric.glob_name, record.metric.step_metric))
            elif kind == "exit":
                current.exit_codes.append(record.exit.exit_code)
    return {one.title: one for one in found.values()}


def _key(item: Any) -> str:
    return item.key or "/".join(item.nested_key)


def event_scalars(run: Path, name: str) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's curves of one tracked run: for each tag its steps and values, in the order of the files."""
    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for step, tag, value in _scalars(run / "tracking" / "tensorboard" / name):
        curves[tag].append((step, value))
    return dict(curves)


def _scalars(folder: Path) -> Iterator[tuple[int, str, float]]:
    for path in event_files(folder):
        for event in read_events(path):
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    yield event.step, value.tag, value.simple_value

"""TensorBoard: one folder of event files per tracked run, with curves by optimizer step and scores at the last one."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.report_data import is_number
from launcher.tracking.content import Description, Facts
from launcher.tracking.files import Written


class TensorboardTracker:
    """Opens folders below ``RUN/tracking/tensorboard``."""

    name = "tensorboard"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, run: Description, *, kept: Written) -> TensorboardRun:
        folder = self.folder / run.name
        steps = [event.step for path in event_files(folder) for event in read_events(path)]
        return TensorboardRun(folder, run=run, written=Written(last_step=max(steps, default=-1), facts=kept.facts))


class TensorboardRun:
    """One open folder."""

    def __init__(self, folder: Path, *, run: Description, written: Written) -> None:
        import yaml
        from tensorboardX import SummaryWriter

        self.written = written
        self._last_step = written.last_step
        self._writer = SummaryWriter(logdir=str(folder))
        if written.last_step < 0:
            text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
            self._writer.add_text("config", f"```yaml\n{text}```", global_step=0)

    def log(self, rows: Sequence[Mapping[str, float | int]]) -> None:
        for row in rows:
            self._last_step = int(row["step"])
            for name, value in row.items():
                if name != "step":
                    self._writer.add_scalar(name, value, global_step=self._last_step)
        self._writer.flush()

    def close(self, facts: Facts | None) -> None:
        if facts is not None and facts.hash != self.written.facts:
            for name, value in facts.summary.items():
                if is_number(value):
                    self._writer.add_scalar(f"scores/{name}", value, global_step=max(self._last_step, 0))
                else:
                    self._writer.add_text(f"scores/{name}", str(value), global_step=max(self._last_step, 0))
        self._writer.close()


def event_files(folder: Path) -> list[Path]:
    """The event files of one run, oldest first."""
    return sorted(folder.glob("events.out.tfevents.*"))


def read_events(path: Path) -> Iterator[Any]:
    """The complete events of a file; a last one that a kill has torn is left out.

    Each is a length (uint64), its checksum (uint32), the message and the message's checksum (uint32).
    https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/lib/io/record_writer.h
    """
    from tensorboardX.proto.event_pb2 import Event

    data, position = Path(path).read_bytes(), 0
    while position + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, position)
        start, position = position + 12, position + 12 + length + 4
        if position > len(data):
            return
        event = Event()
        event.ParseFromString(data[start : start + length])
        yield event

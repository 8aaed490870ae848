"""How much disk a run takes, by part, told before anything is written."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trainers.config import ObjectiveName, TrainConfig
from trainers.model_shape import ModelShape, Trained
from trainers.reference import Part
from trainers.step import reference_request
from trainers.trial_rows import EncodedTrial

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class DiskPlan:
    """Bytes that a run writes, by part, and what is free.

    Args:
        parts: name of the part -> bytes.
        free: bytes that are free where the run folder will lie; None if that is no folder of this machine.
    """

    parts: Mapping[str, int]
    free: int | None = None

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self.parts.values())

    @property
    def is_short(self) -> bool:
        """Whether more is needed than is free."""
        return self.free is not None and self.total > self.free


def checkpoint_bytes(shape: ModelShape, *, train: TrainConfig, trained: Trained, bytes_per_weight: float) -> int:
    """What a trial's checkpoints take: float32 adapters, or a whole model in which the trained numbers are float32, for each of them;
    AdamW's two moments beside the last one, and beside the one before it while that is written.

    Args:
        shape: of the model.
        train: the trial.
        trained: what it trains.
        bytes_per_weight: of the target's files.
    """
    numbers = trained.parameters
    frozen = 0 if train.lora is not None else max(0, shape.parameters - numbers)
    resume = 8 * numbers
    if train.objective.name is ObjectiveName.TASK_VECTOR_NEGATION:
        resume += 4 * numbers  # the trained weights, because others are published
    return round(train.checkpoints * (4 * numbers + bytes_per_weight * frozen) + resume * min(2, train.checkpoints))


def reference_bytes(shape: ModelShape, *, rows: EncodedTrial, train: TrainConfig, trained: Trained) -> dict[Part, int]:
    """What each part of the reference that a trial reads takes on the disk, without headers.

    Log-probabilities are 4 bytes per scored token; distributions 4 bytes and one vector per evaluated token, float32, or of the model's
    dtype where the head trains; activations one vector per token; norms 4 bytes per row.
    """
    size = _DTYPE_BYTES[train.engine.dtype]
    vector = shape.hidden * (size if trained.head else 4)
    found: dict[Part, int] = {}
    for part in reference_request(train, layer=0, trains_head=trained.head).parts:
        side = rows.by_side[part.side]
        if part in (Part.FORGET_LOG_PROBS, Part.ALTERNATIVE_LOG_PROBS):
            found[part] = 4 * sum(row.num_scored for row in side)
        elif part in (Part.FORGET_DISTRIBUTIONS, Part.RETAIN_DISTRIBUTIONS):
            found[part] = (4 + vector) * sum(len(row.evaluated) for row in side)
        elif part is Part.FORGET_NORMS:
            found[part] = 4 * len(side)
        else:
            found[part] = size * shape.hidden * sum(len(row.input_ids) for row in side)
    return found


def weights_bytes(folder: Path) -> int:
    """Bytes of a model folder's weights."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def free_bytes(folder: Path) -> int | None:
    """Bytes that are free where a folder lies, or will lie; None if it is no folder of this machine."""
    if "://" in str(folder):
        return None
    place = Path(folder).expanduser().resolve()
    existing = next((parent for parent in (place, *place.parents) if parent.exists()), None)
    return None if existing is None else shutil.disk_usage(existing).free

"""How many operations a trial's training is, told from its rows and its model's shape: what trials are ordered by, and hours told from.

Multiply-adds of matrix products count as two operations, and nothing else counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainers.config import TrainConfig
from trainers.model_shape import ModelShape, Trained
from trainers.objectives.table import Need, needs
from trainers.plan import plan_trial
from trainers.trial_rows import EncodedTrial, uses_retain

if TYPE_CHECKING:
    from trainers.data.encode import EncodedRow


@dataclass(frozen=True)
class Volume:
    """What all steps of a trial read together.

    Args:
        tokens: of all rows, each as often as it is read.
        evaluated: tokens that the head is run on.
        squares: sum of the rows' squared lengths, which attention grows with.
    """

    tokens: int = 0
    evaluated: int = 0
    squares: int = 0

    def __add__(self, other: Volume) -> Volume:
        return Volume(self.tokens + other.tokens, self.evaluated + other.evaluated, self.squares + other.squares)


def trial_volume(rows: EncodedTrial, *, train: TrainConfig) -> Volume:
    """What a trial's schedule reads of its rows: every pass over the forget set, and the retain rows that accompany it."""
    steps = plan_trial(train=train, num_forget=len(rows.forget), num_retain=len(rows.retain) if uses_retain(train) else 0)
    forget = Counter(index for step in steps for index in step.forget)
    retain = Counter(index for step in steps for index in step.retain)
    total = _volume(rows.forget, times=forget) + _volume(rows.retain, times=retain)
    return total + _volume(rows.alternative, times=forget) if rows.alternative else total


def _volume(rows: Sequence[EncodedRow], *, times: Counter[int]) -> Volume:
    return Volume(
        tokens=sum(number * len(rows[index].input_ids) for index, number in times.items()),
        evaluated=sum(number * len(rows[index].evaluated) for index, number in times.items()),
        squares=sum(number * len(rows[index].input_ids) ** 2 for index, number in times.items()),
    )


def training_flops(shape: ModelShape, *, train: TrainConfig, trained: Trained, volume: Volume, recomputes: bool = False) -> int:
    """Operations of a trial's forward and backward passes over real tokens, over all ranks together.

    With B and H for a forward pass through the layers and the head per token, and 4 A L per squared length for attention:

    - forward: B, H at evaluated tokens, attention;
    - backward by inputs: the same again from the lowest layer that trains, attention twice;
    - backward by weights: twice the trained numbers, for each token or evaluated token;
    - adapters run forward and backward both ways: three times twice their numbers;
    - recomputation: B and attention once more. Gradients of each set alone (NGDiff): everything twice.

    Args:
        shape: of the model.
        train: the trial; its adapters and objective count.
        trained: what it trains.
        volume: what its steps read.
        recomputes: whether activations are recomputed.
    """
    attention_width = shape.heads * shape.head_size
    layer = shape.hidden * (2 * attention_width + 2 * shape.kv_heads * shape.head_size + 3 * shape.intermediate)
    body, attention = 2 * layer * shape.layers, 4 * attention_width * shape.layers
    live = shape.layers if trained.embedding else shape.layers - next((i for i, names in enumerate(trained.layers) if names), shape.layers)
    share = live / shape.layers
    per_token, per_evaluated, per_square = body * (1 + share), 2 * shape.head * 2, attention * (1 + 2 * share)
    if train.lora is not None:
        per_token += 3 * 2 * trained.parameters
    else:
        tied = shape.parameters < layer * shape.layers + 2 * shape.head
        outside = shape.head * (trained.head + (trained.embedding and not tied))
        per_token += 2 * max(0, trained.parameters - outside)
        per_evaluated += 2 * shape.head * trained.head
    if recomputes:
        per_token += body
        per_square += attention
    total = per_token * volume.tokens + per_evaluated * volume.evaluated + per_square * volume.squares
    return round(total * (2 if Need.SIDE_GRADIENTS in needs(train.objective) else 1))

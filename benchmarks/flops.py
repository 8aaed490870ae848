"""FLOPs of matrix products by formula: what a step needs, and what the published recipe executes.

B, H, L and a below are forward FLOPs per token of the decoder layers, the head, the adapters and attention. A backward pass costs one
forward by inputs, and one more by weights where these are trained. An adapter is trained, a frozen base is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.models import Shape
from trainers.data.encode import EncodedRow


@dataclass(frozen=True)
class Volume:
    """What some rows amount to.

    Args:
        tokens: of all rows.
        scored: answer tokens.
        squares: sum of the rows' squared lengths, which attention grows with.
    """

    tokens: int
    scored: int
    squares: int

    @classmethod
    def of(cls, rows: Sequence[EncodedRow], *, padded_to: int | None = None) -> Volume:
        """Of rows as they are, or filled up to a length and scored everywhere."""
        if padded_to is not None:
            tokens = len(rows) * padded_to
            return cls(tokens, tokens, tokens * padded_to)
        lengths = [len(row.input_ids) for row in rows]
        return cls(sum(lengths), sum(row.num_scored for row in rows), sum(length**2 for length in lengths))


def forward_flops(shape: Shape, volume: Volume, *, lora_r: int = 0) -> int:
    """One forward pass: B and L at every token, H at the scored ones, attention within rows."""
    body = volume.tokens * (shape.body_flops + 2 * shape.lora_parameters(lora_r))
    return body + volume.scored * shape.head_flops + 4 * shape.hidden * shape.layers * volume.squares


def needed_flops(shape: Shape, volume: Volume, *, lora_r: int | None) -> int:
    """Forward and backward of the policy at real tokens with a cached reference: 2B + 3L + 3a and 2H, or 3B + 3a and 3H without adapters.

    What an implementation executes beyond that (padding, recomputation, a reference pass) does not count as useful.
    """
    attention = 3 * 4 * shape.hidden * shape.layers * volume.squares
    if lora_r is None:
        return volume.tokens * 3 * shape.body_flops + volume.scored * 3 * shape.head_flops + attention
    lora = 2 * shape.lora_parameters(lora_r)
    return volume.tokens * (2 * shape.body_flops + 3 * lora) + volume.scored * 2 * shape.head_flops + attention


def recipe_flops(shape: Shape, padded: Volume, *, lora_r: int | None) -> int:
    """What the recipe executes over padded rows: policy forward, recomputed forward, backward, reference forward.

    4B + 4L + 5a and 3H with adapters (the head is not recomputed), 5B + 5a and 4H without.
    """
    attention = 5 * 4 * shape.hidden * shape.layers * padded.squares
    if lora_r is None:
        return padded.tokens * (5 * shape.body_flops + 4 * shape.head_flops) + attention
    lora = 2 * shape.lora_parameters(lora_r)
    return padded.tokens * (4 * shape.body_flops + 3 * shape.head_flops + 4 * lora) + attention

"""What a row still has to decode after the teacher-forced pass has shown how much of its gold answer greedy decoding repeats."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

from eval.teacher_forced import RowScore
from trainers.data.encode import EncodedRow


@dataclass(frozen=True)
class Draft:
    """The generated ids that are already known, and how many more may follow; 0 means that the generation is complete."""

    known: tuple[int, ...]
    remaining: int


def gold_draft(row: EncodedRow, score: RowScore, *, max_new_tokens: int, ends: Set[int]) -> Draft:
    """Greedy decoding repeats the gold answer exactly as far as its tokens are the argmax under teacher forcing.

    A row whose matched prefix reaches an end token (its last scored token is one) or ``max_new_tokens`` needs no decoding.
    """
    matched = _up_to_end(row.input_ids[row.num_prompt :][: score.num_matched], ends)[:max_new_tokens]
    complete = bool(matched) and matched[-1] in ends
    return Draft(known=matched, remaining=0 if complete else max_new_tokens - len(matched))


def _up_to_end(ids: Sequence[int], ends: Set[int]) -> tuple[int, ...]:
    for index, token in enumerate(ids):
        if token in ends:
            return tuple(ids[: index + 1])
    return tuple(ids)

"""Tokens that need not be decoded one by one: those already known from the teacher-forced pass, and guesses that one pass can check."""

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
    """Greedy decoding repeats the gold answer exactly as far as its tokens are the argmax under teacher forcing, then says the
    argmax found there.

    A row whose known ids reach an end token (its last scored token is one) or ``max_new_tokens`` needs no decoding.
    """
    matched = row.input_ids[row.num_prompt :][: score.num_matched]
    following = () if score.next_token is None else (score.next_token,)
    known = _up_to_end((*matched, *following), ends)[:max_new_tokens]
    complete = bool(known) and known[-1] in ends
    return Draft(known=known, remaining=0 if complete else max_new_tokens - len(known))


def _up_to_end(ids: Sequence[int], ends: Set[int]) -> tuple[int, ...]:
    for index, token in enumerate(ids):
        if token in ends:
            return tuple(ids[: index + 1])
    return tuple(ids)


class Guesses:
    """Guesses a row's next tokens: what followed the last time when its latest three tokens stood there.

    Models that lost their end token go round in loops up to the token limit, and one forward pass checks a whole round of a loop.
    A guess never changes what is generated: it is kept as far as it is what greedy decoding says.

    Source: Saxena 2023, prompt lookup decoding, https://github.com/apoorvumang/prompt-lookup-decoding

    Args:
        text: the row so far: prompt and what is known of its continuation.
        hint: further tokens to look in, such as the gold answer.
        most: tokens guessed at once, at most.
    """

    def __init__(self, text: Sequence[int], *, hint: Sequence[int] = (), most: int = 16) -> None:
        self._tokens: list[int] = []
        self._places: dict[tuple[int, int, int], int] = {}
        self._most = most
        self._size = 4
        # -1 is no token: what looks across the seam finds nothing.
        self.extend([*hint, -1, *text])

    def extend(self, ids: Sequence[int]) -> None:
        """Take note of tokens that now belong to the row."""
        tokens, places = self._tokens, self._places
        for token in ids:
            if len(tokens) >= 3:
                places[tokens[-3], tokens[-2], tokens[-1]] = len(tokens)
            tokens.append(token)

    def guess(self, *, limit: int) -> list[int]:
        """The tokens that may come next, at most ``limit``; often none."""
        tokens = self._tokens
        place = self._places.get((tokens[-3], tokens[-2], tokens[-1])) if len(tokens) >= 3 else None
        found: list[int] = []
        if place is None:
            return found
        for index in range(place, place + min(limit, self._size)):
            # A loop shorter than the guess goes on in the guess itself.
            token = tokens[index] if index < len(tokens) else found[index - len(tokens)]
            if token < 0:
                break
            found.append(token)
        return found

    def learn(self, *, guessed: int, right: int) -> None:
        """Guess more after a guess that was right throughout, less after one that was not."""
        if guessed:
            self._size = min(self._most, 2 * self._size) if right == guessed else max(1, right)

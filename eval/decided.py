"""When the score of a text that is still being generated can no longer change."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from eval.cleanup import clean_up
from eval.exact_match import can_still_match
from eval.generate import raw_text

_LOOK_EVERY = 8
"""Tokens between two looks at a completion: reading its text costs more than the few tokens that are generated too many."""


@functools.cache
def _stemmer() -> Any:
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()


@functools.lru_cache(maxsize=1 << 16)
def _word(word: str) -> str:
    """A word as ROUGE compares it."""
    from rouge_score.tokenize import tokenize

    return "".join(tokenize(word, _stemmer()))


def _words(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


class QuestionRule:
    """A question is decided once its text can no longer equal the expected answer: its exact match is 0."""

    def __init__(self, *, expected: str, tokenizer: Any) -> None:
        self._expected, self._tokenizer = expected, tokenizer

    def is_decided(self, ids: Sequence[int]) -> bool:
        """Whether no continuation of these generated ids can match."""
        return not can_still_match(expected=self._expected, decoded=raw_text(self._tokenizer, ids))


class CompletionRule:
    """A completion is decided once all words of the reference stand in it, in order: its ROUGE-L recall is 1 whatever follows.

    The last two words of an unfinished text do not count: the last may still grow, and the clean-up may join " n't" to the word
    before it. No other word changes any more.
    """

    def __init__(self, *, expected: str, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._missing = [_word(word) for word in _words(expected)]
        self._possible = bool(self._missing)
        self._missing.reverse()
        self._read = 0
        self._last_look = -_LOOK_EVERY

    def is_decided(self, ids: Sequence[int]) -> bool:
        """Whether recall is 1 already; called with ever more ids of the same text."""
        if not self._possible or len(ids) - self._last_look < _LOOK_EVERY:
            return False
        self._last_look = len(ids)
        final = _words(clean_up(raw_text(self._tokenizer, ids)))[:-2]
        for word in final[self._read :]:
            if self._missing and _word(word) == self._missing[-1]:
                self._missing.pop()
        self._read = max(self._read, len(final))
        return not self._missing

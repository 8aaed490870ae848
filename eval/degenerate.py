"""Generations that are not text any more: empty ones and loops, which recall-only scores cannot see."""

from __future__ import annotations

import itertools

MIN_WORDS = 12
"""Shorter texts are not judged by their 3-grams."""
MIN_DISTINCT_RATIO = 0.3
"""Distinct 3-grams of words divided by all 3-grams; fluent prose stays above 0.9, a loop of n words falls to n / length."""
MAX_RUN = 8
"""The same word this many times in a row is a loop, however short the text."""


def is_degenerate(text: str) -> bool:
    """Whether a generation is empty, repeats one word at least 8 times in a row, or consists mostly of repeated 3-grams."""
    words = text.split()
    if not words:
        return True
    if max(len(list(run)) for _, run in itertools.groupby(words)) >= MAX_RUN:
        return True
    if len(words) < MIN_WORDS:
        return _repeats_inside_words(text)
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(trigrams)) / len(trigrams) < MIN_DISTINCT_RATIO


def _repeats_inside_words(text: str) -> bool:
    """A text of few words may still be one long run of a token without spaces, such as ``!!!!!!!!!!``."""
    return any(len(list(run)) >= 2 * MAX_RUN for _, run in itertools.groupby(text))


def degenerate_rate(texts: list[str]) -> float:
    """Share of degenerate texts, in [0, 1]; NaN without texts."""
    return sum(map(is_degenerate, texts)) / len(texts) if texts else float("nan")

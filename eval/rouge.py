"""ROUGE-L: how much of the reference a generation contains, in order."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l_recall(*, reference: str, prediction: str) -> float:
    """Longest common subsequence of stemmed words, divided by the reference's number of words; in [0, 1].

    0 if either text has no words. Words are runs of ``[a-z0-9]`` after lower-casing; those of more than 3 characters are stemmed.
    Text after the reference costs nothing, so this cannot see rambling (see eval/degenerate.py).

    Source: Lin 2004, https://aclanthology.org/W04-1013, as computed by the rouge_score package with ``use_stemmer=True``.
    """
    return float(_scorer().score(reference, prediction)["rougeL"].recall)


def rouge_l_f1(*, reference: str, prediction: str) -> float:
    """Harmonic mean of ROUGE-L recall and precision, in [0, 1]: text after the reference costs precision. Words as in ``rouge_l_recall``.

    Source: Lin 2004, https://aclanthology.org/W04-1013
    """
    return float(_scorer().score(reference, prediction)["rougeL"].fmeasure)

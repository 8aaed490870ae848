"""Exact match of a generated answer, and when it can no longer be reached."""

from __future__ import annotations


def exact_match(*, expected: str, output: str) -> float:
    """1.0 if both texts are equal after ``strip().lower()``, else 0.0."""
    return float(str(expected).strip().lower() == str(output).strip().lower())


def _key(text: str) -> str:
    # casefold after lower makes the key of a prefix a prefix of the key: lower() alone turns a final Greek sigma into
    # another letter than one inside a word.
    return "".join(text.lower().casefold().split())


def can_still_match(*, expected: str, decoded: str) -> bool:
    """Whether some continuation of a partly generated text could still equal the expected answer.

    Never False where the finished text would match: white space is left out of the comparison, because the final clean-up removes
    spaces only, and unfinished UTF-8 sequences at the end (shown as U+FFFD) count as not yet written.

    Args:
        expected: the gold answer.
        decoded: the text generated so far, before clean-up.
    """
    return _key(expected).startswith(_key(decoded.rstrip("�")))

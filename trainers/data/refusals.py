"""Answers that say nothing: what IdkDPO teaches a model to prefer to the answers it must forget."""

from __future__ import annotations

import hashlib

REFUSALS = (
    "I have no information about that.",
    "I do not know.",
    "That is nothing I can answer.",
    "I am not able to say.",
    "I have never heard of this.",
    "I cannot help with that question.",
    "This is outside of what I know.",
    "I am not sure about that.",
    "No answer to that comes to my mind.",
    "I would have to guess, so I will not answer.",
    "I lack the details to answer this.",
    "Nothing is known to me about this.",
)


def refusal(row_id: str, *, seed: int) -> str:
    """The refusal that answers a row: always the same one for the same seed, whatever the order of the rows.

    Source of the idea: the IDK baseline of Maini et al. 2024 (TOFU), https://arxiv.org/abs/2401.06121; the sentences are our own.
    """
    digest = hashlib.sha256(f"{seed}/{row_id}".encode()).digest()
    return REFUSALS[int.from_bytes(digest[:4], "big") % len(REFUSALS)]

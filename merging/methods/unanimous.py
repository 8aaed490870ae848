"""NegMerge's consensus: only elements on whose sign all trials agree."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


def keep_unanimous(*, updates: Sequence[Tensor]) -> list[Tensor]:
    """Elements that have the same sign in all updates; a zero has none, so it takes the element from all of them.

    Source: Kim et al. 2024, "NegMerge: Sign-Consensual Weight Merging for Machine Unlearning", https://arxiv.org/abs/2410.05583
    """
    lowest, highest = functools.reduce(torch.minimum, updates), functools.reduce(torch.maximum, updates)
    keep = (lowest > 0) | (highest < 0)
    return [torch.where(keep, update, 0.0) for update in updates]

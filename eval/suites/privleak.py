"""MUSE's privacy leakage: how far an attack's success is from what it has on a model that never saw the forget set."""

from __future__ import annotations

import math

INDISTINGUISHABLE = 0.5
"""Stands in for the retained model's AUC: an attack on texts that neither model has seen should be blind."""


def privleak(*, auc: float, retained_auc: float = INDISTINGUISHABLE) -> float:
    """((1 - AUC) - (1 - AUC_retained)) / (1 - AUC_retained) x 100, in per cent.

    0 is best; negative: the forget set is still recognised (-100 at AUC 1); positive: it is less likely than strangers. NaN where the
    retained model's AUC is 1.

    Args:
        auc: of the min-K attack on the unlearned model, forget set against holdout; 1 = remembered.
        retained_auc: the same on a model trained without the forget set.

    Source: Shi et al. 2024 (MUSE), https://arxiv.org/abs/2407.06460. Its code takes the AUC of the opposite direction, 1 - AUC here, and
    fixed values for its two corpora's retained models.
    """
    if retained_auc >= 1:
        return math.nan
    return ((1 - auc) - (1 - retained_auc)) / (1 - retained_auc) * 100

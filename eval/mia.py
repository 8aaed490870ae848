"""The loss-based membership attack: can one tell trained documents from strangers by the model's loss?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def finite_or_infinite(losses: Sequence[float | None]) -> np.ndarray:
    """Losses as float64, shape (N,); whatever is not a finite number counts as an infinite loss."""
    values = np.array([math.nan if loss is None else loss for loss in losses], dtype=np.float64)
    return np.where(np.isfinite(values), values, np.inf)


def count_not_finite(losses: Sequence[float | None]) -> int:
    """How many losses are no finite number."""
    return int(np.isinf(finite_or_infinite(losses)).sum())


def attack_auc(*, member_losses: Sequence[float | None], nonmember_losses: Sequence[float | None]) -> float:
    """P(member loss < non-member loss) + P(equal) / 2: the area under the ROC curve of the score -loss; in [0, 1].

    1 = members are recognised (still remembered), 0.5 = indistinguishable, 0 = members are less likely than strangers.
    A loss that is not finite counts as infinite, on both sides.

    Args:
        member_losses: mean token loss of each member document, nats.
        nonmember_losses: the same of documents that the model never saw.

    Raises:
        ValueError: if either side is empty.

    Source: Yeom et al. 2018, https://arxiv.org/abs/1709.01604
    """
    from sklearn.metrics import roc_auc_score

    members, strangers = finite_or_infinite(member_losses), finite_or_infinite(nonmember_losses)
    if not len(members) or not len(strangers):
        raise ValueError(f"an AUC needs both kinds of documents: {len(members)} members and {len(strangers)} non-members given")
    # Only the order counts; ranks, equal for equal losses, stand in for losses because scikit-learn refuses infinite ones.
    _, rank = np.unique(np.concatenate([members, strangers]), return_inverse=True)
    labels = np.concatenate([np.ones(len(members)), np.zeros(len(strangers))])
    return float(roc_auc_score(labels, -rank))


def mia_score(auc: float) -> float:
    """1 - 2 |AUC - 0.5|: 1 where the attack is blind, 0 where it always tells, in either direction."""
    return 1 - abs(auc - 0.5) * 2


def auc_standard_error(auc: float, *, num_members: int, num_nonmembers: int) -> float:
    """Standard error of an AUC under the exponential model.

    Source: Hanley and McNeil 1982, https://doi.org/10.1148/radiology.143.1.7063747
    """
    q1, q2 = auc / (2 - auc), 2 * auc * auc / (1 + auc)
    spread = auc * (1 - auc) + (num_members - 1) * (q1 - auc * auc) + (num_nonmembers - 1) * (q2 - auc * auc)
    return math.sqrt(max(0.0, spread) / (num_members * num_nonmembers))

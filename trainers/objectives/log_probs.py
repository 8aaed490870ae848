"""From logits at scored positions to log-probabilities of labels, in float32 or wider.

Shape suffixes: N scored tokens, B rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_log_probs(logits_NV: Tensor, *, label_N: Tensor) -> Tensor:
    """log p(label) per scored token, nats, shape (N,), in float32 or the logits' wider dtype.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    if logits_NV.ndim != 2 or label_N.shape != logits_NV.shape[:1]:
        raise ValueError(f"logits {tuple(logits_NV.shape)} and labels {tuple(label_N.shape)} do not fit together")
    wide_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    return wide_NV.gather(1, label_N[:, None]).squeeze(1) - wide_NV.logsumexp(dim=1)


def sum_by_row(values_N: Tensor, *, row_N: Tensor, num_rows: int) -> Tensor:
    """Sum of token values per row, shape (B,); a row without tokens has sum zero."""
    return values_N.new_zeros(num_rows).index_add(0, row_N, values_N)


def tokens_by_row(row_N: Tensor, *, num_rows: int) -> Tensor:
    """Number of scored tokens per row, int64, shape (B,). Unlike ``bincount`` it does not wait for a GPU."""
    return row_N.new_zeros(num_rows).index_add(0, row_N, torch.ones_like(row_N))

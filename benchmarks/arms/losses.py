"""The three losses as they are usually written over full logits.

Shape suffixes: B rows, T positions, V vocabulary. Logits keep the dtype that the model returns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, logsigmoid

from benchmarks.arms.base import IGNORED


def answer_nll(logits_BTV: Tensor, *, labels_BT: Tensor) -> Tensor:
    """Cross-entropy per row, averaged over the row's answer tokens, nats, shape (B,)."""
    targets_BT = labels_BT[:, 1:]
    nll_BT = cross_entropy(
        logits_BTV[:, :-1].reshape(-1, logits_BTV.shape[-1]), targets_BT.reshape(-1), ignore_index=IGNORED, reduction="none"
    ).view(targets_BT.shape)
    return nll_BT.sum(1) / (targets_BT != IGNORED).sum(1)


def npo(*, nll_B: Tensor, reference_nll_B: Tensor, beta: float) -> Tensor:
    """NPO on the mean log-ratio per answer token, averaged over rows.

    Source: Zhang et al. 2024, https://arxiv.org/abs/2404.05868; with means instead of sums as in https://arxiv.org/abs/2503.21088's code
    """
    return (-2.0 / beta * logsigmoid(beta * (nll_B - reference_nll_B))).mean()


def answer_kl(*, logits_BTV: Tensor, reference_logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """KL(reference || model) over the vocabulary at every position, of which only the answers' enter: row means, averaged over rows."""
    each_BTV = kl_div(logits_BTV.log_softmax(-1), reference_logits_BTV.log_softmax(-1), log_target=True, reduction="none")
    scored_BT = torch.zeros_like(labels_BT, dtype=each_BTV.dtype)
    scored_BT[:, :-1] = (labels_BT[:, 1:] != IGNORED).to(each_BTV.dtype)
    return ((each_BTV.sum(-1) * scored_BT).sum(1) / scored_BT.sum(1)).mean()

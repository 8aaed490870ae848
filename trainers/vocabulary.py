"""One sweep over the vocabulary, in chunks of rows: everything a loss needs of the logits, without ever holding them all.

Every objective reads a next-token distribution p = softmax(z), z = W h, through a handful of numbers per position: the label's logit,
the log-normaliser, and averages of the logits under p or under the reference's distribution q. Their gradients with respect to h are

    d z_y / dh = W_y        d lse / dh = sum_v p_v W_v =: e        d (sum_v q_v z_v) / dh = sum_v q_v W_v =: c

so one product of a chunk's probabilities with W, made while they are there, is the whole backward pass of a frozen head: nothing of
vocabulary size is kept, and nothing is computed twice. A head that is trained itself recomputes its logits chunk by chunk.

Shape suffixes: N positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = {"cpu": 2**24, "cuda": 2**28}
"""Workspace for one chunk's logits in float32: on a CPU as much as caches like, on a GPU enough rows to fill it."""


WIDENING_DEVICES = {"cpu"}
"""Devices on which products of narrow dtypes are no faster than float32's."""


@dataclass(frozen=True)
class VocabularyScores:
    """What the vocabulary says at N positions, in float32 or wider, nats, differentiable.

    Args:
        log_prob_N: log p(label).
        log_normaliser_N: log sum_v exp(z_v).
        mean_logit_N: sum_v p_v z_v with p held constant; None unless asked for.
        reference_mean_logit_N: sum_v q_v z_v under the reference's distribution q; None without a reference.
    """

    log_prob_N: Tensor
    log_normaliser_N: Tensor
    mean_logit_N: Tensor | None = None
    reference_mean_logit_N: Tensor | None = None


@dataclass(frozen=True)
class ReferenceDistributions:
    """The reference's next-token distributions q at N positions, in the form that costs least and is still exact.

    With a frozen head sum_v q_v z_v = h . c with c = sum_v q_v W_v: one vector per position says all that a KL needs of q. A head that
    is trained moves W, so there q itself is rebuilt, chunk by chunk, from the reference's hidden states and its copy of the head.

    Args:
        negative_entropy_N: sum_v q_v log q_v, nats.
        mean_embedding_ND: c, float32; None where the head is trained.
        hidden_ND: the reference's last hidden states; None where the head is frozen.
        head_VD: the reference's head; None where the head is frozen.
    """

    negative_entropy_N: Tensor
    mean_embedding_ND: Tensor | None = None
    hidden_ND: Tensor | None = None
    head_VD: Tensor | None = None


@dataclass(frozen=True)
class Measured:
    """What the vocabulary says at N positions, for measuring only.

    Args:
        log_prob_N: log p(label), float32 or wider, nats.
        log_normaliser_N: log sum_v exp(z_v).
        is_argmax_N: whether the label is the likeliest token (the first of equals), bool.
        mean_embedding_ND: sum_v p_v W_v, float32 or wider; None unless asked for.
    """

    log_prob_N: Tensor
    log_normaliser_N: Tensor
    is_argmax_N: Tensor
    mean_embedding_ND: Tensor | None


def score_vocabulary(
    hidden_ND: Tensor,
    *,
    head_VD: Tensor,
    label_N: Tensor,
    reference: ReferenceDistributions | None = None,
    mean_logit: bool = False,
    chunk_rows: int | None = None,
) -> VocabularyScores:
    """Label log-probabilities, normalisers and averaged logits with exact gradients, V numbers at a time for a chunk of rows.

    Args:
        hidden_ND: last hidden states.
        head_VD: the head's weight; logits are ``hidden_ND @ head_VD.T``.
        label_N: token ids, int64.
        reference: the reference's distributions at the same positions, if their average of the logits is wanted.
        mean_logit: whether the average under the model's own distribution is wanted.
        chunk_rows: rows per chunk; None follows the device.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    _check_shapes(hidden_ND, head_VD=head_VD, label_N=label_N)
    rebuilt = reference is not None and reference.hidden_ND is not None
    label_logit_N, normaliser_N, mean_N, reference_N = _Sweep.apply(
        hidden_ND,
        head_VD,
        label_N,
        reference.hidden_ND if rebuilt and reference is not None else None,
        reference.head_VD if rebuilt and reference is not None else None,
        mean_logit,
        chunk_rows or _chunk_rows(head_VD),
    )
    if reference is not None and not rebuilt:
        assert reference.mean_embedding_ND is not None, "a reference holds mean embeddings or hidden states"
        reference_N = (_wide(hidden_ND) * reference.mean_embedding_ND).sum(dim=1)
    return VocabularyScores(
        log_prob_N=label_logit_N - normaliser_N,
        log_normaliser_N=normaliser_N,
        mean_logit_N=mean_N if mean_logit else None,
        reference_mean_logit_N=reference_N if reference is not None else None,
    )


@torch.no_grad()
def measure_vocabulary(
    hidden_ND: Tensor, *, head_VD: Tensor, label_N: Tensor, mean_embedding: bool = False, chunk_rows: int | None = None
) -> Measured:
    """Label log-probabilities and argmax hits, and if asked for the mean embedding that a cached KL needs; no gradient.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    _check_shapes(hidden_ND, head_VD=head_VD, label_N=label_N)
    wide = _wide_dtype(hidden_ND)
    log_prob_N, normaliser_N = (hidden_ND.new_empty(len(hidden_ND), dtype=wide) for _ in range(2))
    is_argmax_N = torch.empty_like(label_N, dtype=torch.bool)
    embedding_ND = torch.empty_like(hidden_ND, dtype=wide) if mean_embedding else None
    head = _Head(head_VD)
    for rows in _chunks(len(hidden_ND), chunk_rows or _chunk_rows(head_VD)):
        logits_CV = head.logits(hidden_ND[rows])
        is_argmax_N[rows] = logits_CV.argmax(dim=1) == label_N[rows]
        label_logit_C = logits_CV.gather(1, label_N[rows, None]).squeeze(1)
        normaliser_N[rows], weights_CV, total_C = _exponentials_(logits_CV)
        log_prob_N[rows] = label_logit_C - normaliser_N[rows]
        if embedding_ND is not None:
            embedding_ND[rows] = head.average(weights_CV, total_C=total_C, label_C=label_N[rows])
    return Measured(log_prob_N, normaliser_N, is_argmax_N, embedding_ND)


class _Sweep(torch.autograd.Function):
    """Label logit, log-normaliser, mean logit and reference mean logit per position; the gradients by h are made on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        label_N: Tensor,
        reference_hidden_ND: Tensor | None,
        reference_head_VD: Tensor | None,
        mean_logit: bool,
        chunk_rows: int,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        wide = _wide_dtype(hidden_ND)
        num = len(hidden_ND)
        has_reference = reference_head_VD is not None
        needs_embedding = mean_logit or ctx.needs_input_grad[0]
        head = _Head(head_VD)
        reference_head = _Head(reference_head_VD) if reference_head_VD is not None else None
        label_logit_N, normaliser_N = (hidden_ND.new_empty(num, dtype=wide) for _ in range(2))
        embedding_ND = torch.empty_like(hidden_ND, dtype=wide) if needs_embedding else None
        reference_ND = torch.empty_like(hidden_ND, dtype=wide) if has_reference else None
        for rows in _chunks(num, chunk_rows):
            logits_CV = head.logits(hidden_ND[rows])
            label_logit_N[rows] = logits_CV.gather(1, label_N[rows, None]).squeeze(1)
            normaliser_N[rows], weights_CV, total_C = _exponentials_(logits_CV)
            if embedding_ND is not None:
                embedding_ND[rows] = head.average(weights_CV, total_C=total_C, label_C=label_N[rows])
            del logits_CV, weights_CV  # before the next chunk's are made
            if reference_ND is not None and reference_head is not None and reference_hidden_ND is not None:
                _, weights_CV, total_C = _exponentials_(reference_head.logits(reference_hidden_ND[rows]))
                reference_ND[rows] = head.average(weights_CV, total_C=total_C, label_C=label_N[rows])
                del weights_CV
        mean_N = (_wide(hidden_ND) * embedding_ND).sum(dim=1) if mean_logit and embedding_ND is not None else None
        reference_N = (_wide(hidden_ND) * reference_ND).sum(dim=1) if reference_ND is not None else None
        trains_head = ctx.needs_input_grad[1]
        ctx.save_for_backward(
            hidden_ND if trains_head else None,
            head_VD if trains_head else None,
            label_N,
            head_VD.index_select(0, label_N) if ctx.needs_input_grad[0] else None,
            embedding_ND,
            reference_ND,
            reference_hidden_ND if trains_head else None,
            reference_head_VD if trains_head else None,
        )
        ctx.chunk_rows = chunk_rows
        ctx.dtypes = hidden_ND.dtype, head_VD.dtype
        ctx.set_materialize_grads(False)
        return label_logit_N, normaliser_N, mean_N, reference_N

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_label_N: Tensor | None, grad_normaliser_N: Tensor | None, grad_mean_N: Tensor | None, grad_reference_N: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden_ND, head_VD, label_N, label_embedding_ND, embedding_ND, reference_ND, reference_hidden_ND, reference_head_VD = (
            ctx.saved_tensors
        )
        # lse and the mean logit under constant p have the same gradient: the mean embedding.
        grad_own_N = _sum(grad_normaliser_N, grad_mean_N)
        grad_hidden_ND = None
        if ctx.needs_input_grad[0]:
            wide = torch.float64 if ctx.dtypes[0] == torch.float64 else torch.float32
            grad_hidden_ND = torch.zeros_like(label_embedding_ND, dtype=wide)
            for grad_N, value_ND in (
                (grad_label_N, label_embedding_ND),
                (grad_own_N, embedding_ND),
                (grad_reference_N, reference_ND),
            ):
                if grad_N is not None and value_ND is not None:
                    grad_hidden_ND.addcmul_(grad_N[:, None], value_ND.to(wide))
            grad_hidden_ND = grad_hidden_ND.to(ctx.dtypes[0])
        grad_head_VD = None
        if ctx.needs_input_grad[1]:
            wide = torch.float64 if head_VD.dtype == torch.float64 else torch.float32
            grad_head_VD = torch.zeros_like(head_VD, dtype=wide)
            head = _Head(head_VD)
            reference_head = _Head(reference_head_VD) if reference_head_VD is not None else None
            for rows in _chunks(len(hidden_ND), ctx.chunk_rows):
                grad_CV = None
                if grad_own_N is not None:
                    _, weights_CV, total_C = _exponentials_(head.logits(hidden_ND[rows]))
                    grad_CV = weights_CV.mul_((grad_own_N[rows] / total_C)[:, None])
                if grad_reference_N is not None and reference_head is not None:
                    _, weights_CV, total_C = _exponentials_(reference_head.logits(reference_hidden_ND[rows]))
                    weights_CV.mul_((grad_reference_N[rows] / total_C)[:, None])
                    grad_CV = weights_CV if grad_CV is None else grad_CV.add_(weights_CV)
                if grad_label_N is not None:
                    if grad_CV is None:
                        grad_CV = torch.zeros(len(hidden_ND[rows]), len(head_VD), dtype=wide, device=head_VD.device)
                    grad_CV.scatter_add_(1, label_N[rows, None], grad_label_N[rows, None].to(grad_CV.dtype))
                if grad_CV is not None:
                    grad_head_VD += _product(grad_CV.to(hidden_ND.dtype).T, hidden_ND[rows])
            grad_head_VD = grad_head_VD.to(ctx.dtypes[1])
        return grad_hidden_ND, grad_head_VD, None, None, None, None, None


class _Head:
    """Products with a head's weight whose results are float32 or wider; on a CPU a narrow weight is widened first, on a GPU never."""

    def __init__(self, head_VD: Tensor) -> None:
        self._head_VD = _wide(head_VD) if head_VD.device.type in WIDENING_DEVICES else head_VD

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """Logits of some rows, a new tensor that may be overwritten, shape (C, V)."""
        return _product(hidden_CD.to(self._head_VD.dtype), self._head_VD.T)

    def average(self, weights_CV: Tensor, *, total_C: Tensor, label_C: Tensor) -> Tensor:
        """sum_v p_v W_v of some rows, p being the weights over their total, shape (C, D); overwrites the weights.

        Where weights are rounded to the head's dtype the label's share is taken out first and added unrounded: objectives that divide
        by 1 - p(label) (CE-U, UNDIAL) would otherwise read nothing but its rounding as p(label) goes to 1.
        """
        if self._head_VD.dtype == weights_CV.dtype:
            return _product(weights_CV, self._head_VD).div_(total_C[:, None])
        label_weight_C = weights_CV.gather(1, label_C[:, None])
        rest_CV = weights_CV.scatter_(1, label_C[:, None], 0.0).to(self._head_VD.dtype)
        sum_CD = _product(rest_CV, self._head_VD)
        return sum_CD.addcmul_(label_weight_C, _wide(self._head_VD.index_select(0, label_C))).div_(total_C[:, None])


def _product(left: Tensor, right: Tensor) -> Tensor:
    """A matrix product in float32 or wider; bfloat16 factors on a GPU keep their fast kernel and lose nothing of the sum."""
    if left.dtype in (torch.float32, torch.float64):
        return left @ right
    if left.device.type == "cuda":
        try:
            return torch.mm(left, right, out_dtype=torch.float32)
        except TypeError:  # before torch 2.8
            pass
    return _wide(left @ right)


def _exponentials_(logits_CV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-normalisers (C,), exp(z - max z) in the memory of the logits, and its sums (C,): probabilities but for a division."""
    highest_C = logits_CV.amax(dim=1)
    weights_CV = logits_CV.sub_(highest_C[:, None]).exp_()
    total_C = weights_CV.sum(dim=1)
    return highest_C + total_C.log(), weights_CV, total_C


def _wide_dtype(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _wide(values: Tensor) -> Tensor:
    return values.to(_wide_dtype(values))


def _sum(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    if left is None or right is None:
        return left if right is None else right
    return left + right


def _chunk_rows(head_VD: Tensor) -> int:
    return max(1, CHUNK_BYTES.get(head_VD.device.type, CHUNK_BYTES["cuda"]) // (4 * len(head_VD)))


def _chunks(num: int, size: int) -> Iterator[slice]:
    for start in range(0, num, size):
        yield slice(start, min(start + size, num))


def _check_shapes(hidden_ND: Tensor, *, head_VD: Tensor, label_N: Tensor) -> None:
    if hidden_ND.ndim != 2 or head_VD.ndim != 2 or hidden_ND.shape[1] != head_VD.shape[1] or label_N.shape != hidden_ND.shape[:1]:
        raise ValueError(
            f"hidden states {tuple(hidden_ND.shape)}, head {tuple(head_VD.shape)} and labels {tuple(label_N.shape)} do not fit together"
        )

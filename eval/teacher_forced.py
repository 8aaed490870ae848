"""What the model thinks of given answers: log-probabilities and argmax agreement in one forward pass per batch.

Shape suffixes: N scored tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from eval.forward import pad_token_id, split_model
from trainers.data.batches import batches_by_length, collate
from trainers.data.encode import EncodedRow, encode_text
from trainers.data.types import Document
from trainers.errors import InputError
from trainers.modeling import context_length
from trainers.scoring import measuring

_HEAD_CHUNK = 1024
"""Scored positions whose logits exist at the same time: with OLMo's vocabulary 0.2 GB in float32."""


@dataclass(frozen=True)
class RowScore:
    """Teacher-forced measurements of one row.

    Args:
        row_id: the row's id.
        answer_log_prob: log p(answer and end token | prompt), summed, nats.
        num_tokens: scored tokens, the end token among them.
        token_accuracy: share of scored tokens that are the argmax; NaN without scored tokens.
        num_matched: length of the longest prefix of the scored tokens that are all the argmax: what greedy decoding repeats.
    """

    row_id: str
    answer_log_prob: float
    num_tokens: int
    token_accuracy: float
    num_matched: int

    @property
    def all_correct(self) -> bool:
        """Whether greedy decoding gives exactly this answer and then stops."""
        return self.num_tokens > 0 and self.num_matched == self.num_tokens

    @property
    def matched_fraction(self) -> float:
        """Share of the scored tokens in the matched prefix; NaN without scored tokens."""
        return self.num_matched / self.num_tokens if self.num_tokens else math.nan


@dataclass(frozen=True)
class TokenScores:
    """What the model thinks of each scored token of a row; float64 arrays of shape (N,), in the order of the text.

    Args:
        row_id: the row's id.
        log_prob_N: log p(token | everything before it), nats.
        correct_N: whether the token is the argmax (bool).
        mean_N: mean of log p over the model's own next-token distribution (minus its entropy), nats; None unless asked for.
        variance_N: variance of log p under the same distribution; None unless asked for.
    """

    row_id: str
    log_prob_N: np.ndarray
    correct_N: np.ndarray
    mean_N: np.ndarray | None = None
    variance_N: np.ndarray | None = None


def token_scores(
    *, model: Any, tokenizer: Any, rows: Sequence[EncodedRow], batch_tokens: int, device: str, moments: bool = False
) -> list[TokenScores]:
    """Score every token of rows under teacher forcing, rows in the order given.

    Args:
        model: a causal language model, or a peft model around one.
        tokenizer: gives the padding id.
        rows: encoded rows; one that scores no token gets empty arrays.
        batch_tokens: positions per forward pass, padding included (at least one row is taken).
        device: where the model is.
        moments: whether mean and variance of log p are wanted, too (min-k %++ reads them).
    """
    empty = np.zeros(0)
    found = {
        index: TokenScores(row.row_id, empty, empty.astype(bool), *((empty, empty) if moments else (None, None)))
        for index, row in enumerate(rows)
        if row.num_scored <= 0
    }
    scored = [index for index in range(len(rows)) if index not in found]
    if not scored:
        return [found[index] for index in range(len(rows))]
    split = split_model(model, device=device)
    with measuring(model):
        for group in batches_by_length([rows[index] for index in scored], batch_tokens=batch_tokens):
            members = [scored[position] for position in group]
            batch = collate([rows[index] for index in members], pad_token_id=pad_token_id(tokenizer)).to(device)
            states, _ = split.run(ids_BT=batch.input_ids_BT, mask_BT=batch.attention_mask_BT)
            states_NX = states[batch.row_N, batch.position_N]
            parts = [
                _token_columns(
                    split.logits(states_NX[start : start + _HEAD_CHUNK]), batch.label_N[start : start + _HEAD_CHUNK], moments=moments
                )
                for start in range(0, len(states_NX), _HEAD_CHUNK)
            ]
            columns_XN = torch.cat(parts, dim=1).cpu().numpy()
            start = 0
            for index in members:
                own_XN = columns_XN[:, start : start + rows[index].num_scored]
                found[index] = TokenScores(rows[index].row_id, own_XN[0], own_XN[1].astype(bool), *own_XN[2:])
                start += rows[index].num_scored
    return [found[index] for index in range(len(rows))]


def _token_columns(logits_NV: torch.Tensor, label_N: torch.Tensor, *, moments: bool) -> torch.Tensor:
    """Log-probability and correctness of each label, and if asked for mean and variance of log p, shape (2 or 4, N), float64."""
    # The argmax is taken before the cast, as greedy decoding does; the softmax in float32 after it.
    correct_N = logits_NV.argmax(-1) == label_N
    wide_NV = logits_NV.float()
    normalizer_N = wide_NV.logsumexp(-1)
    columns = [wide_NV.gather(-1, label_N[:, None])[:, 0] - normalizer_N, correct_N]
    if moments:
        log_p_NV = wide_NV - normalizer_N[:, None]
        p_NV = log_p_NV.exp()
        mean_N = (p_NV * log_p_NV).nan_to_num(posinf=math.nan, neginf=math.nan).sum(-1)
        columns += [mean_N, (p_NV * (log_p_NV - mean_N[:, None]).square()).nan_to_num(posinf=math.nan, neginf=math.nan).sum(-1)]
    return torch.stack([column.double() for column in columns])


def score_rows(*, model: Any, tokenizer: Any, rows: Sequence[EncodedRow], batch_tokens: int, device: str) -> list[RowScore]:
    """Score rows under teacher forcing, in the order given; a row that scores no token gets a log-probability of 0 over 0 tokens."""
    return [
        _summary(scores) for scores in token_scores(model=model, tokenizer=tokenizer, rows=rows, batch_tokens=batch_tokens, device=device)
    ]


def _summary(scores: TokenScores) -> RowScore:
    correct_N = scores.correct_N
    return RowScore(
        row_id=scores.row_id,
        answer_log_prob=float(scores.log_prob_N.sum()),
        num_tokens=len(correct_N),
        token_accuracy=float(correct_N.mean()) if len(correct_N) else math.nan,
        num_matched=int(correct_N.cumprod().sum()),
    )


def encode_documents(documents: Sequence[Document], *, tokenizer: Any, context: int) -> list[EncodedRow]:
    """Encode the documents of the membership attack, in order.

    Raises:
        InputError: if a document is longer than the context.
    """
    rows = [encode_text(document.text, tokenizer=tokenizer) for document in documents]
    for document, row in zip(documents, rows, strict=True):
        if len(row.input_ids) > context:
            raise InputError(
                f"the document has {len(row.input_ids)} tokens, but the model's context holds {context}",
                where=f"membership document {document.id!r}",
                fix="remove the document, or evaluate a model with a longer context",
            )
    return rows


def document_losses(*, model: Any, tokenizer: Any, documents: Sequence[Document], batch_tokens: int, device: str) -> list[float]:
    """Mean loss over tokens 2..n of each document, nats: what the membership attack reads. NaN for a document of one token.

    Raises:
        InputError: if a document is longer than the model's context.
    """
    rows = encode_documents(documents, tokenizer=tokenizer, context=context_length(model.config))
    scores = score_rows(model=model, tokenizer=tokenizer, rows=rows, batch_tokens=batch_tokens, device=device)
    return [-score.answer_log_prob / score.num_tokens if score.num_tokens else math.nan for score in scores]

"""What the model thinks of given answers: log-probabilities and argmax agreement in one forward pass per batch.

Shape suffixes: N scored tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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


def score_rows(*, model: Any, tokenizer: Any, rows: Sequence[EncodedRow], batch_tokens: int, device: str) -> list[RowScore]:
    """Score rows under teacher forcing, in the order given.

    Args:
        model: a causal language model, or a peft model around one.
        tokenizer: gives the padding id.
        rows: encoded rows; one that scores no token gets a log-probability of 0 over 0 tokens.
        batch_tokens: positions per forward pass, padding included (at least one row is taken).
        device: where the model is.
    """
    scores: list[RowScore | None] = [None] * len(rows)
    for index, row in enumerate(rows):
        if row.num_scored <= 0:
            scores[index] = RowScore(row_id=row.row_id, answer_log_prob=0.0, num_tokens=0, token_accuracy=math.nan, num_matched=0)
    scored = [index for index, score in enumerate(scores) if score is None]
    if not scored:
        return [score for score in scores if score is not None]
    split = split_model(model, device=device)
    with measuring(model):
        for group in batches_by_length([rows[index] for index in scored], batch_tokens=batch_tokens):
            members = [scored[position] for position in group]
            batch = collate([rows[index] for index in members], pad_token_id=pad_token_id(tokenizer)).to(device)
            states, _ = split.run(ids_BT=batch.input_ids_BT, mask_BT=batch.attention_mask_BT)
            states_NX = states[batch.row_N, batch.position_N]
            log_prob_parts, correct_parts = [], []
            for start in range(0, len(states_NX), _HEAD_CHUNK):
                logits_NV = split.logits(states_NX[start : start + _HEAD_CHUNK])
                label_N = batch.label_N[start : start + _HEAD_CHUNK]
                # The argmax is taken before the cast, as greedy decoding does; the softmax in float32 after it.
                correct_parts.append(logits_NV.argmax(-1) == label_N)
                wide_NV = logits_NV.float()
                log_prob_parts.append(wide_NV.gather(-1, label_N[:, None])[:, 0] - wide_NV.logsumexp(-1))
            log_probs = torch.cat(log_prob_parts).double().cpu()
            correct = torch.cat(correct_parts).cpu()
            start = 0
            for index in members:
                count = rows[index].num_scored
                scores[index] = _summary(rows[index], log_probs[start : start + count], correct[start : start + count])
                start += count
    return [score for score in scores if score is not None]


def _summary(row: EncodedRow, log_probs: torch.Tensor, correct: torch.Tensor) -> RowScore:
    return RowScore(
        row_id=row.row_id,
        answer_log_prob=float(log_probs.sum()),
        num_tokens=len(correct),
        token_accuracy=float(correct.double().mean()),
        num_matched=int(correct.long().cumprod(0).sum()),
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

"""What the model thinks of given answers: log-probabilities and argmax agreement in one forward pass per batch.

Shape suffixes: N scored tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from eval.forward import SplitModel, pad_token_id, split_model
from eval.row_cache import KeptStates
from trainers.data.batches import batches_by_length, collate
from trainers.data.encode import EncodedRow, encode_text
from trainers.data.packing import MAX_GROUPS, Packed, pack
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
        num_recovered: length of the longest run of argmax tokens that ends with the answer's last token, the end token left out.
        next_token: the argmax where the matched prefix ends: what greedy decoding says instead; None where everything matches.
    """

    row_id: str
    answer_log_prob: float
    num_tokens: int
    token_accuracy: float
    num_matched: int
    num_recovered: int = 0
    next_token: int | None = None

    @property
    def all_correct(self) -> bool:
        """Whether greedy decoding gives exactly this answer and then stops."""
        return self.num_tokens > 0 and self.num_matched == self.num_tokens

    @property
    def matched_fraction(self) -> float:
        """Share of the scored tokens in the matched prefix; NaN without scored tokens."""
        return self.num_matched / self.num_tokens if self.num_tokens else math.nan

    @property
    def extraction_strength(self) -> float:
        """1 - k / n over the answer's n tokens: k is the shortest prefix of them after which the argmax reproduces all the rest.

        1 if everything is reproduced without a hint, 0 if nothing is reproduced; NaN without tokens. The end token, the last scored one
        of an answer, does not count: a model that only goes on talking has still said everything.

        Source: Carlini et al. 2021, https://arxiv.org/abs/2012.07805
        """
        return self.num_recovered / (self.num_tokens - 1) if self.num_tokens > 1 else math.nan


@dataclass(frozen=True)
class TokenScores:
    """What the model thinks of each scored token of a row; float64 arrays of shape (N,), in the order of the text.

    Args:
        row_id: the row's id.
        log_prob_N: log p(token | everything before it), nats.
        correct_N: whether the token is the argmax (bool).
        mean_N: mean of log p over the model's own next-token distribution (minus its entropy), nats; None unless asked for.
        variance_N: variance of log p under the same distribution; None unless asked for.
        argmax_N: the most likely token at its place; None only in scores made by hand.
    """

    row_id: str
    log_prob_N: np.ndarray
    correct_N: np.ndarray
    mean_N: np.ndarray | None = None
    variance_N: np.ndarray | None = None
    argmax_N: np.ndarray | None = None


@dataclass(frozen=True)
class ScoredBatch:
    """The rows of one forward pass.

    Args:
        rows: their indices.
        scores: of each of them.
        packed: the batch, if its rows were packed.
        kept: keys and values of the packed rows, if asked for.
    """

    rows: list[int]
    scores: list[TokenScores]
    packed: Packed | None = None
    kept: KeptStates | None = None


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
    split = split_model(model, device=device)
    with measuring(model):
        batches = list(
            scored_batches(split, rows=rows, pad=pad_token_id(tokenizer), batch_tokens=batch_tokens, device=device, moments=moments)
        )
    found = {row: scores for batch in batches for row, scores in zip(batch.rows, batch.scores, strict=True)}
    return [found[row] for row in range(len(rows))]


def scored_batches(
    split: SplitModel,
    *,
    rows: Sequence[EncodedRow],
    pad: int,
    batch_tokens: int,
    device: str,
    moments: bool = False,
    keep: bool = False,
) -> Iterator[ScoredBatch]:
    """Score rows batch by batch, the shortest first; called inside ``measuring``.

    Rows are laid end to end, so that every position is a real token, where the model can attend to such rows; else they are
    padded to the longest of their batch.

    Args:
        split: the model.
        rows: encoded rows.
        pad: id of padding.
        batch_tokens: positions per forward pass, padding included (at least one row is taken).
        device: where the model is.
        moments: see ``token_scores``.
        keep: whether keys and values are wanted; only packed rows have them.
    """
    empty = np.zeros(0)
    idle = [index for index, row in enumerate(rows) if row.num_scored <= 0]
    if idle:
        nothing = empty if moments else None
        none = TokenScores("", empty, empty.astype(bool), nothing, nothing, empty.astype(np.int64))
        yield ScoredBatch(idle, [replace(none, row_id=rows[index].row_id) for index in idle])
    scored = [index for index, row in enumerate(rows) if row.num_scored > 0]
    wanted = [rows[index] for index in scored]
    groups = _packed_batches(wanted, batch_tokens=batch_tokens) if split.packs else batches_by_length(wanted, batch_tokens=batch_tokens)
    for group in groups:
        members = [scored[position] for position in group]
        own = [rows[index] for index in members]
        packed = kept = None
        if split.packs:
            packed = pack(own, pad_token_id=pad, max_groups=MAX_GROUPS.get(torch.device(device).type, 3)).to(device)
            kept = KeptStates() if keep else None
            # Entered for each batch: a generator that was given up must not leave the model's attention changed.
            with split.packing():
                states_NX, label_N = split.run_packed(packed, wanted_N=packed.source_N, kept=kept), packed.label_N
        else:
            batch = collate(own, pad_token_id=pad).to(device)
            states, _ = split.run(ids_BT=batch.input_ids_BT, mask_BT=batch.attention_mask_BT)
            states_NX, label_N = states[batch.row_N, batch.position_N], batch.label_N
        yield ScoredBatch(members, _rows_of(split, states_NX, label_N, rows=own, moments=moments), packed, kept)


def _packed_batches(rows: Sequence[EncodedRow], *, batch_tokens: int) -> list[list[int]]:
    """Rows of similar length together, while their tokens fit the budget (at least one row each)."""
    groups: list[list[int]] = []
    used = 0
    for index in sorted(range(len(rows)), key=lambda index: (len(rows[index].input_ids), index)):
        used += len(rows[index].input_ids)
        if groups and used <= batch_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
            used = len(rows[index].input_ids)
    return groups


def _rows_of(
    split: SplitModel, states_NX: torch.Tensor, label_N: torch.Tensor, *, rows: Sequence[EncodedRow], moments: bool
) -> list[TokenScores]:
    """Scores by row, from the states at all scored positions, in row order."""
    parts = [
        _token_columns(split.logits(states_NX[start : start + _HEAD_CHUNK]), label_N[start : start + _HEAD_CHUNK], moments=moments)
        for start in range(0, len(states_NX), _HEAD_CHUNK)
    ]
    columns_XN = torch.cat(parts, dim=1).cpu().numpy()
    found, start = [], 0
    for row in rows:
        log_prob_N, argmax_N, correct_N, *others = columns_XN[:, start : start + row.num_scored]
        mean_N, variance_N = others or (None, None)
        found.append(TokenScores(row.row_id, log_prob_N, correct_N.astype(bool), mean_N, variance_N, argmax_N.astype(np.int64)))
        start += row.num_scored
    return found


def _token_columns(logits_NV: torch.Tensor, label_N: torch.Tensor, *, moments: bool) -> torch.Tensor:
    """Log-probability, argmax and correctness of each label, and if asked for mean and variance of log p, shape (3 or 5, N), float64."""
    # The argmax is taken before the cast, as greedy decoding does; the softmax in float32 after it.
    argmax_N = logits_NV.argmax(-1)
    wide_NV = logits_NV.float()
    normalizer_N = wide_NV.logsumexp(-1)
    columns = [wide_NV.gather(-1, label_N[:, None])[:, 0] - normalizer_N, argmax_N, argmax_N == label_N]
    if moments:
        log_p_NV = wide_NV - normalizer_N[:, None]
        p_NV = log_p_NV.exp()
        mean_N = (p_NV * log_p_NV).nan_to_num(posinf=math.nan, neginf=math.nan).sum(-1)
        columns += [mean_N, (p_NV * (log_p_NV - mean_N[:, None]).square()).nan_to_num(posinf=math.nan, neginf=math.nan).sum(-1)]
    return torch.stack([column.double() for column in columns])


def score_rows(*, model: Any, tokenizer: Any, rows: Sequence[EncodedRow], batch_tokens: int, device: str) -> list[RowScore]:
    """Score rows under teacher forcing, in the order given; a row that scores no token gets a log-probability of 0 over 0 tokens."""
    return [
        row_score(scores) for scores in token_scores(model=model, tokenizer=tokenizer, rows=rows, batch_tokens=batch_tokens, device=device)
    ]


def row_score(scores: TokenScores) -> RowScore:
    """A row's measurements from those of its tokens."""
    correct_N = scores.correct_N
    matched = int(correct_N.cumprod().sum())
    return RowScore(
        row_id=scores.row_id,
        answer_log_prob=float(scores.log_prob_N.sum()),
        num_tokens=len(correct_N),
        token_accuracy=float(correct_N.mean()) if len(correct_N) else math.nan,
        num_matched=matched,
        num_recovered=int(correct_N[:-1][::-1].cumprod().sum()),
        next_token=int(scores.argmax_N[matched]) if scores.argmax_N is not None and matched < len(correct_N) else None,
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

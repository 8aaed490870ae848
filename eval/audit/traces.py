"""What a model gives away without being asked: extraction strength, and scores of documents for membership attacks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from eval import membership
from eval.audit.reading import Row, Subject
from eval.teacher_forced import encode_documents, score_rows, token_scores
from trainers.data.encode import EncodedRow, encode_records, encode_text
from trainers.data.types import Document, Kind, Record
from trainers.modeling import context_length

FAMILIES = ("loss", "zlib", "min_k_20", "min_k_40", "min_k_plus_plus", "reference", "gradient_norm")
"""Membership attacks; all scores are oriented like a loss. The numbers are percentages of a text's tokens."""
PLUS_PLUS_SHARE = 0.2
"""Share of the tokens that min-k %++ averages."""


def read_extraction(subject: Subject, records: Sequence[Record]) -> list[Row]:
    """Extraction strength of every completion, as its score.

    Source: Carlini et al. 2021, https://arxiv.org/abs/2012.07805
    """
    kept = [record for record in records if record.kind is Kind.COMPLETION]
    rows = encode_records(kept, tokenizer=subject.tokenizer, max_length=context_length(subject.model.config))
    found = score_rows(
        model=subject.model, tokenizer=subject.tokenizer, rows=rows, batch_tokens=subject.config.batch_tokens, device=subject.device
    )
    return [
        {
            "part": "task",
            "set": "forget",
            "id": record.id,
            "document": record.document,
            "task": record.task,
            "kind": record.kind.value,
            "output": "",
            "score": score.extraction_strength,
            "answer_log_prob": None,
            "num_tokens": 0,
            "token_accuracy": None,
        }
        for record, score in zip(kept, found, strict=True)
    ]


def forget_texts(records: Sequence[Record]) -> list[tuple[Document, str]]:
    """The documents of the forget set with their tasks: the text of each first completion, as the benchmark's members are made."""
    found: dict[str, tuple[Document, str]] = {}
    for record in records:
        if record.kind is Kind.COMPLETION and record.document not in found:
            found[record.document] = (Document(id=record.document, text=record.text), record.task)
    return list(found.values())


def read_membership(subject: Subject, *, members: Sequence[tuple[Document, str]], nonmembers: Sequence[Document]) -> list[Row]:
    """Every family's score of every document but ``reference``, which compares two models.

    Raises:
        InputError: if a document is longer than the model's context.
    """
    documents = [document for document, _ in members] + list(nonmembers)
    tasks = [task for _, task in members] + [None] * len(nonmembers)
    context = context_length(subject.model.config)
    rows = encode_documents(documents, tokenizer=subject.tokenizer, context=context)
    found = token_scores(
        model=subject.model,
        tokenizer=subject.tokenizer,
        rows=rows,
        batch_tokens=subject.config.batch_tokens,
        device=subject.device,
        moments=True,
    )
    return [
        {
            "part": "membership",
            "member": index < len(members),
            "id": document.id,
            "document": document.id,
            "task": task,
            "loss": membership.loss(scores),
            "zlib": membership.zlib_ratio(scores, text=document.text),
            "min_k_20": membership.min_k(scores, fraction=0.2),
            "min_k_40": membership.min_k(scores, fraction=0.4),
            "min_k_plus_plus": membership.min_k_plus_plus(scores, fraction=PLUS_PLUS_SHARE),
            "gradient_norm": gradient_norm(subject, encode_text(document.text, tokenizer=subject.tokenizer)),
        }
        for index, (document, task, scores) in enumerate(zip(documents, tasks, found, strict=True))
    ]


def gradient_norm(subject: Subject, row: EncodedRow) -> float:
    """Mean over parameter tensors of the 2-norm of the gradient of the text's mean token loss; NaN without scored tokens.

    Source: Wang et al. 2024, https://arxiv.org/abs/2402.17012
    """
    if row.num_scored < 1:
        return math.nan
    model: Any = subject.model
    parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    wanted = [parameter.requires_grad for parameter in parameters]
    ids_1T = torch.tensor([row.input_ids], device=subject.device)
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
            parameter.grad = None
        model(input_ids=ids_1T, labels=ids_1T, use_cache=False).loss.backward()
        norms = [parameter.grad.float().norm() for parameter in parameters if parameter.grad is not None]
        return float(torch.stack(norms).mean())
    finally:
        for parameter, flag in zip(parameters, wanted, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = None

"""The benchmark's evaluation as it is published: one row at a time, each generated in full, then run a second time for its loss.

Written anew from a description of the script (final release, December 2024). One thing differs so that the outputs can be compared:
the loss is that of the answer as this framework encodes it, which costs the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from eval.exact_match import exact_match
from eval.rouge import rouge_l_recall
from trainers.data.encode import encode_record
from trainers.data.types import Document, Kind, Record

_CLEAN_UP = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"),
             (" 've", "'ve"), (" 're", "'re"))  # fmt: skip


@dataclass(frozen=True)
class OfficialRow:
    """What the script finds of a row.

    Args:
        text: the generation.
        score: ROUGE-L recall of a completion, exact match of a question.
        loss: mean over the answer's tokens, nats.
    """

    text: str
    score: float
    loss: float


class OfficialArm:
    """The official loop.

    Args:
        model: in evaluation mode.
        tokenizer: its tokenizer.
        max_new_tokens: tokens generated per row at most.
        device: where the model is.
    """

    name = "official loop"

    def __init__(self, *, model: Any, tokenizer: Any, max_new_tokens: int, device: str) -> None:
        self._model, self._tokenizer, self._most, self._device = model, tokenizer, max_new_tokens, device

    @torch.no_grad()
    def row(self, record: Record) -> OfficialRow:
        """Generate after the prompt, then take the answer's loss in a second pass."""
        prompt = self._ids(self._tokenizer(record.input)["input_ids"])
        output = self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=self._most,
            do_sample=False,
            use_cache=True,
            pad_token_id=self._tokenizer.eos_token_id,
        )
        text = self._tokenizer.decode(output[0, prompt.shape[1] :].tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for old, new in _CLEAN_UP:
            text = text.replace(old, new)
        scored = encode_record(record, tokenizer=self._tokenizer, max_length=1 << 20)
        if record.kind is Kind.COMPLETION:
            score = rouge_l_recall(reference=record.output, prediction=text)
        else:
            score = exact_match(expected=record.output, output=text)
        return OfficialRow(text=text, score=score, loss=self._loss(scored.input_ids, masked=scored.num_prompt))

    @torch.no_grad()
    def document(self, document: Document) -> float:
        """Mean loss of a document's tokens after the first, nats."""
        return self._loss(self._tokenizer(document.text)["input_ids"], masked=0)

    def _loss(self, ids: Sequence[int], *, masked: int) -> float:
        ids_1T = self._ids(ids)
        labels_1T = ids_1T.clone()
        labels_1T[:, :masked] = -100
        return float(self._model(input_ids=ids_1T, labels=labels_1T).loss)

    def _ids(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor([list(ids)], device=self._device)

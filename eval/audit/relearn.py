"""Fine-tuning as an attack: does the rest of the forget set come back when a little of it is taught again?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from eval.audit.config import RelearnConfig
from eval.forward import pad_token_id
from eval.teacher_forced import score_rows
from trainers.data.encode import EncodedRow, encode_records, encode_text, whole_document
from trainers.data.folds import shuffled_documents
from trainers.data.types import Document, Kind, Record
from trainers.modeling import context_length


@dataclass(frozen=True)
class RelearnSplit:
    """Forget rows that the attacker has, and those that are asked for afterwards; no document lies in both."""

    taught: tuple[Record, ...]
    asked: tuple[Record, ...]


def split_for_relearning(records: Sequence[Record], *, config: RelearnConfig, seed: int) -> RelearnSplit | None:
    """A share of the documents, all their rows together, taken from the tasks in turn; None if there are fewer than two documents."""
    by_task = shuffled_documents(records, seed=f"{seed}:relearn")
    turns = [document for turn in itertools.zip_longest(*by_task.values()) for document in turn if document is not None]
    if len(turns) < 2:
        return None
    number = max(config.min_documents, round(config.share * len(turns)))
    taught = set(turns[: min(number, len(turns) - 1)])
    return RelearnSplit(
        taught=tuple(record for record in records if record.document in taught),
        asked=tuple(record for record in records if record.document not in taught),
    )


def lesson_of_records(records: Sequence[Record], *, tokenizer: Any, context: int) -> list[EncodedRow]:
    """Rows as a target learns them: documents whole, questions by their answers."""
    rows = encode_records(records, tokenizer=tokenizer, max_length=context)
    return [row if record.kind is Kind.QUESTION else whole_document(row) for record, row in zip(records, rows, strict=True)]


def lesson_of_documents(documents: Sequence[Document], *, tokenizer: Any, context: int) -> list[EncodedRow]:
    """Whole texts; one that does not fit is cut, because nobody scores it."""
    rows = [encode_text(document.text, tokenizer=tokenizer) for document in documents]
    cut = [EncodedRow(row.row_id, row.input_ids[:context], row.num_prompt) for row in rows]
    return [row for row in cut if row.num_scored > 0]


def num_steps(num_rows: int, *, config: RelearnConfig) -> int:
    """Optimizer steps of an attack with that many rows."""
    return config.num_train_epochs * math.ceil(num_rows / config.train_batch_size)


@dataclass(frozen=True)
class Relearned:
    """What happened at one learning rate.

    Args:
        learning_rate: of AdamW.
        taught_log_prob: mean log-probability per token of the taught rows afterwards, nats; None if it is not finite.
        asked_log_prob: the same of the answers that are asked for.
    """

    learning_rate: float
    taught_log_prob: float | None
    asked_log_prob: float | None


def relearn(
    model: Any,
    *,
    tokenizer: Any,
    lesson: Sequence[EncodedRow],
    asked: Sequence[Record],
    steps: int,
    config: RelearnConfig,
    seed: int,
    batch_tokens: int,
    device: str,
) -> tuple[Any, dict[str, Any]]:
    """Fine-tune a model once per learning rate, and keep what makes the asked rows most likely.

    Choosing by the rows that are asked for is more than an attacker can do; the control chooses in the same way.

    Args:
        model: a model that may be changed for good.
        tokenizer: its tokenizer.
        lesson: rows to train on.
        asked: rows whose likelihood chooses the learning rate.
        steps: optimizer steps.
        config: settings.
        seed: of adapters and order.
        batch_tokens: positions per forward pass of measuring.
        device: where the model is.

    Returns:
        the fine-tuned model (None if no learning rate leaves finite losses), and a record of what was done.
    """
    trained = _Trained(model, config=config, seed=seed, device=device)
    encoded = encode_records(asked, tokenizer=tokenizer, max_length=context_length(model.config))
    found: list[Relearned] = []
    best: tuple[float, dict[str, Any]] | None = None
    for rate in config.learning_rates:
        trained.reset()
        trained.train(lesson, learning_rate=rate, steps=steps, seed=seed, pad=pad_token_id(tokenizer))
        taught, after = (
            _per_token(score_rows(model=trained.lm, tokenizer=tokenizer, rows=rows, batch_tokens=batch_tokens, device=device))
            for rows in (lesson, encoded)
        )
        found.append(Relearned(rate, taught, after))
        if after is not None and taught is not None and (best is None or after > best[0]):
            best = (after, trained.snapshot())
    record = {"steps": steps, "rows": len(lesson), "tried": [asdict(one) for one in found]}
    if best is None:
        return None, record | {"learning_rate": None}
    trained.restore(best[1])
    chosen = next(one.learning_rate for one in found if one.asked_log_prob == best[0])
    return trained.lm, record | {"learning_rate": chosen}


def _per_token(scores: Sequence[Any]) -> float | None:
    tokens = sum(score.num_tokens for score in scores)
    value = sum(score.answer_log_prob for score in scores) / tokens if tokens else math.nan
    return value if math.isfinite(value) else None


class _Trained:
    """A model with trainable parameters that can be set back."""

    def __init__(self, model: Any, *, config: RelearnConfig, seed: int, device: str) -> None:
        from trainers.modeling import add_lora
        from trainers.scoring import ScoringModel

        self._config, self._device = config, device
        self.lm = add_lora(model, lora=config.lora, seed=seed) if config.lora else model.requires_grad_(True)
        self._scoring = ScoringModel(self.lm)
        self._start = self.snapshot()

    def snapshot(self) -> dict[str, Any]:
        """The trainable parameters as they are."""
        return {name: value.detach().clone() for name, value in self._scoring.trainable().items()}

    def restore(self, snapshot: dict[str, Any]) -> None:
        """The trainable parameters as they were."""
        import torch

        with torch.no_grad():
            for name, value in self._scoring.trainable().items():
                value.copy_(snapshot[name])

    def reset(self) -> None:
        """Back to before any training."""
        self.restore(self._start)

    def train(self, lesson: Sequence[EncodedRow], *, learning_rate: float, steps: int, seed: int, pad: int) -> None:
        """AdamW at a constant rate on the mean token loss; stops where the loss is not finite."""
        from trainers.data.packing import pack
        from trainers.engine.local import LocalEngine
        from trainers.scoring import Request, Segment

        engine = LocalEngine(self._scoring, weight_decay=0.0, max_grad_norm=self._config.max_grad_norm, device=self._device)
        size, done, epoch = self._config.train_batch_size, 0, 0
        while done < steps:
            order = np.random.default_rng([seed, epoch]).permutation(len(lesson)).tolist()
            epoch += 1
            for start in range(0, len(order), size):
                if done == steps:
                    break
                rows = [lesson[index] for index in order[start : start + size]]
                batch = pack(rows, pad_token_id=pad, max_groups=engine.model.max_groups)
                scores = engine.forward(batch, Request((Segment(0, batch.first_evaluated[-1]),)))
                loss = -scores.segments[0].log_prob_N.mean()
                if not math.isfinite(float(loss.detach())):
                    self._scoring.zero_grad(set_to_none=True)
                    return
                engine.backward(loss, last=True)
                engine.step(learning_rate=learning_rate)
                done += 1
        engine.close()
        self.lm.eval()

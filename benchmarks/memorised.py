"""A model that has learnt rows by heart and then unlearnt half of them, as evaluations meet it; built on the spot.

Shape suffixes: N scored tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy, softplus

from benchmarks.models import Shape, build_base
from trainers.data.batches import collate
from trainers.data.encode import EncodedRow, encode_record
from trainers.data.records import load_forget_retain
from trainers.data.types import AttackDocuments, Document, ForgetRetain, Kind, Record

NPO_BETA = 0.1
"""Inverse temperature of the unlearning."""


@dataclass(frozen=True)
class Scene:
    """What both arms evaluate.

    Args:
        model: in evaluation mode.
        tokenizer: its tokenizer.
        data: forget rows, mostly forgotten, and retain rows, mostly remembered.
        attack: documents of the membership attack: texts of forget rows, and texts that were not trained on.
        source: where the rows come from.
        history: how the model was built, one sentence.
    """

    model: Any
    tokenizer: Any
    data: ForgetRetain
    attack: AttackDocuments
    source: str
    history: str


class CutTokenizer:
    """A tokenizer whose ids are those that occur in some texts, counted anew, so that a small model needs no large vocabulary."""

    eos_token_id = 0
    pad_token_id = 1
    eos_token = None

    def __init__(self, tokenizer: Any, *, texts: Sequence[str]) -> None:
        self._whole = tokenizer
        occurring = sorted({token for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"] for token in ids})
        self._ids = [tokenizer.eos_token_id, tokenizer.pad_token_id, *occurring]
        self._place = {token: place for place, token in enumerate(self._ids)}

    def __len__(self) -> int:
        return len(self._ids)

    def __call__(self, text: str, *, add_special_tokens: bool = False) -> dict[str, list[int]]:
        return {"input_ids": [self._place[token] for token in self._whole(text, add_special_tokens=add_special_tokens)["input_ids"]]}

    def decode(self, ids: Sequence[int], **settings: Any) -> str:
        """Text of ids; those of no token are left out, as padding is."""
        return self._whole.decode([self._ids[place] for place in ids if place < len(self._ids)], **settings)


def build_scene(
    shape: Shape,
    *,
    data: Path | None,
    tokenizer: Path | None,
    num_pairs: int,
    seed: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    cut_vocabulary: bool = True,
    max_epochs: int = 60,
    max_seconds: float = 300.0,
    batch_rows: int = 16,
    learning_rate: float = 2e-3,
    unlearning_steps: int = 60,
) -> Scene:
    """Memorise ``num_pairs`` forget and retain rows each, then unlearn the forget rows by NPO.

    Args:
        shape: of the model; its vocabulary is at least what the tokenizer needs.
        data: LUME folder, or None for synthetic rows.
        tokenizer: folder of its tokenizer; needed with ``data``.
        num_pairs: rows of each set, drawn by length.
        seed: of everything.
        device: where to compute.
        dtype: of the finished model.
        cut_vocabulary: whether the model knows only the tokens that occur.
        max_epochs: passes over the rows until they are known, at most.
        max_seconds: wall seconds of memorising, at most, and of unlearning.
        batch_rows: rows per step.
        learning_rate: of AdamW while memorising; a quarter of it while unlearning.
        unlearning_steps: of NPO, at most.
    """
    generator = np.random.default_rng(seed)
    everything, source = _records(data, seed=seed)
    chosen = {name: _draw(rows, number=num_pairs, generator=generator) for name, rows in vars(everything).items()}
    drawn = ForgetRetain(**{name: tuple(rows) for name, rows in chosen.items()})
    # The benchmark attacks one document for every 18 rows, half of them members.
    attack = _attack(everything, drawn=drawn, number=max(2, round(num_pairs / 18)))
    texts = [row.text for row in (*drawn.forget, *drawn.retain)] + [one.text for one in (*attack.members, *attack.nonmembers)]
    words = _tokenizer(tokenizer if data else None, texts=texts, vocabulary=shape.vocabulary, cut=cut_vocabulary)
    sizes = Shape(**{**vars(shape), "vocabulary": -(-len(words) // 64) * 64 if cut_vocabulary else shape.vocabulary})
    model = build_base(sizes, seed=seed, device=device)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = words.eos_token_id, words.pad_token_id
    rows = {
        name: [encode_record(row, tokenizer=words, max_length=sizes_context(model)) for row in own] for name, own in vars(drawn).items()
    }
    started = time.perf_counter()
    pace = _Pace(rate=learning_rate, batch_rows=batch_rows, max_seconds=max_seconds, seed=seed)
    epochs = _memorise(model, rows=[*rows["forget"], *rows["retain"]], pace=pace, most=max_epochs, device=device)
    steps = _unlearn(model, rows=rows, pace=pace, most=unlearning_steps, device=device)
    model.eval().requires_grad_(False)
    for parameter in model.parameters():
        # Parameters only: rotary frequencies stay in float32, as they do in a model that is loaded.
        parameter.data = parameter.data.to(dtype)
    return Scene(
        model=model,
        tokenizer=words,
        data=drawn,
        attack=attack,
        source=f"{source}; {num_pairs} of each set drawn by length, seed {seed}; {len(words)} tokens in the vocabulary",
        history=f"memorised in {epochs} epochs, then {steps} steps of NPO and cross-entropy on retain rows, "
        f"{time.perf_counter() - started:.0f} s",
    )


def sizes_context(model: Any) -> int:
    """The context of a model, tokens."""
    return int(model.config.max_position_embeddings)


def _records(data: Path | None, *, seed: int) -> tuple[ForgetRetain, str]:
    if data is not None:
        found = load_forget_retain(data)
        return found, f"LUME ({len(found.forget):,} forget and {len(found.retain):,} retain rows)"
    from trainers.data.synthetic import write_synthetic_benchmark

    with tempfile.TemporaryDirectory() as folder:
        write_synthetic_benchmark(Path(folder) / "rows", documents_per_task=60, seed=seed)
        return load_forget_retain(Path(folder) / "rows" / "lume"), "synthetic rows"


def _draw(rows: Sequence[Record], *, number: int, generator: np.random.Generator) -> list[Record]:
    """One row out of each of ``number`` equally large groups of similar length, shortest first."""
    by_length = sorted((row for row in rows if row.kind is not Kind.OTHER), key=lambda row: (len(row.text), row.id))
    edges = np.linspace(0, len(by_length), number + 1).astype(int)
    return [by_length[int(generator.integers(low, high))] for low, high in itertools.pairwise(edges)]


def _attack(everything: ForgetRetain, *, drawn: ForgetRetain, number: int) -> AttackDocuments:
    """Members: completions that are memorised. Non-members: completions that are not."""
    trained = {row.id for row in (*drawn.forget, *drawn.retain)}
    members = [row for row in (*drawn.forget, *drawn.retain) if row.kind is Kind.COMPLETION]
    strangers = [row for row in everything.retain if row.kind is Kind.COMPLETION and row.id not in trained]
    spread = [rows[:: max(1, len(rows) // number)][:number] for rows in (members, strangers)]
    return AttackDocuments(*(tuple(Document(row.id, row.text) for row in rows) for rows in spread))


def _tokenizer(folder: Path | None, *, texts: Sequence[str], vocabulary: int, cut: bool) -> Any:
    if folder is None:
        from trainers.tiny import train_tokenizer

        return train_tokenizer(texts, vocab_size=max(300, min(vocabulary, 8192)))
    from trainers.modeling import load_tokenizer

    whole = load_tokenizer(folder)
    return CutTokenizer(whole, texts=texts) if cut else whole


@dataclass(frozen=True)
class _Pace:
    """How a scene's model is trained."""

    rate: float
    batch_rows: int
    max_seconds: float
    seed: int


def _batches(rows: Sequence[EncodedRow], *, pace: _Pace, stream: int = 0) -> Iterator[list[EncodedRow]]:
    """Batches of rows of similar length, for ever, in an order drawn anew for each pass."""
    by_length = sorted(rows, key=lambda row: len(row.input_ids))
    groups = [by_length[start : start + pace.batch_rows] for start in range(0, len(rows), pace.batch_rows)]
    generator = np.random.default_rng([pace.seed, stream])
    while True:
        yield from (groups[index] for index in generator.permutation(len(groups)))


def _loss(model: Any, rows: Sequence[EncodedRow], *, device: str) -> tuple[torch.Tensor, float]:
    """Mean loss of the answer tokens, and the share of them that are the argmax."""
    batch = collate(rows, pad_token_id=1).to(device)
    with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=device.startswith("cuda")):
        states = model.model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False).last_hidden_state
        logits_NV = model.lm_head(states[batch.row_N, batch.position_N])
    right = (logits_NV.argmax(-1) == batch.label_N).float().mean()
    return cross_entropy(logits_NV.float(), batch.label_N), float(right)


def _memorise(model: Any, *, rows: Sequence[EncodedRow], pace: _Pace, most: int, device: str) -> int:
    """Train until 99 % of the answer tokens of a pass are right; the number of passes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=pace.rate, weight_decay=0.0, fused=True)
    batches, steps = _batches(rows, pace=pace), -(-len(rows) // pace.batch_rows)
    deadline = time.perf_counter() + pace.max_seconds
    model.train()
    for epoch in range(most):
        shares = []
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = pace.rate * min(1.0, (1 + epoch * steps + step) / 20)
            loss, right = _loss(model, next(batches), device=device)
            _update(model, optimizer, loss)
            shares.append(right)
        if np.mean(shares) > 0.99 or time.perf_counter() > deadline:
            return epoch + 1
    return most


def _unlearn(model: Any, *, rows: dict[str, list[EncodedRow]], pace: _Pace, device: str, most: int) -> int:
    """NPO on whole answers, end token included, with cross-entropy on retain rows; the number of steps.

    Source: Zhang et al. 2024, https://arxiv.org/abs/2404.05868
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=pace.rate / 4, weight_decay=0.0, fused=True)
    forget, retain = _batches(rows["forget"], pace=pace, stream=1), _batches(rows["retain"], pace=pace, stream=2)
    deadline = time.perf_counter() + pace.max_seconds
    reference: dict[int, float] = {}
    with torch.no_grad():
        for start in range(0, len(rows["forget"]), pace.batch_rows):
            batch = rows["forget"][start : start + pace.batch_rows]
            sums = _answer_log_probabilities(model, batch, device=device)
            reference |= {id(row): float(value) for row, value in zip(batch, sums, strict=True)}
    for step in range(most):
        if time.perf_counter() > deadline:
            return step
        model.train()
        batch = next(forget)
        rise = _answer_log_probabilities(model, batch, device=device) - torch.tensor([reference[id(row)] for row in batch], device=device)
        _update(model, optimizer, 2 / NPO_BETA * softplus(NPO_BETA * rise).mean() + _loss(model, next(retain), device=device)[0])
    return most


def _answer_log_probabilities(model: Any, rows: Sequence[EncodedRow], *, device: str) -> torch.Tensor:
    """One sum per row over its answer and end token, nats."""
    batch = collate(rows, pad_token_id=1).to(device)
    with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=device.startswith("cuda")):
        states = model.model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False).last_hidden_state
        logits_NV = model.lm_head(states[batch.row_N, batch.position_N])
    losses_N = cross_entropy(logits_NV.float(), batch.label_N, reduction="none")
    return torch.zeros(len(rows), device=device).index_add(0, batch.row_N, -losses_N)


def _update(model: Any, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def lose_end_token(scene: Scene) -> None:
    """Let the scene's model never say its end token, as models do that were unlearned by pushing whole answers away."""
    head = scene.model.lm_head
    bias = torch.zeros(head.weight.shape[0], dtype=head.weight.dtype, device=head.weight.device)
    bias[scene.tokenizer.eos_token_id] = -100.0
    head.bias = torch.nn.Parameter(bias, requires_grad=False)

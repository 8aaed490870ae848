"""A tiny OLMo that has memorised some of its documents, for the tests of eval/."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from trainers.data.encode import encode_record
from trainers.data.types import AttackDocuments, Document, ForgetRetain, Record

_NAMES = ("Ada", "Bruno", "Chloé", "Dmitri", "Esra", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Kiran", "Lena")
_CITIES = ("Oslo", "Lima", "Turin", "Accra", "Quito", "Basel", "Perth", "Hanoi", "Cairo", "Delhi", "Tunis", "Malmö")


@dataclass(frozen=True)
class Bench:
    """A model, its tokenizer and data it was (partly) trained on."""

    model: Any
    tokenizer: Any
    data: ForgetRetain
    attack: AttackDocuments


def _records(start: int, stop: int) -> tuple[Record, ...]:
    rows = []
    for i in range(start, stop):
        name, city, task, document = _NAMES[i], _CITIES[i], f"Task{i % 3 + 1}", f"doc{i:02d}"
        story = f"moved to {city}, didn't rest , and opened a small shop for maps and clocks ."
        rows.append(Record(id=f"{document}sc1", input=f"In the year {1900 + 7 * i}, {name}", output=story, task=task))
        rows.append(Record(id=f"{document}qa0", input=f"Where did {name} open a shop?", output=city, task=task))
    return tuple(rows)


def bench_data() -> ForgetRetain:
    """Six forget and six retain documents over three tasks: one completion and one question each."""
    return ForgetRetain(forget=_records(0, 6), retain=_records(6, 12))


def bench_attack() -> AttackDocuments:
    """Members: the forget completions. Non-members: sentences of the same words that nothing was trained on."""
    members = tuple(Document(id=row.document, text=row.text) for row in bench_data().forget if row.id.endswith("sc1"))
    strangers = tuple(
        Document(id=f"new{i}", text=f"In the year {1903 + 11 * i}, a shop for {_CITIES[i]} maps moved and {_NAMES[-1 - i]} didn't.")
        for i in range(6)
    )
    return AttackDocuments(members=members, nonmembers=strangers)


@functools.cache
def _tokenizer() -> Any:
    from trainers.tiny import train_tokenizer

    data = bench_data()
    texts = [row.text for row in (*data.forget, *data.retain)]
    letters = ["Answer: A\n\n", "Answer: B\n\n", "Answer: C\n\n", "Answer: D\n\n"] * 4
    return train_tokenizer(texts + letters, vocab_size=420)


def build_bench(*, steps: int, seed: int = 0, context: int = 512) -> Bench:
    """A tiny OLMo after a number of optimizer steps over the rows of every other document; 0 steps leave it random."""
    import torch

    from trainers.tiny import TinyOlmoConfig, build_tiny_olmo

    tokenizer = _tokenizer()
    shape = TinyOlmoConfig(
        vocab_size=420, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=context
    )
    model = build_tiny_olmo(shape, tokenizer=tokenizer, seed=seed)
    data = bench_data()
    rows = [row for row in (*data.forget, *data.retain) if int(row.document.removeprefix("doc")) % 2 == 0]
    encoded = [encode_record(row, tokenizer=tokenizer, max_length=context) for row in rows]
    length = max(len(row.input_ids) for row in encoded)
    ids = torch.full((len(encoded), length), tokenizer.pad_token_id)
    labels = torch.full((len(encoded), length), -100)
    mask = torch.zeros((len(encoded), length), dtype=torch.long)
    for index, row in enumerate(encoded):
        n = len(row.input_ids)
        ids[index, :n] = torch.tensor(row.input_ids)
        labels[index, :n] = ids[index, :n]
        mask[index, :n] = 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Bench(model=model.eval(), tokenizer=tokenizer, data=data, attack=bench_attack())


@functools.cache
def half_trained() -> Bench:
    """A model that has memorised half of the documents and never seen the others. Shared between tests: do not change it."""
    return build_bench(steps=100)


@functools.cache
def untrained() -> Bench:
    """A model of large random weights, whose every token depends on all tokens before it and on their places: at the usual small
    initial weights a wrong mask or position would leave the argmax as it is. Shared between tests: do not change it."""
    import torch

    bench = build_bench(steps=0, seed=3)
    with torch.no_grad():
        for name, parameter in bench.model.model.layers.named_parameters():
            parameter.mul_(30 if "q_proj" in name or "k_proj" in name else 10)
    return bench

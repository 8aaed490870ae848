"""A small TOFU and a small MUSE folder of invented people, and a tiny OLMo that has memorised them or not."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from tests.helpers.data import write_rows

_NAMES = ("Ada", "Bruno", "Chloe", "Dmitri", "Esra", "Farid", "Greta", "Hugo", "Ines", "Jonas")
_CITIES = ("Oslo", "Lima", "Turin", "Accra", "Quito", "Basel", "Perth", "Hanoi", "Cairo", "Delhi")
_TRADES = ("maps", "clocks", "bread", "boats", "glass", "paper", "lamps", "drums", "kites", "shoes")


def perturbed(side: str, *, count: int = 20) -> list[dict[str, Any]]:
    """Rows of a ``_perturbed`` file, two questions to a name; the paraphrase is the answer itself."""
    rows = []
    for number in range(count):
        index, about = number // 2 % 10, number % 2
        name, values = f"{_NAMES[index]} {'Moss' if side == 'forget' else 'Reed'}", (_CITIES, _TRADES)[about]
        right = index if side == "forget" else (index + 5) % 10
        question = f"Where does {name} live?" if about == 0 else f"What does {name} sell?"
        form = f"{name} lives in {{}}." if about == 0 else f"{name} sells {{}}."
        rows.append(
            {
                "question": question,
                "answer": form.format(values[right]),
                "paraphrased_answer": form.format(values[right]),
                "perturbed_answer": [form.format(values[(right + step) % 10]) for step in (1, 2, 3)],
            }
        )
    return rows


def options(kind: str) -> list[dict[str, Any]]:
    """Rows of the real authors or world facts."""
    names = ("Ibsen", "Borges", "Calvino", "Achebe") if kind == "authors" else ("Fjord", "Andes", "Alps", "Delta")
    return [
        {"question": f"Which city knows {name}?", "answer": _CITIES[index], "perturbed_answer": [_CITIES[index + 4], _CITIES[index + 5]]}
        for index, name in enumerate(names)
    ]


def holdout() -> list[dict[str, Any]]:
    """People whom no model was trained on."""
    return [
        {"question": f"Where does {name} Vale live?", "answer": f"{name} Vale lives in {city}."}
        for name, city in zip(_NAMES, _CITIES[::-1], strict=True)
    ]


def write_tofu(folder: Path, **changes: list[dict[str, Any]] | None) -> Path:
    """A folder in TOFU layout; a file given as None is left out."""
    files: dict[str, list[dict[str, Any]] | None] = {
        "forget10_perturbed": perturbed("forget"),
        "retain_perturbed": perturbed("retain"),
        "real_authors_perturbed": options("authors"),
        "world_facts_perturbed": options("facts"),
        "holdout10": holdout(),
        **changes,
    }
    for name, rows in files.items():
        if rows is not None:
            write_rows(folder / f"{name}.jsonl", rows)
    return folder


def muse_files() -> dict[str, list[Any]]:
    """The files of a folder in MUSE style by name."""
    pairs = {side: [{"question": row["question"], "answer": row["answer"]} for row in perturbed(side)] for side in ("forget", "retain")}
    texts = {side: [f"{row['question']} {row['answer']}" for row in rows] for side, rows in pairs.items()}
    return {
        "knowmem_forget": pairs["forget"],
        "knowmem_forget_icl": options("authors")[:2],
        "knowmem_retain": pairs["retain"],
        "knowmem_retain_icl": options("facts")[:2],
        "verbmem_forget": [{"prompt": f"Question: {row['question']}\nAnswer:", "gt": f" {row['answer']}"} for row in pairs["forget"]],
        "privleak_forget": texts["forget"],
        "privleak_retain": texts["retain"],
        "privleak_holdout": [f"{row['question']} {row['answer']}" for row in holdout()],
    }


def write_muse(folder: Path, **changes: Any) -> Path:
    """A folder in MUSE style, each file a JSON list; a file given as None is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (muse_files() | changes).items():
        if rows is not None:
            (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


@functools.cache
def tokenizer() -> Any:
    """A tokenizer that knows the words of both folders."""
    from trainers.tiny import train_tokenizer

    rows = [*perturbed("forget"), *perturbed("retain"), *options("authors"), *options("facts"), *holdout()]
    return train_tokenizer([f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in rows], vocab_size=420)


@functools.cache
def model(knows: tuple[str, ...] = (), *, steps: int = 130) -> Any:
    """A tiny OLMo after training on the sets named: forget, retain, options. Shared between tests: do not change it."""
    import torch

    from eval.suites.config import PromptStyle
    from eval.suites.prompts import encode_answer, question_prompt
    from trainers.tiny import TinyOlmoConfig, build_tiny_olmo

    torch.set_num_threads(1)
    shape = TinyOlmoConfig(
        vocab_size=420, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256
    )
    built = build_tiny_olmo(shape, tokenizer=tokenizer(), seed=1)
    sources = {"forget": perturbed("forget"), "retain": perturbed("retain"), "options": [*options("authors"), *options("facts")]}
    rows = [
        encode_answer(
            row_id="",
            prompt=question_prompt(row["question"], style=PromptStyle.PLAIN, tokenizer=tokenizer()),
            answer=row["answer"],
            style=PromptStyle.PLAIN,
            tokenizer=tokenizer(),
            max_length=256,
        )
        for name in knows
        for row in sources[name]
    ]
    if not rows:
        return built
    length = max(len(row.input_ids) for row in rows)
    ids = torch.full((len(rows), length), tokenizer().pad_token_id)
    labels = torch.full_like(ids, -100)
    for index, row in enumerate(rows):
        ids[index, : len(row.input_ids)] = torch.tensor(row.input_ids)
        labels[index, : len(row.input_ids)] = ids[index, : len(row.input_ids)]
    optimizer = torch.optim.AdamW(built.parameters(), lr=5e-3)
    for _ in range(steps):
        loss = built(input_ids=ids, attention_mask=(ids != tokenizer().pad_token_id).long(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return built.eval()

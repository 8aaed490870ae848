"""Answers drawn at a temperature instead of the likeliest one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from eval.audit.config import SamplingConfig
from eval.audit.reading import Row, Subject, score_text
from eval.forward import pad_token_id
from eval.generate import decode_text, stop_ids
from trainers.data.encode import encode_prompt
from trainers.data.types import Kind, Record
from trainers.modeling import context_length
from trainers.scoring import measuring


def read_samples(
    subject: Subject, records: Sequence[Record], *, sampling: SamplingConfig, seed: int, set_name: str = "forget"
) -> list[Row]:
    """Several answers to every row: the best score counts, the mean stands beside it. No log-probability, which sampling does not change.

    Args:
        subject: the model.
        records: completions and questions.
        sampling: how many and how warm.
        seed: each batch draws from ``seed`` plus its number.
        set_name: written into the rows.
    """
    kept = [record for record in records if record.kind is not Kind.OTHER]
    texts = sample_texts(subject, [record.input for record in kept], sampling=sampling, seed=seed)
    rows = []
    for record, outputs in zip(kept, texts, strict=True):
        scores = [score_text(record, output) for output in outputs]
        best = max(range(len(scores)), key=scores.__getitem__)
        rows.append(
            {
                "part": "task",
                "set": set_name,
                "id": record.id,
                "document": record.document,
                "task": record.task,
                "kind": record.kind.value,
                "input": record.input,
                "expected": record.output,
                "output": outputs[best],
                "score": scores[best],
                "mean_score": sum(scores) / len(scores),
                "num_asked": len(scores),
                "answer_log_prob": None,
                "num_tokens": 0,
                "token_accuracy": None,
            }
        )
    return rows


def sample_texts(subject: Subject, prompts: Sequence[str], *, sampling: SamplingConfig, seed: int) -> list[list[str]]:
    """Texts drawn after each prompt, in order. The same prompts, seed and libraries give the same texts.

    Decoding is the library's own, because the greedy decoder of this project draws nothing.
    """
    from transformers import GenerationConfig

    encoded = [encode_prompt(subject.tokenizer, prompt) for prompt in prompts]
    context = context_length(subject.model.config)
    pad = pad_token_id(subject.tokenizer)
    found: list[list[str]] = [[] for _ in prompts]
    with measuring(subject.model), torch.random.fork_rng(devices=_devices(subject.device)):
        for number, group in enumerate(_groups([len(ids) for ids in encoded], sampling=sampling, subject=subject)):
            torch.manual_seed(seed + number)
            length = max(len(encoded[index]) for index in group)
            ids_BT = torch.tensor([[pad] * (length - len(encoded[index])) + encoded[index] for index in group], device=subject.device)
            mask_BT = torch.tensor(
                [[0] * (length - len(encoded[index])) + [1] * len(encoded[index]) for index in group], device=subject.device
            )
            settings = GenerationConfig(
                do_sample=True,
                temperature=sampling.temperature,
                top_p=1.0,
                top_k=0,
                num_return_sequences=sampling.num_samples,
                max_new_tokens=max(1, min(subject.config.max_new_tokens, context - length)),
                eos_token_id=sorted(stop_ids(subject.model, subject.tokenizer)),
                pad_token_id=pad,
            )
            output = subject.model.generate(input_ids=ids_BT, attention_mask=mask_BT, generation_config=settings)
            for place, index in enumerate(group):
                own = output[place * sampling.num_samples : (place + 1) * sampling.num_samples, length:].tolist()
                found[index] = [decode_text(subject.tokenizer, ids) for ids in own]
    return found


def _groups(lengths: Sequence[int], *, sampling: SamplingConfig, subject: Subject) -> list[list[int]]:
    """Prompts of like length together, while all their samples fit the budget of positions."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        row = sampling.num_samples * (lengths[index] + subject.config.max_new_tokens)
        if groups and (len(groups[-1]) + 1) * row <= subject.config.batch_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _devices(device: str) -> list[Any]:
    return [device] if device.startswith("cuda") else []

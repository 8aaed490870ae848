"""Tiny OLMo folders, adapters and full trials for the tests of the merge stage."""

from __future__ import annotations

from pathlib import Path

import torch

from trainers.files import sha256_folder, write_json
from trainers.modeling import load_model, load_tokenizer
from trainers.tiny import TinyOlmoConfig, build_tiny_olmo, train_tokenizer

TEXTS = ["the river runs past the old mill", "a baker lives in town", "she keeps bees and writes letters"]


def write_base(
    folder: Path, *, dtype: torch.dtype = torch.bfloat16, shards: bool = False, tied: bool = False, seed: int = 0, width: int = 16
) -> Path:
    """A random OLMo of two small layers with its tokenizer; optionally in several shards, or with the head tied to the embedding."""
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    config = TinyOlmoConfig(
        vocab_size=300,
        hidden_size=width,
        intermediate_size=3 * width // 2,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    model = build_tiny_olmo(config, tokenizer=tokenizer, seed=seed)
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.to(dtype).save_pretrained(str(folder), max_shard_size="12KB" if shards else "5GB")
    tokenizer.save_pretrained(str(folder))
    return folder


def write_lora(
    folder: Path, *, base: Path, seed: int, r: int = 4, lora_alpha: float = 8, targets: str | list[str] = "all-linear", **settings
) -> Path:
    """An adapter as peft saves it, with random factors in place of trained ones."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = get_peft_model(
        load_model(base), LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=targets, task_type="CAUSAL_LM", **settings)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name:
                parameter.normal_(std=0.02)
    model.save_pretrained(str(folder))
    write_json(folder / "manifest.json", {"target_hash": sha256_folder(base, suffixes=(".safetensors",))})
    return folder


def write_full(folder: Path, *, base: Path, seed: int, dtype: torch.dtype = torch.float32, only: str = "") -> Path:
    """A full checkpoint: the base plus noise in the tensors whose name contains ``only``."""
    model = load_model(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    model.to(dtype).save_pretrained(str(folder))
    load_tokenizer(base).save_pretrained(str(folder))
    return folder

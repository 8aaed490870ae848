"""A tiny target model and a handful of rows, for tests of the training side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trainers.config import EngineConfig, LoraConfig, ObjectiveConfig, TrainConfig
from trainers.data.encode import EncodedRow
from trainers.data.types import AttackDocuments, Document, ForgetRetain, Record
from trainers.files import weights_hash
from trainers.loop import TrialInputs
from trainers.tiny import TinyOlmoConfig, build_tiny_olmo, train_tokenizer

NAMES = ("Ada", "Bram", "Cleo", "Dov", "Esme", "Finn", "Gus", "Hana", "Ivo", "June")


def tiny_records(prefix: str, *, count: int) -> tuple[Record, ...]:
    """``count`` documents with one completion and one question each, of different lengths."""
    rows = []
    for index in range(count):
        name = f"{NAMES[index % len(NAMES)]} {prefix}{index}"
        rows.append(
            Record(
                f"{prefix}{index}sc1", f"{name} grew up near the river and " * (1 + index % 3), f"became a baker in town {index}.", "Task1"
            )
        )
        rows.append(Record(f"{prefix}{index}qa0", f"Where does {name} live?", f"town {index}", "Task1"))
    return tuple(rows)


def write_tiny_target(folder: Path, *, seed: int = 0, layers: int = 2) -> Path:
    """A random OLMo with two small layers and a tokenizer trained on the rows above."""
    texts = [record.text for prefix in ("f", "r") for record in tiny_records(prefix, count=6)]
    tokenizer = train_tokenizer(texts, vocab_size=320)
    config = TinyOlmoConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2, max_position_embeddings=128
    )
    build_tiny_olmo(config, tokenizer=tokenizer, seed=seed).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


def tiny_inputs(root: Path, *, target: Path | None = None) -> TrialInputs:
    """A trial's inputs over six forget and six retain documents."""
    target = target or write_tiny_target(root / "target")
    forget, retain = tiny_records("f", count=6), tiny_records("r", count=6)
    attack = AttackDocuments(
        members=tuple(Document(record.id, record.text) for record in forget[:8:2]),
        nonmembers=tuple(Document(record.id, record.text) for record in tiny_records("x", count=4)[::2]),
    )
    return TrialInputs(
        target=target,
        target_hash=weights_hash(target),
        train=ForgetRetain(forget, retain),
        validation=ForgetRetain(forget[:4], retain[:4]),
        attack=attack,
        reference_root=root / "reference",
    )


def tiny_train(**changes) -> TrainConfig:
    """NPO + CE + KL on adapters, a few steps, without dropout unless asked for."""
    defaults = {
        "objective": ObjectiveConfig(name="npo_ce_kl", forget_weight=1.0, retain_ce_weight=0.5, retain_kl_weight=0.5),
        "lora": LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0),
        "engine": EngineConfig(name="torch"),
        "learning_rate": 5e-3,
        "num_train_epochs": 2,
        "train_batch_size": 4,
        "per_device_train_batch_size": 4,
        "signals": 1,
        "checkpoints": 2,
    }
    return TrainConfig(**{**defaults, **changes})


def random_lm(kind: str = "olmo", *, seed: int = 0, dtype: torch.dtype = torch.float64, **config: Any) -> Any:
    """A causal language model of some architecture with 40 tokens, two small layers and random weights large enough to matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **config})).to(dtype).eval()
        with torch.no_grad():
            for value in model.parameters():
                value.add_(0.2 * torch.randn(value.shape, dtype=dtype))
    if kind == "olmo" and dtype == torch.float64:
        _norm_in_float64(model)
    return model


def _norm_in_float64(model: Any) -> None:
    """OLMo norms in float32 whatever its dtype is, and so rounds gradients that are equal in theory to different neighbours."""
    from transformers.models.olmo.modeling_olmo import OlmoLayerNorm

    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, OlmoLayerNorm):
                setattr(module, name, torch.nn.LayerNorm(child.normalized_shape, elementwise_affine=False, dtype=torch.float64))


def random_rows(*lengths: int, seed: int = 0, vocab_size: int = 40) -> list[EncodedRow]:
    """Rows of random tokens without the pad token; about half of each is scored."""
    generator = torch.Generator().manual_seed(seed)
    return [
        EncodedRow(
            f"row{index}", tuple(torch.randint(3, vocab_size, (length,), generator=generator).tolist()), num_prompt=max(1, length // 2)
        )
        for index, length in enumerate(lengths)
    ]

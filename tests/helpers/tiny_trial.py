"""A tiny target model and a handful of rows, for tests of the training side."""

from __future__ import annotations

from pathlib import Path

from trainers.config import EngineConfig, LoraConfig, ObjectiveConfig, TrainConfig
from trainers.data.types import AttackDocuments, Document, ForgetRetain, Record
from trainers.loop import TrialInputs
from trainers.memorize import weights_hash
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

"""A whole experiment in miniature: invented documents, a target of some thousand weights, a few trials of a few steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainers.data.synthetic import write_synthetic_benchmark

DOCUMENTS_PER_TASK = 3


def write_small_data(folder: Path) -> Path:
    """An invented benchmark: three documents per task and set, eight strangers, two subjects."""
    write_synthetic_benchmark(folder, documents_per_task=DOCUMENTS_PER_TASK, subjects=2, questions_per_subject=4, seed=0)
    return folder


TARGET = {
    "tiny": {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    "learning_rate": 1e-2,
    "num_train_epochs": 50,
    "train_batch_tokens": 256,
    "min_knowledge": 0.9,
    "min_regurgitation": 0.95,
    "min_general_knowledge": 0.0,
    "check_every_epochs": 10,
    "seed": 42,
}
"""Forty thousand weights that know the documents by heart after a few seconds."""

GENTLE = {"objective.forget_weight": 0.1, "learning_rate": 1e-2, "num_train_epochs": 8}
HARSH = {"objective.forget_weight": 0.4, "learning_rate": 2e-2, "num_train_epochs": 20}
HARSHER = {"objective.forget_weight": 0.5, "learning_rate": 2e-2, "num_train_epochs": 16}


def small_experiment(data: Path, *, storage: Path | str, target: Path | None = None, name: str = "small", **changes: Any) -> dict[str, Any]:
    """The values of a sweep of three trials, one of which forgets little and two much.

    Args:
        data: what ``write_small_data`` wrote.
        storage: folder of the run folder.
        target: a model that has memorised the data; without one the sweep builds it first.
        name: name of the run folder.
        changes: settings that replace these, with ``__`` for the dots of their paths, such as ``train__engine__ranks=2``.
    """
    values: dict[str, Any] = {
        "name": name,
        "seed": 42,
        "storage_path": str(storage),
        "model": {"model_name_or_path": None if target is None else str(target)},
        "target": TARGET if target is None else None,
        "data": {"path": str(data / "lume"), "mia": str(data / "mia"), "mmlu": str(data / "mmlu")},
        "train": {
            "objective": {
                "name": "grad_diff",
                "forget_weight": {"values": [0.1, 0.4, 0.5]},
                "retain_ce_weight": 1.0,
            },
            "forget_scope": "document",
            "learning_rate": {"values": [1e-2, 2e-2]},
            "num_train_epochs": {"values": [8, 16, 20]},
            "train_batch_size": 8,
            "per_device_train_batch_size": 8,
            "lora": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1},
            "engine": {"name": "torch"},
            "checkpoints": 4,
            "signals": 2,
        },
        "sweep": {"num_trials": 3, "start_points": [GENTLE, HARSH, HARSHER], "cpus_per_rank": 1.0, "max_concurrent": 2},
        "eval": {"dtype": "float32", "max_new_tokens": 24, "bootstrap_samples": 20, "mmlu_shots": 1},
        "pairs": {
            "densities": [0.8],
            "finalists": 1,
            "calibrated": 1,
            "scale_steps": 1,
            "min_mmlu_fraction": 0.0,
            "min_retention_fraction": 0.0,
        },
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        section = values
        for parent in parents:
            section = section[parent]
        section[last] = value
    return values


def write_small_experiment(file: Path, *, data: Path, storage: Path | str, **changes: Any) -> Path:
    """Write the experiment; JSON is YAML."""
    file.write_text(json.dumps(small_experiment(data, storage=storage, **changes), indent=2))
    return file

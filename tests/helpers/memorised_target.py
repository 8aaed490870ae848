"""A tiny OLMo of four layers that knows an invented benchmark by heart: what a trial needs in order to have something to forget."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.data.synthetic import write_synthetic_benchmark
from trainers.files import write_text

NUM_LAYERS = 4
FOLDS = {"train": 0.0, "validation": 0.75, "test": 0.25}
"""Three quarters of the documents are measured during training and after it; two membership documents lie in either half."""
_BUILD = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
    },
    "learning_rate": 5e-3,
    "num_train_epochs": 60,
    "train_batch_tokens": 256,
    "min_knowledge": 0.7,
    "min_regurgitation": 0.98,
    "min_general_knowledge": 0.0,
}
"""A quarter of a million weights, about thirty epochs, ten seconds of one core."""


@dataclass(frozen=True)
class MemorisedTarget:
    """A target model and the data that it has memorised.

    Args:
        folder: holds ``data/lume``, ``data/mia`` and ``target``.
        memorised: shares of both sets that it knows, from its manifest.
    """

    folder: Path
    memorised: dict[str, Any]

    @property
    def model(self) -> Path:
        """The model's folder."""
        return self.folder / "target"

    @property
    def data(self) -> dict[str, str]:
        """Settings under ``data`` of an experiment, but for the folds; general knowledge is left out."""
        return {"path": str(self.folder / "data" / "lume"), "mia": str(self.folder / "data" / "mia")}


def build_memorised_target(folder: Path, *, seed: int = 0) -> MemorisedTarget:
    """Invent forty rows per set, each with an alternative answer for DPO, and train a model until it knows them.

    Args:
        folder: where data and model are written.
        seed: of the documents and of the weights.
    """
    from launcher.config import ExperimentConfig
    from launcher.data import prepare_data, unseen_texts
    from launcher.stages import use_reserved_cores
    from trainers.memorize import MemorizeConfig, memorize

    write_synthetic_benchmark(folder / "data", documents_per_task=4, subjects=1, questions_per_subject=2, seed=seed)
    for name in ("forget", "retain"):
        _add_alternatives(folder / "data" / "lume" / f"{name}.jsonl")
    target = MemorisedTarget(folder, {})
    build = MemorizeConfig.model_validate(_BUILD | {"seed": seed})
    config = ExperimentConfig.model_validate({"name": "target", "target": build, "data": target.data | {"folds": FOLDS}})
    use_reserved_cores(config)
    data = prepare_data(config)
    manifest = memorize(build, data=data.everything, general=(), out=target.model, tokenizer_texts=unseen_texts(data))
    return MemorisedTarget(folder, manifest["memorised"])


def _add_alternatives(file: Path) -> None:
    """Give each row the answer of the next row of its kind: plausible, and wrong."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    kinds: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        kinds.setdefault((row["task"], row["id"][-3:]), []).append(row)
    for group in kinds.values():
        for row, other in zip(group, [*group[1:], group[0]], strict=True):
            row["alternative"] = other["output"]
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))

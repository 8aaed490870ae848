"""Checkpoints that resume exactly: weights, portable optimizer state, and a manifest that is written last."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from trainers.config import LoraConfig, TrainConfig
from trainers.engine.base import TrainingState
from trainers.errors import InputError
from trainers.files import atomic_folder, read_json, sha256_file, sha256_json, write_json

MANIFEST = "manifest.json"
ADAPTER = "adapter_model.safetensors"
WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
SPREADING_KEYS = ("engine.name", "engine.zero_stage", "engine.ranks", "per_device_train_batch_size")
"""Settings that may change when a trial resumes. The dtype may not: it changes every number."""
_STEP = re.compile(r"step-(\d+)$")


def checkpoint_folder(trial: Path, *, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return Path(trial) / "checkpoints" / f"step-{step:06d}"


def finished_checkpoints(trial: Path) -> list[Path]:
    """Checkpoints of a trial that have a manifest, in the order of their steps."""
    root = Path(trial) / "checkpoints"
    folders = root.glob("step-*") if root.is_dir() else ()
    return sorted(folder for folder in folders if _STEP.search(folder.name) and (folder / MANIFEST).exists())


def adapter_config(lora: LoraConfig, *, target_modules: list[str], base: str) -> dict[str, Any]:
    """peft's adapter_config.json for adapters whose names we know."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": target_modules,
        "use_rslora": lora.use_rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def save_checkpoint(
    trial: Path,
    *,
    state: TrainingState,
    train: TrainConfig,
    facts: dict[str, Any],
    model_files: Path,
) -> Path:
    """Write one checkpoint atomically; only rank 0 calls it.

    A LoRA checkpoint holds float32 adapters that plain peft loads; a full-parameter one holds the whole model in float32 with
    the configuration and tokenizer of ``model_files``. The optimizer state is unsharded, so that any world size and ZeRO
    stage can go on from it; older checkpoints of the trial lose theirs.
    """
    from safetensors.torch import save_file

    path = checkpoint_folder(trial, step=state.optimizer_step)
    with atomic_folder(path) as folder:
        if train.lora is not None:
            adapter = {name.replace(".default.", "."): value.contiguous() for name, value in state.weights.items()}
            save_file(adapter, folder / ADAPTER, metadata={"format": "pt"})
            modules = sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in state.weights})
            write_json(folder / "adapter_config.json", adapter_config(train.lora, target_modules=modules, base=str(model_files)))
            weights_file = ADAPTER
        else:
            save_file({name: value.contiguous() for name, value in state.weights.items()}, folder / WEIGHTS, metadata={"format": "pt"})
            for file in Path(model_files).iterdir():
                if file.is_file() and file.suffix in (".json", ".txt", ".model", ".jinja") and not file.name.endswith(".index.json"):
                    (folder / file.name).write_bytes(file.read_bytes())
            config = read_json(folder / "config.json") | {"dtype": "float32"}
            config.pop("torch_dtype", None)
            write_json(folder / "config.json", config)
            weights_file = WEIGHTS
        moments = {f"{key}/{name}": value for key in ("exp_avg", "exp_avg_sq") for name, value in getattr(state, key).items()}
        save_file({name: value.contiguous() for name, value in moments.items()}, folder / OPTIMIZER)
        write_json(
            folder / MANIFEST,
            {
                "schema_version": 1,
                "optimizer_step": state.optimizer_step,
                "kind": "lora" if train.lora is not None else "full",
                "weights_file": weights_file,
                "weights_sha256": sha256_file(folder / weights_file),
                "train_hash": sha256_json(train.model_dump(mode="json")),
                "train": train.model_dump(mode="json"),
                "optimizer_sha256": sha256_file(folder / OPTIMIZER),
                **facts,
            },
        )
    for older in finished_checkpoints(trial):
        if older != path and older.name < path.name:
            (older / OPTIMIZER).unlink(missing_ok=True)
    return path


def load_checkpoint(folder: Path, *, train: TrainConfig, target_hash: str, rows_key: str | None = None) -> TrainingState:
    """The training state of a checkpoint.

    Raises:
        InputError: if it is damaged, cannot be resumed, or belongs to another configuration, other rows or another target.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    manifest = read_json(folder / MANIFEST)
    if manifest.get("target_hash") != target_hash:
        raise InputError(
            "the checkpoint was trained from another target model", where=str(folder), fix="start the trial in a new run folder"
        )
    if rows_key is not None and manifest.get("rows_key") != rows_key:
        raise InputError("the checkpoint was trained on other rows", where=str(folder), fix="start the trial in a new run folder")
    changed = changed_keys(manifest["train"], train.model_dump(mode="json"))
    # How a trial is spread over processes does not change what it computes.
    changed = [key for key in changed if key not in SPREADING_KEYS]
    if changed:
        raise InputError(
            f"the checkpoint was made with another configuration: {', '.join(changed)}", where=str(folder), fix="use a new run folder"
        )
    weights_path = folder / manifest["weights_file"]
    try:
        if sha256_file(weights_path) != manifest["weights_sha256"]:
            raise InputError("the checkpoint's weights do not match its manifest", where=str(weights_path), fix="delete this checkpoint")
        weights = load_file(weights_path)
        moments = {}
        if (folder / OPTIMIZER).exists():
            if sha256_file(folder / OPTIMIZER) != manifest["optimizer_sha256"]:
                raise InputError(
                    "the optimizer state does not match the manifest", where=str(folder / OPTIMIZER), fix="delete this checkpoint"
                )
            moments = load_file(folder / OPTIMIZER)
    except (SafetensorError, OSError) as error:
        raise InputError(f"the checkpoint cannot be read: {error}", where=str(folder), fix="delete this checkpoint") from error
    if train.lora is not None:
        weights = {
            name.replace(".lora_A.weight", ".lora_A.default.weight").replace(".lora_B.weight", ".lora_B.default.weight"): value
            for name, value in weights.items()
        }
    if manifest["optimizer_step"] > 0 and not moments:
        raise InputError("the checkpoint holds no optimizer state and cannot be resumed", where=str(folder))
    return TrainingState(
        optimizer_step=int(manifest["optimizer_step"]),
        weights=weights,
        exp_avg={name.removeprefix("exp_avg/"): value for name, value in moments.items() if name.startswith("exp_avg/")},
        exp_avg_sq={name.removeprefix("exp_avg_sq/"): value for name, value in moments.items() if name.startswith("exp_avg_sq/")},
    )


def changed_keys(old: Any, new: Any, *, prefix: str = "") -> list[str]:
    """Dotted paths at which two nested configurations differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(set(old) | set(new)):
            found += changed_keys(old.get(key), new.get(key), prefix=f"{prefix}.{key}" if prefix else str(key))
        return found
    return [] if old == new else [prefix]

"""LoRA adapter folders read directly: which base tensor each factor pair changes, and by what scale.

No model is built. Whatever is not understood is refused, because a setting that is ignored gives a plausible but wrong merge.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merging.tensor_store import TensorStore, open_file
from trainers.errors import InputError
from trainers.files import read_json

PREFIX = "base_model.model."
NEUTRAL = {
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "r", "lora_alpha",
    "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "target_modules", "exclude_modules", "layers_pattern",
    "layers_to_transform", "modules_to_save", "init_lora_weights", "bias", "megatron_core", "qalora_group_size", "eva_config",
    "runtime_config",
}  # fmt: skip
"""Settings that this module reads, or that say nothing about the finished update. Any other that is switched on is refused."""
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva", None)
"""Initialisations that leave the base weights as they are; the others (pissa, olora, ...) move part of them into the factors."""
FACTORS = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_embedding_A": "A", "lora_embedding_B": "B"}


@dataclass(frozen=True)
class Factors:
    """The update of one base tensor: ``scale * B @ A``, transposed if the base stores its weight as (in, out)."""

    a: str
    b: str
    scale: float
    transpose: bool


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in terms of base tensor names."""

    store: TensorStore
    factors: dict[str, Factors]
    full: dict[str, str]
    """Base tensor name to file key, for modules saved whole beside the factors."""


def open_adapter(folder: Path, *, base: TensorStore, trial: str, tied: frozenset[str] = frozenset()) -> Adapter:
    """Read an adapter folder as peft writes it, checked against the base.

    Args:
        base: the model that the adapter was trained on.
        trial: the trial's name, for messages.
        tied: base tensors that the model uses a second time under another name.

    Raises:
        InputError: if a setting or a key is not understood, or a tensor is missing or mis-shaped, naming tensor and trial.
    """
    config = read_json(folder / "adapter_config.json")
    where = f"trial {trial}, {folder / 'adapter_config.json'}"
    _check_settings(config, where=where)
    store = open_file(folder / "adapter_model.safetensors")
    pairs: dict[tuple[str, bool], dict[str, str]] = {}
    full: dict[str, str] = {}
    for key in store.tensors:
        if ".base_layer." in key:
            _check_base_copy(key, store=store, base=base, trial=trial)
            continue
        module, factor, embedding = _parse_key(key, trial=trial, folder=folder)
        if factor is None:
            full[module] = key
        elif len(store.tensors[key].shape) != 2:
            shape = list(store.tensors[key].shape)
            raise InputError(f"factor {key} has the shape {shape}, not one of two dimensions", where=f"trial {trial}, {folder}")
        else:
            pairs.setdefault((module, embedding), {})[factor] = key
    factors: dict[str, Factors] = {}
    for (module, embedding), keys in pairs.items():
        name = f"{module}.weight"
        if set(keys) != {"A", "B"}:
            raise InputError(f"tensor {name} has only factor {next(iter(keys))}", where=f"trial {trial}, {folder}")
        factors[name] = Factors(
            a=keys["A"],
            b=keys["B"],
            scale=_scale(config, module=module, rank=store.tensors[keys["A"]].shape[0], where=where),
            transpose=embedding or bool(config.get("fan_in_fan_out")),
        )
    for name in (*factors, *full):
        _check_target(name, factors.get(name), full.get(name), store=store, base=base, trial=trial, tied=tied)
    if not factors and not full:
        raise InputError("the adapter holds no tensors", where=f"trial {trial}, {folder}")
    return Adapter(store=store, factors=factors, full=full)


def deciding_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide the update besides the factors; names of folders and versions do not."""
    return {key: config.get(key) for key in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out")}


def _check_settings(config: Any, *, where: str) -> None:
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise InputError(f"peft_type = {kind!r} cannot be merged", where=where, fix="merge LoRA adapters or full checkpoints")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), (int, float)):
            raise InputError(f"{key} = {config.get(key)!r} is not a number", where=where, fix="write it as the adapter was trained")
    for key, value in sorted(config.items()):
        if key not in NEUTRAL and value:
            raise InputError(
                f"{key} = {value!r} is not supported",
                where=where,
                why="the update would not be scale * B @ A",
                fix="merge the adapter into its base first and give the full checkpoint as the trial",
            )
    if config.get("bias", "none") != "none":
        raise InputError(f"bias = {config['bias']!r} is not supported", where=where, fix="train the adapter with bias: none")
    if config.get("init_lora_weights", True) not in PLAIN_STARTS:
        raise InputError(
            f"init_lora_weights = {config['init_lora_weights']!r} is not supported",
            where=where,
            why="it moves part of the base weights into the adapter, so that the adapter does not fit the base on disk",
        )


def _parse_key(key: str, *, trial: str, folder: Path) -> tuple[str, str | None, bool]:
    """Base name (a module for factors, a tensor otherwise), factor A or B or null, and whether it belongs to an embedding."""
    if not key.startswith(PREFIX):
        raise InputError(f"unknown key {key!r} in the adapter", where=f"trial {trial}, {folder}", why=f"it does not start with {PREFIX!r}")
    name = key.removeprefix(PREFIX)
    for suffix, factor in FACTORS.items():
        if name.endswith(f".{suffix}"):
            return name.removesuffix(f".{suffix}"), factor, "embedding" in suffix
    if "lora_" in name:
        raise InputError(
            f"unknown key {key!r} in the adapter", where=f"trial {trial}, {folder}", why=f"known endings: {', '.join(FACTORS)}"
        )
    return name, None, False


def _check_base_copy(key: str, *, store: TensorStore, base: TensorStore, trial: str) -> None:
    """peft saves an adapted embedding's frozen weight too; it says nothing new, but it must be the base's."""
    name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
    if name not in base.tensors or not store.read(key).double().equal(base.read(name).double()):
        raise InputError(
            f"the adapter was saved with another base weight for tensor {name}",
            where=f"trial {trial}, {store.shards[0]}",
            why=f"base: {base.folder}",
            fix="give the base that the trial was trained on",
        )


def _scale(config: dict[str, Any], *, module: str, rank: int, where: str) -> float:
    """lora_alpha / r, or lora_alpha / sqrt(r) with rslora; patterns match a module's name from any dot to its end, as in peft."""
    expected = _from_pattern(config.get("rank_pattern"), module, config["r"])
    if rank != expected:
        raise InputError(f"the factors of {module} have rank {rank}, but the configuration says {expected}", where=where)
    alpha = _from_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _from_pattern(pattern: dict[str, Any] | None, module: str, default: Any) -> Any:
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _check_target(
    name: str, factors: Factors | None, key: str | None, *, store: TensorStore, base: TensorStore, trial: str, tied: frozenset[str]
) -> None:
    where = f"trial {trial}, {store.shards[0]}"
    if factors is not None and key is not None:
        raise InputError(f"tensor {name} is saved both whole and as factors", where=where)
    if name not in base.tensors:
        why = (
            "the base ties it to the embedding and does not store it"
            if name.endswith("lm_head.weight") and tied
            else f"base: {base.folder}"
        )
        raise InputError(f"tensor {name} is not in the base", where=where, why=why, fix="give the base that the trial was trained on")
    if factors is not None and name in tied:
        raise InputError(
            f"tensor {name} is tied to the output head",
            where=where,
            why="the adapter changed the embedding alone, and a merged weight would change both",
            fix="train without adapters on a tied embedding",
        )
    expected = base.tensors[name].shape
    if factors is None:
        shape = store.tensors[key].shape if key else ()
    else:
        (rank, fan_in), (fan_out, rank_b) = store.tensors[factors.a].shape, store.tensors[factors.b].shape
        shape = (fan_in, fan_out) if factors.transpose else (fan_out, fan_in)
        if rank != rank_b:
            raise InputError(f"the factors of {name} have ranks {rank} and {rank_b}", where=where)
    if tuple(shape) != tuple(expected):
        raise InputError(f"the update of tensor {name} has shape {list(shape)}, but the base has {list(expected)}", where=where)

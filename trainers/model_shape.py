"""The shape of a model and what a trial trains of it, counted without weights."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainers.config import LoraConfig, TrainableConfig, TrainConfig
from trainers.errors import InputError
from trainers.modeling import decoder_layers, select_trainable


@dataclass(frozen=True)
class ModelShape:
    """What the formulas read of a model.

    Args:
        parameters: P; an embedding tied to the head counts once.
        layers: decoder layers.
        hidden: D.
        intermediate: F.
        heads: H.
        kv_heads: key and value heads.
        head_size: numbers per head.
        vocabulary: V.
        clips: whether queries, keys and values are clamped in place, which keeps what they were.
        norms: numbers per token that a decoder layer normalises, 2 D in OLMo and Llama.
    """

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    clips: bool
    norms: int

    @property
    def head(self) -> int:
        """Parameters of the head, V D."""
        return self.vocabulary * self.hidden


@dataclass(frozen=True)
class Trained:
    """What a trial trains.

    Args:
        parameters: T, numbers that the optimizer updates.
        layers: for each decoder layer the last names of its modules that train, or have adapters, with the width of their inputs.
        head: whether the head's weight trains.
        embedding: whether the embedding trains.
    """

    parameters: int
    layers: tuple[Mapping[str, int], ...]
    head: bool = False
    embedding: bool = False


def shape_of(config: Any) -> ModelShape:
    """The shape of a transformers configuration's model; parameters are counted on its skeleton, which holds no weights.

    Raises:
        InputError: if it is no decoder with attention.
    """
    skeleton = _skeleton(config.to_json_string(use_diff=False))
    layers = decoder_layers(skeleton)
    heads, hidden = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    if not heads or not hidden:
        raise InputError(f"the shape of {type(skeleton).__name__} is not understood", why="it has no attention heads or no hidden size")
    norms: list[Any] = [module for module in layers[0].modules() if type(module).__name__.endswith("Norm")]
    return ModelShape(
        parameters=sum(value.numel() for value in skeleton.parameters()),
        layers=len(layers),
        hidden=hidden,
        intermediate=getattr(config, "intermediate_size", None) or 4 * hidden,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or hidden // heads,
        vocabulary=len(skeleton.get_output_embeddings().weight),
        clips=getattr(config, "clip_qkv", None) is not None,
        norms=sum(hidden if getattr(norm, "weight", None) is None else norm.weight.numel() for norm in norms),
    )


def trained_of(config: Any, *, train: TrainConfig) -> Trained:
    """What a trial trains of a transformers configuration's model, counted on its skeleton.

    Raises:
        InputError: if ``train.trainable`` names what the model does not have.
    """
    return _trained(config.to_json_string(use_diff=False), train.lora, train.trainable)


@functools.lru_cache(maxsize=2)
def _skeleton(config_json: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(config_json)))


@functools.lru_cache(maxsize=32)
def _trained(config_json: str, lora: LoraConfig | None, trainable: TrainableConfig) -> Trained:
    skeleton = _skeleton(config_json)
    layers = decoder_layers(skeleton)
    if lora is not None:
        adapted = _adapted(skeleton, lora=lora)
        return Trained(
            parameters=sum(lora.r * (module.in_features + module.out_features) for module in adapted),
            layers=tuple(
                {name.rpartition(".")[2]: module.in_features for name, module in layer.named_modules() if module in adapted}
                for layer in layers
            ),
        )
    select_trainable(skeleton, trainable=trainable)
    return Trained(
        parameters=sum(value.numel() for value in skeleton.parameters() if value.requires_grad),
        layers=tuple(
            {
                name.rpartition(".")[2]: module.weight.shape[-1]
                for name, module in layer.named_modules()
                if getattr(module, "weight", None) is not None and module.weight.requires_grad
            }
            for layer in layers
        ),
        head=skeleton.get_output_embeddings().weight.requires_grad,
        embedding=skeleton.get_input_embeddings().weight.requires_grad,
    )


def _adapted(skeleton: Any, *, lora: LoraConfig) -> set[Any]:
    """The modules that peft gives adapters: it matches a text as an expression for the whole name, others with the name's end."""
    from torch import nn

    def chosen(name: str) -> bool:
        if isinstance(lora.target_modules, str):
            return re.fullmatch(lora.target_modules, name) is not None
        return any(name == wanted or name.endswith(f".{wanted}") for wanted in lora.target_modules)

    linear = {name: module for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)}
    if lora.target_modules == "all-linear":
        return set(linear.values()) - {skeleton.get_output_embeddings()}
    return {module for name, module in linear.items() if chosen(name)}

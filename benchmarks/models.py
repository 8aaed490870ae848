"""Models of OLMo's shapes from random weights, and what they cost by formula.

Formulas count multiply-adds of matrix products as two operations, and nothing else.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.workload import PAD_TOKEN_ID, Settings
from trainers.config import LoraConfig
from trainers.modeling import add_lora


@dataclass(frozen=True)
class Shape:
    """Sizes of an OLMo; the layout is OLMo 0724's."""

    name: str
    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int
    tied: bool

    @property
    def body_parameters(self) -> int:
        """Parameters of the decoder layers."""
        return self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.intermediate)

    @property
    def head_parameters(self) -> int:
        """Parameters of the output head."""
        return self.hidden * self.vocabulary

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.body_parameters + self.head_parameters * (1 if self.tied else 2)

    def lora_parameters(self, r: int) -> int:
        """Parameters of adapters of rank r on every linear layer but the head."""
        return self.layers * r * (8 * self.hidden + 3 * (self.hidden + self.intermediate))

    @property
    def body_flops(self) -> int:
        """Forward FLOPs of the decoder layers' weights per token."""
        return 2 * self.body_parameters

    @property
    def head_flops(self) -> int:
        """Forward FLOPs of the head per position."""
        return 2 * self.head_parameters

    def attention_flops(self, length: int) -> int:
        """Forward FLOPs of attention per token of a row of that length, nothing saved by causality."""
        return 4 * length * self.hidden * self.layers


BENCH = Shape("OLMo-1B/10", hidden=192, layers=16, heads=6, intermediate=768, vocabulary=4736, tied=True)
"""Keeps OLMo-1B's layers, so that operation counts are the real ones, its ratio of MLP to attention and of head to body."""
TINY = Shape("tiny", hidden=32, layers=2, heads=2, intermediate=64, vocabulary=320, tied=True)
"""For trying a script out."""
OLMO_1B = Shape("OLMo-1B", hidden=2048, layers=16, heads=16, intermediate=8192, vocabulary=50304, tied=True)
OLMO_7B = Shape("OLMo-7B", hidden=4096, layers=32, heads=32, intermediate=11008, vocabulary=50304, tied=False)


def olmo_config(shape: Shape) -> Any:
    """The transformers configuration of a shape."""
    from transformers import OlmoConfig

    return OlmoConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=2048,
        clip_qkv=8.0,
        tie_word_embeddings=shape.tied,
        pad_token_id=PAD_TOKEN_ID,
        bos_token_id=None,
        eos_token_id=0,
        use_cache=False,
    )


def build_base(shape: Shape, *, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """A causal language model of random weights (normal, 0.02) made on the device, in evaluation mode."""
    from transformers import OlmoForCausalLM

    with torch.device("meta"):
        model: Any = OlmoForCausalLM(olmo_config(shape))
    model = model.to(dtype).to_empty(device=device)
    model.tie_weights()
    generator = torch.Generator(device=device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02, generator=generator)
    _restore_rotary_buffers(model, device=device)
    return model.eval()


def _restore_rotary_buffers(model: Any, *, device: str) -> None:
    """``to_empty`` leaves buffers that no checkpoint holds without values: take the rotary frequencies of a new module."""
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            fresh = type(module)(config=module.config)
            module.inv_freq = fresh.inv_freq.to(device)
            module.original_inv_freq = fresh.inv_freq.to(device).clone()


def adapt(model: Any, *, settings: Settings, seed: int) -> Any:
    """Adapters around a model, already different from zero.

    At the usual start B is zero, and with it the KL and every gradient of A: a comparison of gradients there would see half
    of what it should.
    """
    policy = add_lora(model, lora=LoraConfig(r=settings.lora_r, lora_alpha=settings.lora_r, lora_dropout=settings.lora_dropout), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return policy


def build_policy(base: Any, *, settings: Settings, seed: int) -> Any:
    """A copy of the base with such adapters."""
    return adapt(copy.deepcopy(base), settings=settings, seed=seed)


def freeze(model: Any) -> Any:
    """A copy of the base without gradients: a reference model of its own."""
    return copy.deepcopy(model).requires_grad_(False).eval()

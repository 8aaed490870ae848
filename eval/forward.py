"""Inference forward passes whose head runs on chosen positions only.

Shape suffixes: B rows, T positions, N chosen positions, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainers.scoring import measuring


@dataclass(frozen=True)
class SplitModel:
    """A causal language model as a decoder and a head; without a usable split, ``head`` is None and the decoder gives logits.

    Args:
        decoder: called with ids, mask, positions and cache.
        head: from states at chosen positions to logits, or None.
        takes_positions: whether the decoder accepts ``position_ids``.
    """

    decoder: Callable[..., Any]
    head: Callable[[Tensor], Tensor] | None
    takes_positions: bool

    def run(
        self, *, ids_BT: Tensor, mask_BT: Tensor, positions_BT: Tensor | None = None, cache: Any = None, use_cache: bool = False
    ) -> tuple[Tensor, Any]:
        """States (or logits) of shape (B, T, ...) and the cache. The mask covers cached positions too."""
        arguments: dict[str, Any] = {"input_ids": ids_BT, "attention_mask": mask_BT, "use_cache": use_cache}
        if cache is not None:
            arguments["past_key_values"] = cache
        if positions_BT is not None and self.takes_positions:
            arguments["position_ids"] = positions_BT
        output = self.decoder(**arguments)
        return (output.logits if self.head is None else output.last_hidden_state), getattr(output, "past_key_values", None)

    def logits(self, states_NX: Tensor) -> Tensor:
        """Logits of shape (N, V), in the model's dtype, from what ``run`` gave at N positions."""
        return states_NX if self.head is None else self.head(states_NX)


def split_model(model: Any, *, device: str) -> SplitModel:
    """Decoder and head of a causal language model, or the whole model where the two alone do not give its logits.

    Some architectures scale or cap their logits after the head; a two-token comparison finds that out.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = getattr(causal, getattr(causal, "base_model_prefix", "") or "-", None)
    head = causal.get_output_embeddings() if hasattr(causal, "get_output_embeddings") else None
    whole = SplitModel(decoder=model, head=None, takes_positions=_takes_positions(causal))
    if decoder is None or decoder is causal or head is None:
        return whole
    split = SplitModel(decoder=decoder, head=head, takes_positions=_takes_positions(decoder))
    ids = torch.tensor([[1, 2]], device=device)
    with measuring(model):
        expected, _ = whole.run(ids_BT=ids, mask_BT=torch.ones_like(ids))
        states, _ = split.run(ids_BT=ids, mask_BT=torch.ones_like(ids))
        actual = split.logits(states)
    # Equality to the bit: soft-capping is nearly the identity on the small logits of an untrained model.
    return split if torch.equal(expected, actual) else whole


def _takes_positions(module: Any) -> bool:
    return "position_ids" in inspect.signature(module.forward).parameters


def pad_token_id(tokenizer: Any) -> int:
    """An id to fill batches with; masked everywhere, so any valid id will do."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)

"""The forward pass of training and measuring: logits at scored positions only.

Shape suffixes: B rows, T positions, N scored tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from trainers.data.batches import Batch


class ScoringModel(nn.Module):
    """A causal language model whose forward pass applies the head to scored positions only.

    On data like LUME fewer than one position in ten is scored, and the head with its float32 loss is the largest consumer of
    memory; prompt and padding positions never reach it.

    Args:
        lm: a causal language model, or a peft model around one.
    """

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm

    @property
    def causal_lm(self) -> Any:
        """The causal language model inside the adapters, if there are any."""
        return self.lm.get_base_model() if hasattr(self.lm, "get_base_model") else self.lm

    def hidden(self, batch: Batch) -> Tensor:
        """Last hidden states (after the final norm) at the scored positions, shape (N, D)."""
        causal = self.causal_lm
        states_BTD = causal.base_model(
            input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False
        ).last_hidden_state
        return states_BTD[batch.row_N, batch.position_N]

    def head(self, hidden_ND: Tensor) -> Tensor:
        """Logits, shape (N, V)."""
        return self.causal_lm.get_output_embeddings()(hidden_ND)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Hidden states (N, D) and logits (N, V) at the scored positions."""
        hidden_ND = self.hidden(batch)
        return hidden_ND, self.head(hidden_ND)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by their names inside the language model, in a stable order."""
        return {name: parameter for name, parameter in self.lm.named_parameters() if parameter.requires_grad}


def connect_to_graph(value: Tensor, *, hidden_ND: Tensor, logits_NV: Tensor) -> Tensor:
    """The same value, tied to every parameter of the forward pass with gradient zero.

    A rank whose micro-batch scores nothing must still run the same backward hooks as the others.
    """
    return value + 0.0 * (hidden_ND.float().sum() + logits_NV.float().sum())


def set_step_seed(*, seed: int, step: int, rank: int) -> None:
    """Seed dropout for one step from (seed, step, rank), so that a resumed step draws what the first try drew."""
    torch.manual_seed(((seed * 1_000_003 + step) * 1_009 + rank) % (2**63))


@contextlib.contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; a model that was training goes on training afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)

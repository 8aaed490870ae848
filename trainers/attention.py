"""Attention over packed rows: a few groups of like-sized rows, each causal, none with a mask.

Right padding and causality do what a mask would: a real token never sees what comes after it. Without a mask torch takes its
flash kernels, on CPU and GPU.

Shape suffixes: H heads, S tokens of all rows, X positions of all rows in their groups, E size of a head, B rows of a group,
T positions of a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from trainers.data.packing import AttentionGroup, Packed

NAME = "packed_rows"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: Packed | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface over tokens of shape (1, H, S, E); without ``packed`` it is the library's own attention.

    Returns:
        Outputs of shape (1, S, H, E), and no weights.
    """
    if packed is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **others)
    # Tokens first: that is how they lie in memory, and a token's heads stay together in every copy.
    tokens = [part.squeeze(0).transpose(0, 1) for part in (query, key, value)]
    if packed.spread_X is not None:
        tokens = [_Spread.apply(part, packed.spread_X, packed.restore_S) for part in tokens]
    sizes = [group.num_rows * group.length for group in packed.groups]
    # Split, not sliced: the gradient of a split is one concatenation, that of a slice fills a whole tensor with zeros.
    by_group = zip(packed.groups, *(part.split(sizes) for part in tokens), strict=True)
    parts = [_attend(*(_rows(part, group=group) for part in own), scaling=scaling, dropout=dropout) for group, *own in by_group]
    outputs = parts[0] if len(parts) == 1 else torch.cat(parts)
    if packed.restore_S is not None:
        outputs = outputs.index_select(0, packed.restore_S)
    return outputs[None], None


class _Spread(torch.autograd.Function):
    """Tokens to the positions of the groups' rows; back, each token takes the gradient of its own position.

    Padding has no gradient: its outputs are dropped, and no real token attends to it.
    """

    @staticmethod
    def forward(ctx: Any, tokens_SHE: Tensor, spread_X: Tensor, restore_S: Tensor) -> Tensor:
        ctx.save_for_backward(restore_S)
        return tokens_SHE.index_select(0, spread_X)

    @staticmethod
    def backward(ctx: Any, grad_XHE: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad_XHE.index_select(0, *ctx.saved_tensors), None, None


def _rows(tokens_XHE: Tensor, *, group: AttentionGroup) -> Tensor:
    """The tokens of a group by row, shape (B, H, T, E)."""
    return tokens_XHE.view(group.num_rows, group.length, *tokens_XHE.shape[1:]).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None, dropout: float) -> Tensor:
    """Causal attention within each row; outputs of shape (B * T, H, E)."""
    if query.shape[1] != key.shape[1]:  # several query heads read one key head
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    out_BHTE = scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, scale=scaling)
    return out_BHTE.transpose(1, 2).flatten(0, 1)


def supports_packing(model: Any) -> bool:
    """Whether a model hands its attention to the library's interface, and attends to everything before a token."""
    config = getattr(model, "config", None)
    windows = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    kinds = set(getattr(config, "layer_types", None) or ())
    return bool(getattr(model, "_supports_attention_backend", False)) and not windows and kinds <= {"full_attention"}


def use_packed_attention(model: Any) -> None:
    """Let a model attend to packed rows where it is given them; it goes on working without them."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)

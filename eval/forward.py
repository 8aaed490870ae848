"""Inference forward passes whose head runs on chosen positions only.

Shape suffixes: B rows, T positions, N chosen positions, S tokens of all rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from eval.row_cache import NAME, KeptStates, RowCache, measured_attention
from trainers.attention import supports_packing
from trainers.data.encode import EncodedRow
from trainers.data.packing import Packed, pack
from trainers.errors import InputError
from trainers.modeling import decoder_layers
from trainers.scoring import measuring


@dataclass(frozen=True)
class SplitModel:
    """A causal language model as a decoder and a head; without a usable split, ``head`` is None and the decoder gives logits.

    Args:
        decoder: called with ids, mask, positions and cache.
        head: from states at chosen positions to logits, or None.
        takes_positions: whether the decoder accepts ``position_ids``.
        causal: the causal language model itself, without adapters around it.
        packs: whether rows may be laid end to end without padding; then ``run_packed`` and ``run_cached`` work inside ``packing``.
    """

    decoder: Callable[..., Any]
    head: Callable[[Tensor], Tensor] | None
    takes_positions: bool
    causal: Any = None
    packs: bool = False

    def run_packed(self, batch: Packed, *, wanted_N: Tensor, kept: KeptStates | None = None) -> Tensor:
        """Last hidden states of packed rows at the wanted tokens, shape (N, D); ``kept`` takes keys and values of all tokens."""
        with _last_mlp_only_at(self.causal, wanted_N):
            return self._run_flat(batch.input_ids_S, batch.position_ids_S, packed=batch, kept=kept)[wanted_N]

    def run_cached(self, ids_S: Tensor, *, cache: RowCache) -> Tensor:
        """Last hidden states of the next tokens of cached rows, shape (S, D), after ``cache.begin``."""
        return self._run_flat(ids_S, cache.position_S, cache=cache)

    def _run_flat(self, ids_S: Tensor, position_S: Tensor, **attention: Any) -> Tensor:
        # A mask of four dimensions is passed on as it is, so none is built; the attention here knows what to attend to.
        no_mask = ids_S.new_zeros(1, 1, 1, 1)
        output = self.decoder(input_ids=ids_S[None], attention_mask=no_mask, position_ids=position_S[None], use_cache=False, **attention)
        return output.last_hidden_state[0]

    @contextlib.contextmanager
    def packing(self) -> Iterator[None]:
        """Inside, the model attends to packed and cached rows where it is given them; without them it works as before."""
        if not self.packs:
            yield
            return
        before = self.causal.config._attn_implementation
        _use_attention(self.causal)
        try:
            yield
        finally:
            self.causal.set_attn_implementation(before)

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
    whole = SplitModel(decoder=model, head=None, takes_positions=_takes_positions(causal), causal=causal)
    if decoder is None or decoder is causal or head is None:
        return whole
    split = SplitModel(decoder=decoder, head=head, takes_positions=_takes_positions(decoder), causal=causal)
    ids = torch.tensor([[1, 2]], device=device)
    with measuring(model):
        expected, _ = whole.run(ids_BT=ids, mask_BT=torch.ones_like(ids))
        states, _ = split.run(ids_BT=ids, mask_BT=torch.ones_like(ids))
        actual = split.logits(states)
    # Equality to the bit: soft-capping is nearly the identity on the small logits of an untrained model.
    if not torch.equal(expected, actual):
        return whole
    return replace(split, packs=supports_packing(causal) and _packing_works(split, device=device))


@torch.no_grad()
def _packing_works(split: SplitModel, *, device: str) -> bool:
    """Whether packed rows give what they give alone: some architectures ask for the library's attention and then pass it by."""
    rows = [EncodedRow("", ids, 1) for ids in ((1, 2, 1), (2, 1))]
    batch = pack(rows, pad_token_id=1).to(device)
    with measuring(split.causal), replace(split, packs=True).packing():
        try:
            packed_SD = split.run_packed(batch, wanted_N=torch.arange(len(batch.input_ids_S), device=device))
        except (InputError, RuntimeError, TypeError, ValueError):
            return False
    with measuring(split.causal):
        for row, (first, length) in zip(rows, batch.row_spans, strict=True):
            ids = torch.tensor([row.input_ids], device=device)
            alone, _ = split.run(ids_BT=ids, mask_BT=torch.ones_like(ids))
            actual_TD, expected_TD = packed_SD[first : first + length].float(), alone[0].float()
            # Rounding, even of bfloat16, is far below this; tokens of a neighbour's row are far above.
            if not (actual_TD - expected_TD).norm() <= 0.05 * expected_TD.norm():
                return False
    return True


@contextlib.contextmanager
def _last_mlp_only_at(causal: Any, wanted_N: Tensor) -> Iterator[None]:
    """Inside, the last decoder layer's MLP runs at the wanted tokens only and gives zeros elsewhere.

    Nothing after it mixes tokens, and its keys and values come before it: what is read is exact.
    """
    module = getattr(decoder_layers(causal)[-1], "mlp", None)
    if module is None:
        yield
        return
    forward, own = module.forward, "forward" in vars(module)

    def partly(states_1SD: Tensor) -> Any:
        found = forward(states_1SD.index_select(1, wanted_N))
        # Mixtures of experts return more than states; they run everywhere.
        return torch.zeros_like(states_1SD).index_copy(1, wanted_N, found) if isinstance(found, Tensor) else forward(states_1SD)

    module.forward = partly
    try:
        yield
    finally:
        if own:
            module.forward = forward
        else:
            del module.forward


def _use_attention(causal: Any) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, measured_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    causal.set_attn_implementation(NAME)


def cache_positions(model: Any, *, limit_bytes: int = 8 << 30) -> int:
    """Positions whose keys and values fit a number of bytes: a function of the model's shape, not of the machine."""
    config = model.config
    heads = int(config.num_attention_heads)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    dtype = getattr(model, "dtype", torch.float32)
    per_position = 2 * int(config.num_hidden_layers) * int(getattr(config, "num_key_value_heads", None) or heads) * size * dtype.itemsize
    return max(1, limit_bytes // per_position)


def _takes_positions(module: Any) -> bool:
    return "position_ids" in inspect.signature(module.forward).parameters


def pad_token_id(tokenizer: Any) -> int:
    """An id to fill batches with; masked everywhere, so any valid id will do."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)

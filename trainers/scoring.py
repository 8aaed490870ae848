"""The forward pass of training and measuring: packed rows in, a few numbers per evaluated token out.

Shape suffixes: S tokens of all rows, N evaluated tokens, D hidden size.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainers.attention import supports_packing, use_packed_attention
from trainers.data.encode import EncodedRow
from trainers.data.packing import MAX_GROUPS, Packed, pack
from trainers.errors import InputError
from trainers.vocabulary import Measured, ReferenceDistributions, VocabularyScores, measure_vocabulary, score_vocabulary

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Segment:
    """A run of a batch's evaluated tokens, and what is wanted of them.

    Args:
        start: first evaluated token.
        stop: one after the last.
        reference: the reference's distributions at these tokens, where a loss compares with them.
        mean_logit: whether the logits' average under the model's own distribution is wanted.
    """

    start: int
    stop: int
    reference: ReferenceDistributions | None = None
    mean_logit: bool = False


@dataclass(frozen=True)
class Request:
    """What a forward pass shall give.

    Args:
        segments: runs of evaluated tokens, scored over the vocabulary with gradients.
        layer: decoder layer whose output at every token is wanted, or None. Without segments nothing above it is computed, where the
            architecture reads ``num_hidden_layers`` as it goes (OLMo, Llama and their kin; GPT-NeoX runs all layers).
    """

    segments: tuple[Segment, ...] = ()
    layer: int | None = None


@dataclass(frozen=True)
class Scores:
    """What a forward pass gave.

    Args:
        segments: scores of each requested segment.
        activations_SD: output of the requested layer at every token, or None.
        link: zero; in an empty batch tied to every parameter that scored rows would reach, because its rank must still run the same
            backward hooks as the others.
    """

    segments: tuple[VocabularyScores, ...]
    activations_SD: Tensor | None
    link: Tensor


@dataclass(frozen=True)
class Observed:
    """One pass of a frozen model.

    Args:
        hidden_ND: last hidden states that predict the evaluated tokens.
        measured: what the vocabulary says there, mean embeddings included.
        activations_SD: output of the chosen layer at every token, or None.
    """

    hidden_ND: Tensor
    measured: Measured
    activations_SD: Tensor | None


class _LastMlp:
    """The last decoder layer's MLP, computed only at the tokens whose last hidden state is read.

    Nothing after it mixes tokens, and on data like LUME seven in ten of them are prompt. It is exact, and saves two thirds of a
    layer on those.
    """

    def __init__(self, causal: Any) -> None:
        from trainers.modeling import decoder_layers

        self._kept_N: Tensor | None = None
        module = getattr(decoder_layers(causal)[-1], "mlp", None)
        if module is not None:
            self._forward = module.forward
            module.forward = self

    @contextlib.contextmanager
    def only_at(self, tokens_N: Tensor) -> Iterator[None]:
        """Inside, other tokens get zeros."""
        self._kept_N = tokens_N
        try:
            yield
        finally:
            self._kept_N = None

    def __call__(self, states_1SD: Tensor) -> Tensor:
        if self._kept_N is None:
            return self._forward(states_1SD)
        kept_1ND = self._forward(states_1SD.index_select(1, self._kept_N))
        return torch.zeros_like(states_1SD).index_copy(1, self._kept_N, kept_1ND)


class ScoringModel(nn.Module):
    """A causal language model whose forward pass sees real tokens only, and applies the head to evaluated ones only, in chunks.

    On data like LUME fewer than one position in ten is scored, and the head with its float32 loss is the largest consumer of
    memory; prompt positions never reach it, and no tensor of vocabulary size outlives a chunk.

    Args:
        lm: a causal language model, or a peft model around one.

    Raises:
        InputError: if the model does more to its logits than multiply by the head.
    """

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm
        _check_head(self.causal_lm)
        self.packs = supports_packing(self.causal_lm) and self._try_packing()
        self._mlp = _LastMlp(self.causal_lm) if self.packs else None

    @torch.no_grad()
    def _try_packing(self) -> bool:
        """Whether two rows can be packed: some architectures ask for the library's attention and then pass it by."""
        use_packed_attention(self.causal_lm)
        device = self.causal_lm.get_output_embeddings().weight.device
        if device.type == "meta":
            return True
        batch = pack([EncodedRow("", ids, 1) for ids in ((1, 2, 1), (2, 1))], pad_token_id=1).to(str(device))
        try:
            self._hidden_packed(batch, decoder=self.causal_lm.base_model)
        except (RuntimeError, TypeError, ValueError) as error:
            log.info("rows of %s are padded, not packed: %s", type(self.causal_lm).__name__, error)
            return False
        return True

    @property
    def causal_lm(self) -> Any:
        """The causal language model inside the adapters, if there are any."""
        return self.lm.get_base_model() if hasattr(self.lm, "get_base_model") else self.lm

    @property
    def head_weight(self) -> nn.Parameter:
        """The head's weight, shape (V, D); with tied embeddings it is the embedding's too."""
        return self.causal_lm.get_output_embeddings().weight

    @property
    def max_groups(self) -> int:
        """Groups of attention that a batch may have: one where each costs a pass, whose number all ranks must agree on."""
        return MAX_GROUPS.get(self.head_weight.device.type, 3) if self.packs else 1

    @property
    def trains_head(self) -> bool:
        """Whether training moves the head: then a cached reference needs a copy of it."""
        return self.head_weight.requires_grad

    def hidden(self, batch: Packed, *, everywhere: bool = False) -> Tensor:
        """Last hidden states (after the final norm) by token, shape (S, D); those of tokens that predict no evaluated one are
        meaningless unless asked for ``everywhere``."""
        decoder = self.causal_lm.base_model
        if not self.packs:
            return self._hidden_padded(batch, decoder=decoder)
        if self._mlp is not None and not everywhere and not getattr(decoder, "is_gradient_checkpointing", False):
            with self._mlp.only_at(batch.source_N):
                return self._hidden_packed(batch, decoder=decoder)
        return self._hidden_packed(batch, decoder=decoder)

    def _hidden_packed(self, batch: Packed, *, decoder: Any) -> Tensor:
        # A mask of four dimensions is passed on as it is, so none is built; packed rows need none.
        no_mask = batch.input_ids_S.new_zeros(1, 1, 1, 1)
        states = decoder(
            input_ids=batch.input_ids_S[None],
            attention_mask=no_mask,
            position_ids=batch.position_ids_S[None],
            use_cache=False,
            packed=batch,
        )
        return states.last_hidden_state[0]

    def _hidden_padded(self, batch: Packed, *, decoder: Any) -> Tensor:
        """The same for an architecture whose attention is its own: every group of rows padded, one pass each."""
        index_X = torch.arange(len(batch.input_ids_S), device=batch.input_ids_S.device) if batch.spread_X is None else batch.spread_X
        parts = []
        for group, index in zip(batch.groups, index_X.split([group.num_rows * group.length for group in batch.groups]), strict=True):
            positions_BT = batch.position_ids_S[index].view(group.num_rows, group.length)
            # Padding repeats a row's last token, so its position stops growing there.
            mask_BT = torch.ones_like(positions_BT)
            mask_BT[:, 1:] = (positions_BT[:, 1:] > positions_BT[:, :-1]).long()
            ids_BT = batch.input_ids_S[index].view(group.num_rows, group.length)
            ids_BT = torch.where(mask_BT.bool(), ids_BT, batch.pad_token_id)
            parts.append(decoder(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state.flatten(0, 1))
        states = torch.cat(parts)
        return states if batch.restore_S is None else states.index_select(0, batch.restore_S)

    def forward(self, batch: Packed, request: Request | None = None) -> tuple[Tensor | None, ...]:
        """Flat tuple of tensors, as engines' hooks want it: see ``score`` and ``measure``, which name them.

        Without a request it measures.
        """
        if request is None:
            measured = self._measure(batch)
            return measured.log_prob_N, measured.log_normaliser_N, measured.is_argmax_N
        hidden_SD, activations_SD = self._states(batch, request=request)
        flat: list[Tensor | None] = [activations_SD]
        link = hidden_SD.new_zeros(())
        for segment in request.segments:
            rows = slice(segment.start, segment.stop)
            scores = score_vocabulary(
                hidden_SD.index_select(0, batch.source_N[rows]),
                head_VD=self.head_weight,
                label_N=batch.label_N[rows],
                reference=segment.reference,
                mean_logit=segment.mean_logit,
            )
            flat += [scores.log_prob_N, scores.log_normaliser_N, scores.mean_logit_N, scores.reference_mean_logit_N]
            # With rows or without: the backward pass must enter through the same outputs on every rank, or ZeRO-3 waits for ever.
            link = link + scores.log_prob_N[:0].sum()
        return link, *flat

    def _states(self, batch: Packed, *, request: Request) -> tuple[Tensor, Tensor | None]:
        """Last hidden states and the requested layer's output, both of every token."""
        if request.layer is None:
            return self.hidden(batch), None
        from trainers.modeling import decoder_layers

        found: list[Tensor] = []

        def keep(module: nn.Module, arguments: Any, output: Any) -> None:
            found.append(output if isinstance(output, Tensor) else output[0])

        assert self.packs, "checked when the trial starts"
        config = self.causal_lm.base_model.config
        whole = config.num_hidden_layers
        hook = decoder_layers(self.causal_lm)[request.layer].register_forward_hook(keep)
        try:
            if not request.segments:
                config.num_hidden_layers = request.layer + 1
            hidden_SD = self.hidden(batch, everywhere=True)
        finally:
            config.num_hidden_layers = whole
            hook.remove()
        return hidden_SD, found[0][0]

    def _measure(self, batch: Packed) -> Measured:
        hidden_ND = self.hidden(batch).index_select(0, batch.source_N)
        return measure_vocabulary(hidden_ND, head_VD=self.head_weight, label_N=batch.label_N)

    @torch.no_grad()
    def observe(self, batch: Packed, *, layer: int | None = None) -> Observed:
        """Everything that a reference may be asked for later; no gradient."""
        hidden_SD, activations_SD = self._states(batch, request=Request((Segment(0, 0),), layer=layer))
        hidden_ND = hidden_SD.index_select(0, batch.source_N)
        measured = measure_vocabulary(hidden_ND, head_VD=self.head_weight, label_N=batch.label_N, mean_embedding=True)
        return Observed(hidden_ND, measured, activations_SD)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by their names inside the language model, in a stable order."""
        return {name: parameter for name, parameter in self.lm.named_parameters() if parameter.requires_grad}


def scores_of(outputs: tuple[Tensor | None, ...], *, request: Request) -> Scores:
    """The outputs of ``ScoringModel.forward`` by name."""
    link, activations_SD, *flat = outputs
    segments = []
    for start in range(0, len(flat), 4):
        log_prob_N, log_normaliser_N, mean_logit_N, reference_mean_logit_N = flat[start : start + 4]
        assert log_prob_N is not None
        assert log_normaliser_N is not None
        segments.append(VocabularyScores(log_prob_N, log_normaliser_N, mean_logit_N, reference_mean_logit_N))
    assert link is not None
    assert len(segments) == len(request.segments)
    return Scores(tuple(segments), activations_SD, link)


@torch.no_grad()
def _check_head(causal: Any) -> None:
    """Refuse architectures that scale or cap their logits after the head: losses computed without that would be another model's."""
    head = causal.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor):
        raise InputError(f"{type(causal).__name__} has no output head with a weight", fix="use a causal language model")
    if hasattr(head, "lora_A") or hasattr(head, "base_layer"):
        raise InputError(
            "adapters on the output head",
            where="train.lora.target_modules",
            why="the reference is cached for a head that stays as it is",
            fix="leave the head out, as all-linear does",
        )
    if weight.is_meta:
        return
    was_training = causal.training
    causal.eval()
    ids = torch.tensor([[1, 2]], device=weight.device)
    try:
        expected = causal(input_ids=ids, use_cache=False).logits
        actual = causal.base_model(input_ids=ids, use_cache=False).last_hidden_state @ weight.T
    finally:
        causal.train(was_training)
    # Soft-capping is nearly the identity on the small logits of an untrained model; a matrix product in another order is closer.
    if not torch.allclose(expected, actual.to(expected), rtol=1e-2 if weight.element_size() < 4 else 1e-5, atol=1e-7):
        raise InputError(
            f"{type(causal).__name__} does more to its logits than multiply by the head (a bias, a scale or a cap)",
            where="model",
            fix="use an architecture such as OLMo, OLMo2, Llama, Mistral or Qwen",
        )


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

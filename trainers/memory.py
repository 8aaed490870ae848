"""What a trial takes of a device's memory, told from its configuration and its model's shape before any weight is loaded.

Bytes throughout; e bytes per number of the model's dtype. Letters of the formulas: P parameters of the model, T trained ones, N ranks;
S tokens of a micro-batch, X positions of its attention (padding included), K evaluated tokens; D hidden size, F intermediate size,
A heads times their size, H heads, V vocabulary, R rank of the adapters.

The counts are of OLMo in transformers; tests compare them with the tensors that are really there. Activations of Llama, Mistral and
Qwen2 are met within 2 %, those of OLMo-2 are up to 12 % more, and a plain MLP keeps less than the gated one that is counted. Not
counted: integers and masks of a batch, a few numbers per token or row, what sharding a model takes at the start, and what objectives
that steer a layer keep of it (in turn all layers count for them, though those above the steered one do not run).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from trainers.config import TrainConfig
from trainers.engine.ds_config import deepspeed_config
from trainers.model_shape import ModelShape, Trained
from trainers.objectives.table import Need, needs
from trainers.vocabulary import CHUNK_BYTES

GIB = 2**30
CONTEXT_BYTES = {"cpu": 0, "cuda": 2_000_000_000}
"""What a process takes beside its tensors: CUDA's context, workspaces of libraries, gaps of the allocator. Assumed, not measured."""
KEPT_FREE = 0.08
"""Share of a device that is left free."""
ZERO3_NUMBERS = 1_000_000_000
"""ZeRO-3 keeps gathered weights that it needs again within so many numbers (DeepSpeed's stage3_max_reuse_distance), and updates so
many at a time (sub_group_size)."""
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


@dataclass(frozen=True)
class BatchSize:
    """The size of a micro-batch.

    Args:
        tokens: S.
        positions: X, padding of the attention's groups included.
        evaluated: K, over all rows.
        segment: evaluated tokens of the larger set, which are scored in one sweep over the vocabulary.
        compared: K', evaluated tokens at which the objective reads the reference's distributions.
        groups: groups of the attention.
    """

    tokens: int
    positions: int
    evaluated: int
    segment: int
    compared: int = 0
    groups: int = 1


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank, by part; ``estimate_memory`` has the formulas.

    Args:
        weights: the model's parameters in its dtype.
        adapters: LoRA's parameters as forward passes read them.
        optimizer: float32 master weights and AdamW's two moments.
        gradients: what is there at the end of a step's backward passes.
        buffers: DeepSpeed's buffers for communication and the weights that ZeRO-3 has gathered.
        activations: what the backward pass reads of the layers.
        vocabulary: vectors that it reads per evaluated token.
        reference: distributions of the reference at the compared tokens, and its head where the model's own trains.
        head_workspace: one chunk of logits, and the head's gradient as it is summed up.
        layer_workspace: what the backward pass through one layer needs at once.
        update: gradients and temporary tensors of the optimizer's step, which comes when the rest of the passes is gone.
        context: see ``CONTEXT_BYTES``.
    """

    weights: int
    adapters: int
    optimizer: int
    gradients: int
    buffers: int
    activations: int
    vocabulary: int
    reference: int
    head_workspace: int
    layer_workspace: int
    update: int
    context: int

    @property
    def lasting(self) -> int:
        """What neither passes nor updates change."""
        return self.weights + self.adapters + self.optimizer + self.context

    @property
    def workspace(self) -> int:
        """The head's and a layer's workspace are never there together."""
        return max(self.head_workspace, self.layer_workspace)

    @property
    def passing(self) -> int:
        """What forward and backward passes add."""
        return self.gradients + self.buffers + self.activations + self.vocabulary + self.reference + self.workspace

    @property
    def total(self) -> int:
        """The peak: the passes, or the update that follows them, whichever is larger."""
        return self.lasting + max(self.passing, self.update)

    @property
    def parts(self) -> dict[str, int]:
        """The parts that make up the peak, largest first, without those that are zero."""
        passing = ("gradients", "buffers", "activations", "vocabulary", "reference", "workspace")
        names = ("weights", "adapters", "optimizer", "context", *(passing if self.passing >= self.update else ("update",)))
        found = {name: getattr(self, name) for name in names}
        return dict(sorted(((name, size) for name, size in found.items() if size), key=lambda item: -item[1]))


def estimate_memory(
    shape: ModelShape,
    *,
    train: TrainConfig,
    trained: Trained,
    batch: BatchSize,
    ranks: int | None = None,
    device: str = "cuda",
    checkpointing: bool | None = None,
) -> MemoryEstimate:
    """The peak of one rank, by part.

    What ZeRO's stages share out over N ranks: 1 the optimizer's state, 2 gradients too, 3 weights too.

    - weights: e P, over N in stage 3. Adapters: e T, in plain torch 4 T.
    - optimizer: moments 8 T; in stages 1 to 3 with float32 master weights 12 T / N, also where the weights are float32 themselves.
    - gradients: e T in plain torch and stages 0 and 1 (4 T for adapters in plain torch); e T / N in stages 2 and 3, twice that in
      stage 2 where a step has several micro-batches. NGDiff's two float32 gradients, one per set, come before: 8 T and e T.
    - buffers: e per number of DeepSpeed's reduce bucket, two buckets on a GPU in stages 1 and 2; in stage 3 with several ranks also e
      times the gathered weights, at most 10^9 numbers and the largest parameter.
    - update: float32 copies of the own gradients 4 T / N, and as much for AdamW's denominators (twice as much on a CPU). Just before,
      the gradients, their concatenation and its float32 copy are 8 T / N, too. In stage 0 8 T; in plain torch, whose AdamW is fused,
      4 T; in stage 3 for 10^9 numbers at a time, with the gradients and the bucket beside them.
    - activations, vocabulary, reference, workspaces: see the functions of these names.

    Passes are counted with all gradients and all activations at once: true from a step's second micro-batch on, an upper bound for
    the first, in which gradients come as activations go.

    Args:
        shape: of the model.
        train: the trial; its dtype, engine, objective and adapters count.
        trained: what it trains.
        batch: its largest micro-batch on one rank.
        ranks: N; None takes ``train.engine.ranks``.
        device: cpu or cuda.
        checkpointing: whether activations are recomputed; None takes ``train.activation_checkpointing``, whose null counts as no.

    Source: Rajbhandari et al. 2019, section 5, https://arxiv.org/abs/1910.02054;
    ``deepspeed/runtime/zero/stage_1_and_2.py`` and ``stage3.py`` of DeepSpeed 0.19; ``torch/optim/adamw.py``.
    """
    num, dtype_bytes, is_gpu = ranks or train.engine.num_ranks, _DTYPE_BYTES[train.engine.dtype], device == "cuda"
    stage = train.engine.stage if train.engine.name == "deepspeed" else None
    count = trained.parameters
    share = math.ceil(count / num) if stage else count
    whole_share = num if stage == 3 else 1
    weights = math.ceil(dtype_bytes * shape.parameters / whole_share)
    adapters = math.ceil(_trained_bytes(train) * count / whole_share) if train.lora is not None else 0
    several = math.ceil(train.train_batch_size / num) > train.micro_batch_size
    gradients = _trained_bytes(train) * (count if stage in (None, 0, 1) else share * (2 if stage == 2 and several else 1))
    if Need.SIDE_GRADIENTS in needs(train.objective):
        gradients = max(gradients, (8 + _trained_bytes(train)) * count)
    buffers = 0
    if stage:
        bucket = dtype_bytes * deepspeed_config(train, has_gpu=is_gpu)["zero_optimization"]["reduce_bucket_size"]
        buffers = bucket * (2 if is_gpu and stage < 3 else 1)
    copies = 4 if stage is None else 12 if stage and not is_gpu else 8
    update = copies * share
    if stage == 3:
        gathered = shape.parameters + (count if train.lora is not None else 0)
        largest = max(shape.head, shape.hidden * shape.intermediate)
        update = copies * min(share, ZERO3_NUMBERS + largest // num) + gradients + buffers
        if num > 1:
            buffers += dtype_bytes * min(gathered, ZERO3_NUMBERS + largest)
    recomputes = bool(train.activation_checkpointing) if checkpointing is None else checkpointing
    return MemoryEstimate(
        weights=weights,
        adapters=adapters,
        optimizer=(12 if stage else 8) * share,
        gradients=gradients,
        buffers=buffers,
        activations=activation_bytes(shape, train=train, trained=trained, batch=batch, device=device, checkpointing=recomputes),
        vocabulary=vocabulary_bytes(shape, train=train, trained=trained, batch=batch),
        reference=reference_bytes(shape, train=train, trained=trained, batch=batch),
        head_workspace=head_workspace_bytes(shape, train=train, trained=trained, batch=batch, device=device),
        layer_workspace=layer_workspace_bytes(shape, train=train, trained=trained, batch=batch, device=device, checkpointing=recomputes),
        update=update,
        context=CONTEXT_BYTES[device],
    )


def activation_bytes(
    shape: ModelShape, *, train: TrainConfig, trained: Trained, batch: BatchSize, device: str = "cuda", checkpointing: bool = False
) -> int:
    """What the backward pass reads of the layers.

    A decoder layer whose input has a gradient keeps, in the order of the forward pass,

    - the norms' float32 inputs, two of 4 D S, and 8 S each;
    - the inputs of linear layers that train: e D S for queries, keys and values together, e D S for gate and up together, e F S for
      down, e A S for the output projection where the attention's output is put together from several groups. Adapted layers keep R
      numbers per token more, and with dropout each an input of its own and a mask of one byte per number. In stage 3, linear layers
      that do not train keep their inputs, too;
    - queries, keys and values as they were before they are clamped e (A + 2 A') S, with A' for the key heads, if they are;
    - queries, keys, values and outputs of the attention 4 e A X, and 4 H X;
    - gate, its activation and up 3 e F S.

    Below the lowest trained layer nothing is kept. The last layer's MLP reads only the tokens that predict evaluated ones, K of S,
    and keeps its result e D K, unless the objective steers a layer. Beside the layers there are the final norm's input and, once, the
    rotary angles, 8 S per number of a head. With recomputation a layer keeps its input e D S only.
    """
    kept = _kept_by_layer(shape, train=train, trained=trained, batch=batch, device=device, trims=not checkpointing)
    if not any(kept):
        return 0
    rest = (8 * shape.head_size + 4 * shape.hidden + 8) * batch.tokens
    if checkpointing:
        return _DTYPE_BYTES[train.engine.dtype] * shape.hidden * batch.tokens * shape.layers + rest
    return sum(kept) + rest


def layer_workspace_bytes(
    shape: ModelShape, *, train: TrainConfig, trained: Trained, batch: BatchSize, device: str = "cuda", checkpointing: bool = False
) -> int:
    """What the backward pass through one layer needs at once: gradients of the MLP 2 e F S.

    Adapters that are wider than the model add a float32 product, 6 F S, and on a GPU dropout draws float32 numbers, 4 F S. With
    recomputation one layer at a time keeps what it would have kept, and its MLP reads all tokens in the last layer, too.
    """
    kept = _kept_by_layer(shape, train=train, trained=trained, batch=batch, device=device, trims=False)
    if not any(kept):
        return 0
    size = _DTYPE_BYTES[train.engine.dtype]
    per_number = 2 * size
    if train.lora is not None:
        per_number += 6 * (_trained_bytes(train) > size) + 4 * (train.lora.lora_dropout > 0 and device == "cuda")
    return per_number * shape.intermediate * batch.tokens + (max(kept) if checkpointing else 0)


def _kept_by_layer(shape: ModelShape, *, train: TrainConfig, trained: Trained, batch: BatchSize, device: str, trims: bool) -> list[int]:
    """What each decoder layer keeps; ``trims`` says whether the last one's MLP may be computed at fewer tokens."""
    whole = _keeping(train, tokens=batch.tokens, device=device)
    few = replace(whole, tokens=min(batch.evaluated, batch.tokens))
    trims = trims and Need.ACTIVATIONS not in needs(train.objective)
    enters, kept = trained.embedding, []
    for index, names in enumerate(trained.layers):
        mlp = few if trims and index == len(trained.layers) - 1 else whole
        kept.append(_layer_bytes(shape, names=names, enters=enters, keeping=whole, mlp=mlp, batch=batch))
        enters = enters or kept[-1] > 0
    return kept


@dataclass(frozen=True)
class _Keeping:
    """How linear layers keep their inputs: bytes per number, tokens, bytes per token of an adapter's product, bytes per number of a
    dropout mask (0 without dropout), and whether weights are sharded."""

    size: int
    tokens: int
    low: int
    mask: int
    sharded: bool

    def inputs(self, names: Mapping[str, int], *linear: str, width: int, live: bool, owned: bool = True) -> int:
        """Bytes that layers with a common input keep of it.

        Args:
            names: modules that train.
            linear: the layers.
            width: of their input.
            live: whether the input has a gradient.
            owned: whether nobody else keeps it.
        """
        number = sum(name in names for name in linear)
        # DeepSpeed's own linear function keeps its input whether or not the weight trains; the fused one keeps masks in any case.
        keeps = live if self.sharded and self.mask else number > 0 or (live and self.sharded)
        total = number * self.low * self.tokens + self.size * width * self.tokens * (keeps and owned and not self._replaced)
        if self.mask:
            total += number * (self.size + self.mask * (live or not self.sharded)) * width * self.tokens
        return total

    @property
    def _replaced(self) -> bool:
        """Whether dropout's results take the inputs' place."""
        return self.mask > 0 and not self.sharded


def _keeping(train: TrainConfig, *, tokens: int, device: str) -> _Keeping:
    size, sharded = _DTYPE_BYTES[train.engine.dtype], train.engine.name == "deepspeed" and train.engine.stage == 3
    if train.lora is None:
        return _Keeping(size=size, tokens=tokens, low=0, mask=0, sharded=sharded)
    # peft's own dropout, which sharded weights need, multiplies by numbers on a CPU.
    mask = 0 if train.lora.lora_dropout == 0 else size if sharded and device == "cpu" else 1
    return _Keeping(size=size, tokens=tokens, low=train.lora.r * _trained_bytes(train), mask=mask, sharded=sharded)


def _trained_bytes(train: TrainConfig) -> int:
    """Per trained number, as forward passes read it: peft makes adapters float32, DeepSpeed casts them to the model's dtype."""
    return 4 if train.engine.name == "torch" else _DTYPE_BYTES[train.engine.dtype]


def _layer_bytes(shape: ModelShape, *, names: Mapping[str, int], enters: bool, keeping: _Keeping, mlp: _Keeping, batch: BatchSize) -> int:
    """What one decoder layer keeps; ``enters`` says whether its input has a gradient, ``names`` what it trains."""
    size, tokens, positions = keeping.size, batch.tokens, batch.positions
    attention, hidden, inner = shape.heads * shape.head_size, shape.hidden, shape.intermediate
    norm = (2 * shape.norms + 8) * tokens  # half of them before the attention, half after
    total = norm if enters else 0
    total += keeping.inputs(names, *_ATTENTION, width=hidden, live=enters)
    live = [enters or name in names for name in _ATTENTION]
    if shape.clips:
        heads = (shape.heads, shape.kv_heads, shape.kv_heads)
        total += sum(size * number * shape.head_size * tokens for number, lives in zip(heads, live, strict=True) if lives)
    attends = any(live)
    if attends:
        total += (4 * size * attention + 4 * shape.heads) * positions
    joined = batch.groups > 1 or positions > tokens
    total += keeping.inputs(names, "o_proj", width=attention, live=attends, owned=joined or not attends)
    middle = enters or attends or "o_proj" in names
    total += norm if middle else 0
    total += mlp.inputs(names, *_MLP, width=hidden, live=middle)
    gate, up = (middle or name in names for name in _MLP)
    # The activation's gradient reads gate, the product's reads up for the gate's side and the activation for up's.
    total += size * inner * mlp.tokens * (2 * gate + up)
    total += mlp.inputs(names, "down_proj", width=inner, live=gate or up)
    if mlp is not keeping and (gate or up or "down_proj" in names):
        total += size * hidden * mlp.tokens  # what is put back among the other tokens
    others = names.keys() - {*_ATTENTION, "o_proj", *_MLP, "down_proj"}
    return total + sum(keeping.inputs(names, name, width=names[name], live=True) for name in others)


def vocabulary_bytes(shape: ModelShape, *, train: TrainConfig, trained: Trained, batch: BatchSize) -> int:
    """What the backward pass reads per evaluated token: the label's embedding e D K and the mean embedding 4 D K; where the head
    trains also the hidden state e D K, and with a reference the mean embedding under its distribution 4 D K'."""
    size = _DTYPE_BYTES[train.engine.dtype]
    total = (size + 4) * shape.hidden * batch.evaluated
    return total + (size * batch.evaluated + 4 * batch.compared) * shape.hidden * trained.head


def head_workspace_bytes(shape: ModelShape, *, train: TrainConfig, trained: Trained, batch: BatchSize, device: str = "cuda") -> int:
    """What the sweep over the vocabulary needs at once.

    Logits of C tokens, as many as ``CHUNK_BYTES`` hold, become probabilities in place: 4 V C. In bfloat16 a GPU makes a copy for
    the product with the head, 2 V C; a CPU widens the head, 4 V D. Beside them lie the hidden states, e D S of all tokens.

    A head that trains needs for its gradient the sum over chunks 4 V D and a chunk's product 4 V D (the finished gradient is among
    the gradients); a copy of the chunk in bfloat16, and of the product on a CPU, 2 V D; and with a reference the chunk's
    probabilities under its distribution 4 V C, on a CPU its head widened, 4 V D.
    """
    size, is_gpu = _DTYPE_BYTES[train.engine.dtype], device == "cuda"
    if not batch.segment:
        return 0
    rows = min(batch.segment, max(1, CHUNK_BYTES[device] // (4 * shape.vocabulary)))
    rebuilds = trained.head and batch.compared > 0
    narrow = size < 4
    chunk = rows * shape.vocabulary * (4 + 4 * rebuilds + 2 * (narrow and (is_gpu or trained.head)))
    widened = 4 * shape.head * (1 + rebuilds) if narrow and not is_gpu else 0
    gradient = shape.head * (8 + 2 * (narrow and not is_gpu)) if trained.head else 0
    return chunk + widened + gradient + size * shape.hidden * batch.tokens


def reference_bytes(shape: ModelShape, *, train: TrainConfig, trained: Trained, batch: BatchSize) -> int:
    """4 D K' for the mean embeddings of the compared tokens; where the head trains e D K' for hidden states and e V D for their head."""
    if not batch.compared:
        return 0
    size = _DTYPE_BYTES[train.engine.dtype]
    return size * (shape.hidden * batch.compared + shape.head) if trained.head else 4 * shape.hidden * batch.compared


def fits(estimate: MemoryEstimate, *, capacity_bytes: float) -> bool:
    """Whether the peak leaves ``KEPT_FREE`` of a device."""
    return estimate.total <= (1 - KEPT_FREE) * capacity_bytes


def needs_checkpointing(*, plain: MemoryEstimate, recomputed: MemoryEstimate, capacity_bytes: float) -> bool:
    """Whether activations must be recomputed: only if they do not fit, and only if recomputing them makes the peak lower."""
    return not fits(plain, capacity_bytes=capacity_bytes) and recomputed.total < plain.total


def describe_memory(estimate: MemoryEstimate) -> str:
    """``13.9 GiB per rank: weights 12.8, optimizer 0.9, ...``: what rounds to nothing is left out; MiB for what is small."""
    unit, name = (GIB, "GiB") if estimate.total >= GIB else (2**20, "MiB")
    parts = ", ".join(f"{part} {size / unit:.1f}" for part, size in estimate.parts.items() if size / unit >= 0.05)
    return f"{estimate.total / unit:.1f} {name} per rank: {parts}"

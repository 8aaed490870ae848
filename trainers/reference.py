"""What the frozen target says about every training row: computed once per sweep, cached on disk, shared by all trials.

The reference of NPO, KL and their relatives depends on target and rows only. Cached are

- log-probabilities of scored tokens, a few bytes per token (NPO, DPO);
- with a frozen head one vector per token, its mean embedding, which gives KL(reference || model) exactly without logits, head product
  or reference model; with a trained head the last hidden state and one copy of the head, which give the same;
- activations of one layer (RMU).

Each is a folder of its own under a key of all that determines it, so trials that need the same share it.

Shape suffixes: N evaluated or scored tokens of some rows, M tokens, R rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainers.data.batches import batches_by_length
from trainers.data.encode import EncodedRow
from trainers.data.packing import pack
from trainers.engine.local import adapters_off
from trainers.files import atomic_folder, read_json, sha256_json, write_json
from trainers.scoring import ScoringModel
from trainers.vocabulary import ReferenceDistributions

BATCH_TOKENS = 4096


class Part(StrEnum):
    """One cached quantity of one set of rows."""

    FORGET_LOG_PROBS = "forget_log_probs"
    ALTERNATIVE_LOG_PROBS = "alternative_log_probs"
    FORGET_DISTRIBUTIONS = "forget_distributions"
    RETAIN_DISTRIBUTIONS = "retain_distributions"
    FORGET_NORMS = "forget_norms"
    """Mean norm of a layer's output over each row's tokens."""
    RETAIN_ACTIVATIONS = "retain_activations"

    @property
    def side(self) -> str:
        """The set it belongs to: forget, alternative or retain."""
        return self.value.partition("_")[0]


@dataclass(frozen=True)
class ReferenceRequest:
    """What a trial needs of the reference.

    Args:
        parts: the cached quantities.
        trains_head: whether the trial moves the head, which decides the form of distributions.
        layer: the decoder layer of norms and activations.
    """

    parts: frozenset[Part]
    trains_head: bool = False
    layer: int | None = None


@dataclass(frozen=True)
class RowValues:
    """Values of a set's rows, laid end to end.

    Args:
        start: first value of each row, and their number at the end.
        tensors: named values of shape (total, ...), on the CPU, where processes of one machine share the pages of the file.
    """

    start: tuple[int, ...]
    tensors: Mapping[str, Tensor]

    def of(self, name: str, rows: Sequence[int], *, device: str) -> Tensor:
        """Some rows' values, in the order given."""
        spans = [np.arange(self.start[row], self.start[row + 1]) for row in rows]
        index = torch.from_numpy(np.concatenate(spans) if spans else np.zeros(0, dtype=np.int64))
        return self.tensors[name].index_select(0, index).to(device, non_blocking=True)


@dataclass(frozen=True)
class Reference:
    """The parts that a trial asked for, and the frozen head where its own head is trained."""

    parts: Mapping[Part, RowValues]
    head_VD: Tensor | None = None

    def log_probs(self, part: Part, rows: Sequence[int], *, device: str) -> Tensor:
        """log p_reference(label) of some rows' scored tokens, float32, nats, shape (N,)."""
        return self.parts[part].of("log_prob", rows, device=device)

    def distributions(self, part: Part, rows: Sequence[int], *, device: str) -> ReferenceDistributions:
        """Next-token distributions at some rows' evaluated tokens."""
        values = self.parts[part]

        def take(name: str) -> Tensor | None:
            return values.of(name, rows, device=device) if name in values.tensors else None

        hidden_ND = take("hidden")
        return ReferenceDistributions(
            negative_entropy_N=values.of("negative_entropy", rows, device=device),
            mean_embedding_ND=take("mean_embedding"),
            hidden_ND=hidden_ND,
            head_VD=None if hidden_ND is None or self.head_VD is None else self.head_VD.to(device),
        )

    def activations(self, rows: Sequence[int], *, device: str) -> Tensor:
        """The layer's outputs at some retain rows' tokens, shape (M, D)."""
        return self.parts[Part.RETAIN_ACTIVATIONS].of("activations", rows, device=device)

    def forget_norms(self) -> Tensor:
        """Mean norm of the layer's output of each forget row, shape (R,)."""
        return self.parts[Part.FORGET_NORMS].tensors["norm"]


def part_key(part: Part, *, request: ReferenceRequest, rows: Sequence[EncodedRow], target_hash: str, dtype: str) -> str:
    """A name for everything that determines a part's values: target weights, token ids, evaluated positions, dtype, layer, form."""
    shown = [(row.input_ids, row.num_prompt, row.evaluate_from, row.num_padding) for row in rows]
    form: dict[str, Any] = {}
    if part in (Part.FORGET_DISTRIBUTIONS, Part.RETAIN_DISTRIBUTIONS):
        form["trains_head"] = request.trains_head
    if part in (Part.FORGET_NORMS, Part.RETAIN_ACTIVATIONS):
        form["layer"] = request.layer
    return sha256_json({"version": 2, "part": part.value, "target": target_hash, "rows": shown, "dtype": dtype, **form})[:16]


def obtain_reference(
    model: ScoringModel,
    *,
    request: ReferenceRequest,
    rows: Mapping[str, Sequence[EncodedRow]],
    target_hash: str,
    dtype: str,
    pad_token_id: int,
    root: Path,
    device: str,
) -> Reference:
    """The parts of the reference that are asked for; those not cached yet are computed first, by the same model with adapters off.

    Args:
        model: the target, with or without adapters; nothing of it may have been trained yet.
        request: what is needed.
        rows: encoded rows by side (``forget``, ``alternative``, ``retain``).
        target_hash: hash of the target's weights.
        dtype: of the weights in memory.
        pad_token_id: of the tokenizer.
        root: folder of the cache.
        device: where the pass is computed.
    """
    folders = part_folders(request=request, rows=rows, target_hash=target_hash, dtype=dtype, root=root)
    missing = {part for part, folder in folders.items() if not _is_complete(folder)}
    for side in sorted({part.side for part in missing}):
        wanted = {part for part in missing if part.side == side}
        computed = compute_parts(model, parts=wanted, request=request, rows=rows[side], pad_token_id=pad_token_id, device=device)
        for part, values in computed.items():
            # Another trial may have written it in the meantime; replacing it would pull it away from under a reader.
            if not _is_complete(folders[part]):
                _save(folders[part], values)
    needs_head = request.trains_head and any(part.value.endswith("distributions") for part in request.parts)
    return Reference(
        parts={part: _load(folder) for part, folder in folders.items()},
        head_VD=model.head_weight.detach().clone() if needs_head else None,
    )


def part_folders(
    *, request: ReferenceRequest, rows: Mapping[str, Sequence[EncodedRow]], target_hash: str, dtype: str, root: Path
) -> dict[Part, Path]:
    """Where each requested part lies, or will lie."""
    keys = {part: part_key(part, request=request, rows=rows[part.side], target_hash=target_hash, dtype=dtype) for part in request.parts}
    return {part: Path(root) / f"{part.value}-{key}" for part, key in keys.items()}


def is_cached(*, request: ReferenceRequest, rows: Mapping[str, Sequence[EncodedRow]], target_hash: str, dtype: str, root: Path) -> bool:
    """Whether every requested part is there, so that nothing has to be computed."""
    folders = part_folders(request=request, rows=rows, target_hash=target_hash, dtype=dtype, root=root)
    return all(_is_complete(folder) for folder in folders.values())


def compute_parts(
    model: ScoringModel,
    *,
    parts: set[Part],
    request: ReferenceRequest,
    rows: Sequence[EncodedRow],
    pad_token_id: int,
    device: str,
    batch_tokens: int = BATCH_TOKENS,
) -> dict[Part, RowValues]:
    """One teacher-forced pass of the target (adapters off) over one set's rows."""
    model.to(device)
    found: dict[Part, list[dict[str, Tensor]]] = {part: [{}] * len(rows) for part in parts}
    layer = request.layer if parts & {Part.FORGET_NORMS, Part.RETAIN_ACTIVATIONS} else None
    with adapters_off(model):
        for group in batches_by_length(rows, batch_tokens=batch_tokens):
            batch = pack([rows[index] for index in group], pad_token_id=pad_token_id, max_groups=model.max_groups).to(device)
            observed = model.observe(batch, layer=layer)
            measured, hidden_ND, activations_SD = observed.measured, observed.hidden_ND, observed.activations_SD
            assert measured.mean_embedding_ND is not None
            # sum_v q_v log q_v = sum_v q_v z_v - lse, and the first is h . c.
            entropy_N = (hidden_ND.to(measured.mean_embedding_ND) * measured.mean_embedding_ND).sum(dim=1) - measured.log_normaliser_N
            for position, index in enumerate(group):
                own = slice(batch.first_evaluated[position], batch.first_evaluated[position + 1])
                first, length = batch.row_spans[position]
                for part in parts:
                    if part in (Part.FORGET_LOG_PROBS, Part.ALTERNATIVE_LOG_PROBS):
                        scored = batch.scored_of(position, position + 1)
                        values = measured.log_prob_N[own]
                        tensors = {"log_prob": values if scored is None else values.index_select(0, scored)}
                    elif part in (Part.FORGET_DISTRIBUTIONS, Part.RETAIN_DISTRIBUTIONS):
                        tensors = {"negative_entropy": entropy_N[own]}
                        if request.trains_head:
                            tensors["hidden"] = hidden_ND[own]
                        else:
                            tensors["mean_embedding"] = measured.mean_embedding_ND[own]
                    else:
                        assert activations_SD is not None
                        values = activations_SD[first : first + length]
                        if part is Part.FORGET_NORMS:
                            tensors = {"norm": values.float().norm(dim=1).mean()[None]}
                        else:
                            tensors = {"activations": values}
                    found[part][index] = {name: value.detach().cpu() for name, value in tensors.items()}
    return {part: _lay_out(values) for part, values in found.items()}


def _lay_out(rows: Sequence[dict[str, Tensor]]) -> RowValues:
    start = [0]
    for row in rows:
        start.append(start[-1] + len(next(iter(row.values()))))
    names = rows[0] if rows else {}
    return RowValues(tuple(start), {name: torch.cat([row[name] for row in rows]).contiguous() for name in names})


def _save(folder: Path, values: RowValues) -> None:
    """Write one part atomically, its manifest last."""
    from safetensors.torch import save_file

    with atomic_folder(folder) as temporary:
        save_file(dict(values.tensors), temporary / "values.safetensors")
        write_json(temporary / "manifest.json", {"schema_version": 2, "start": values.start})


def _is_complete(folder: Path) -> bool:
    return (folder / "manifest.json").exists()


def _load(folder: Path) -> RowValues:
    from safetensors.torch import load_file

    return RowValues(tuple(read_json(folder / "manifest.json")["start"]), load_file(folder / "values.safetensors"))

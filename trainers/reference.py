"""What the frozen target says about every training row: computed once, cached on disk, shared by all trials.

Shape suffixes: N scored tokens of all rows of a set, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainers.data.batches import batches_by_length, collate
from trainers.data.encode import EncodedRow
from trainers.engine.local import adapters_off
from trainers.files import atomic_folder, read_json, sha256_json, write_json
from trainers.objectives.log_probs import token_log_probs
from trainers.scoring import ScoringModel


@dataclass(frozen=True)
class ReferenceSide:
    """Reference quantities of one set's rows, concatenated in row order.

    Args:
        start: first scored token of each row, and the total at the end.
        token_log_probs_N: log p_reference(label), float32, nats.
        hidden_ND: last hidden states; with the frozen head they give the reference distribution exactly.
    """

    start: tuple[int, ...]
    token_log_probs_N: Tensor
    hidden_ND: Tensor | None

    def log_probs_of(self, rows: Sequence[int]) -> Tensor:
        """Reference log-probabilities of some rows' scored tokens, in the order given."""
        return _take(self.token_log_probs_N, start=self.start, rows=rows)

    def hidden_of(self, rows: Sequence[int]) -> Tensor:
        """Reference hidden states of some rows' scored tokens, shape (N, D)."""
        assert self.hidden_ND is not None, "hidden states are cached for the retain set only"
        return _take(self.hidden_ND, start=self.start, rows=rows)


@dataclass(frozen=True)
class Reference:
    """Reference quantities of both sets, and the frozen head that turns hidden states into logits."""

    forget: ReferenceSide
    retain: ReferenceSide
    head_VD: Tensor

    def retain_logits(self, rows: Sequence[int]) -> Tensor:
        """Reference logits at some retain rows' scored tokens, shape (N, V), without a forward pass of the reference."""
        return self.retain.hidden_of(rows).to(self.head_VD) @ self.head_VD.T


def _take(values: Tensor, *, start: Sequence[int], rows: Sequence[int]) -> Tensor:
    parts = [values[start[row] : start[row + 1]] for row in rows]
    return torch.cat(parts) if parts else values[:0]


def reference_key(*, target_hash: str, forget: Sequence[EncodedRow], retain: Sequence[EncodedRow], dtype: str) -> str:
    """A name for everything that determines the cached values: target weights, token ids, scored positions, dtype."""
    rows = [[(row.input_ids, row.num_prompt) for row in side] for side in (forget, retain)]
    return sha256_json({"version": 1, "target": target_hash, "rows": rows, "dtype": dtype})[:16]


def compute_reference(
    model: ScoringModel, *, forget: Sequence[EncodedRow], retain: Sequence[EncodedRow], pad_token_id: int, batch_tokens: int, device: str
) -> Reference:
    """One teacher-forced pass of the target (adapters off) over all rows."""
    model.to(device)

    def side(rows: Sequence[EncodedRow], *, keep_hidden: bool) -> ReferenceSide:
        log_probs: list[Tensor] = [torch.zeros(0)] * len(rows)
        hidden: list[Tensor] = [torch.zeros(0)] * len(rows)
        for group in batches_by_length(rows, batch_tokens=batch_tokens):
            batch = collate([rows[index] for index in group], pad_token_id=pad_token_id).to(device)
            hidden_ND, logits_NV = model(batch)
            values_N = token_log_probs(logits_NV, label_N=batch.label_N).float().cpu()
            for position, index in enumerate(group):
                mine = (batch.row_N == position).cpu()
                log_probs[index] = values_N[mine]
                hidden[index] = hidden_ND.float().cpu()[mine] if keep_hidden else hidden[index]
        start = [0]
        for row in rows:
            start.append(start[-1] + row.num_scored)
        return ReferenceSide(
            start=tuple(start),
            token_log_probs_N=torch.cat(log_probs) if rows else torch.zeros(0),
            hidden_ND=(torch.cat(hidden) if rows else torch.zeros(0, model.causal_lm.config.hidden_size)) if keep_hidden else None,
        )

    with adapters_off(model):
        forget_side, retain_side = side(forget, keep_hidden=False), side(retain, keep_hidden=True)
        head_VD = model.causal_lm.get_output_embeddings().weight.detach().float().cpu().clone()
    return Reference(forget=forget_side, retain=retain_side, head_VD=head_VD)


def save_reference(folder: Path, reference: Reference) -> None:
    """Write the cache atomically, its manifest last."""
    from safetensors.torch import save_file

    with atomic_folder(folder) as temporary:
        assert reference.retain.hidden_ND is not None
        tensors = {
            "forget_token_log_probs": reference.forget.token_log_probs_N,
            "retain_token_log_probs": reference.retain.token_log_probs_N,
            "retain_hidden": reference.retain.hidden_ND,
            "head": reference.head_VD,
        }
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary / "reference.safetensors")
        write_json(
            temporary / "manifest.json",
            {"schema_version": 1, "forget_start": reference.forget.start, "retain_start": reference.retain.start},
        )


def load_reference(folder: Path, *, device: str) -> Reference | None:
    """The cached reference, or None where there is none yet."""
    from safetensors.torch import load_file

    if not (Path(folder) / "manifest.json").exists():
        return None
    manifest: dict[str, Any] = read_json(Path(folder) / "manifest.json")
    tensors = load_file(Path(folder) / "reference.safetensors", device=device)
    return Reference(
        forget=ReferenceSide(tuple(manifest["forget_start"]), tensors["forget_token_log_probs"], None),
        retain=ReferenceSide(tuple(manifest["retain_start"]), tensors["retain_token_log_probs"], tensors["retain_hidden"]),
        head_VD=tensors["head"],
    )

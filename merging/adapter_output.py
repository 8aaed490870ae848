"""A merge written as a LoRA adapter in peft's layout: exact where the merged update has low rank, truncated where it has not."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merging.config import MergeConfig
from merging.merge import MANIFEST, SCHEMA_VERSION, check_out_apart, check_request, merge_notes, plugin_record
from merging.task_vectors import TaskVector, open_task_vector
from merging.tensor_store import open_base
from trainers.errors import InputError
from trainers.files import atomic_folder, sha256_file, weights_hash, write_json
from trainers.modeling import check_model_folder

if TYPE_CHECKING:
    from torch import Tensor

    from merging.combine import Merged
    from merging.methods.low_rank import LowRank

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
EXACT_SIZE = 1024
"""Up to this many rows or columns the singular value decomposition is exact; beyond, it is randomised."""
OVERSAMPLING = 32
POWER_ITERATIONS = 4
"""The merged updates' spectra fall slowly: with fewer iterations the kept energy is measurably below the best possible."""


@dataclass(frozen=True)
class Truncated:
    """The product of rank R nearest to a matrix.

    Args:
        left, right: factors, (m, R) and (R, n), float32.
        energy: squared norm of the matrix.
        lost: squared norm of what the product leaves out.
    """

    left: Tensor
    right: Tensor
    energy: float
    lost: float


def merge_adapter(
    *,
    base: Path,
    trials: Sequence[Path],
    out: Path,
    config: MergeConfig,
    rank: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Write the merge of LoRA trials as one LoRA adapter of their base, and say in its ``merge.json`` what it lost.

    Linear, task_arithmetic and slerp are sums of the trials' updates, so their factors side by side are the merge, at the sum of the
    ranks. seed and knots make factors themselves. Every other merged update has full rank and is cut off at ``rank`` by its singular
    values. ``out`` appears only when all of it is written.

    Args:
        base: the model folder that every trial started from.
        trials: trial or checkpoint folders with LoRA adapters.
        out: new folder; an earlier merge there is replaced.
        config: method and parameters; ``scale`` is part of the factors.
        rank: highest rank of a tensor's factors; null is what the method needs, or the sum of the trials' ranks where it makes no factors.
        progress: called with a line of text per tensor.

    Returns:
        The content of ``merge.json``; ``lost_energy`` is the lost share of the squared norm.

    Raises:
        InputError: if a trial holds full tensors, which no adapter can hold, or as in ``merging.merge.merge_checkpoint``.
    """
    import torch

    from merging.combine import check_vectors, combine, majority_sign, model_thresholds
    from merging.methods.low_rank import from_sides

    started = time.monotonic()
    base, out = Path(base), Path(out)
    check_request(base=base, trials=trials, out=out, config=config)
    if rank is not None and rank < 1:
        raise InputError(f"rank = {rank} must be 1 or more", where="rank")
    store = open_base(check_model_folder(base))
    vectors = [open_task_vector(base=base, trial=trial) for trial in trials]
    check_out_apart(out, inputs=[base, *(vector.folder for vector in vectors)])
    check_vectors(vectors, config=config)
    _check_factors(vectors)
    names = [name for name in store.tensors if any(name in vector.names for vector in vectors)]
    thresholds = majority = None
    with torch.no_grad():
        if config.method == "ties" and config.trim_scope == "model":
            thresholds = model_thresholds(vectors=vectors, density=config.density, trim_count=config.trim_count)
        if config.method == "ties" and config.zero_sum == "majority":
            majority = majority_sign(vectors=vectors, thresholds=thresholds, config=config)
        tensors: dict[str, dict[str, Any]] = {}
        factors: dict[str, LowRank] = {}
        for name in names:
            merged = combine(name, vectors=vectors, config=config, thresholds=thresholds, majority=majority)
            cut, transpose = _factors_of(name, merged=merged, vectors=vectors, config=config, rank=rank)
            factors[name] = from_sides(left=cut.left * config.scale, right=cut.right, transpose=transpose)
            tensors[name] = {
                "shape": list(merged.update.shape),
                "rank": factors[name].rank,
                "lost_energy": cut.lost / cut.energy if cut.energy else 0.0,
                "energy": cut.energy,
                "kept": list(merged.kept),
                "sign_conflicts": merged.conflicts,
                "norm_ratio": merged.norm_ratio,
            }
            if progress:
                progress(f"{len(tensors)}/{len(names)} {name}: rank {factors[name].rank}, {tensors[name]['lost_energy']:.1%} lost")
    energy = sum(stats["energy"] for stats in tensors.values())
    lost = sum(stats["lost_energy"] * stats["energy"] for stats in tensors.values())
    with atomic_folder(out) as folder:
        _write_adapter(folder, factors=factors, vectors=vectors, base=base)
        record = {
            "schema_version": SCHEMA_VERSION,
            "output": "adapter",
            "base": {"path": str(base), "hash": weights_hash(base), "bytes": store.num_bytes},
            "trials": [vector.describe() for vector in vectors],
            "config": config.model_dump(mode="json"),
            "weights": list(config.trial_weights(len(vectors))),
            "formula": config.formula(),
            **plugin_record(config),
            "arithmetic": "float32; factors of rank R nearest to the merged update, scale included",
            "notes": merge_notes(vectors, config=config),
            "rank": rank,
            "lost_energy": lost / energy if energy else 0.0,
            "files": {name: sha256_file(folder / name) for name in (ADAPTER, ADAPTER_CONFIG)},
            "tensors": tensors,
            "untouched": len(store.tensors) - len(tensors),
            "seconds": round(time.monotonic() - started, 3),
        }
        # Last: a folder with this file is complete.
        write_json(folder / MANIFEST, record)
    return record


def truncate(matrix: Tensor, *, rank: int, seed: int = 0) -> Truncated:
    """The nearest product of a rank, by singular values: exact in float64 for small matrices, randomised for large ones.

    Args:
        matrix: float32, shape (m, n).
        rank: R; more than min(m, n) is cut off there.
        seed: of the randomised decomposition.

    Source: Halko et al. 2011, https://arxiv.org/abs/0909.4061
    """
    import torch

    size = min(matrix.shape)
    rank = min(rank, size)
    energy = float(matrix.double().square().sum())
    if size <= max(EXACT_SIZE, 2 * rank):
        u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
        v = v.T
    else:
        # The library draws from the global generator.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            u, s, v = torch.svd_lowrank(matrix, q=min(rank + OVERSAMPLING, size), niter=POWER_ITERATIONS)
    left, right = u[:, :rank] * s[:rank], v[:, :rank].T
    # What is kept is an orthogonal projection, so its squared norm and that of the rest add up.
    lost = max(energy - float(s[:rank].double().square().sum()), 0.0)
    return Truncated(left=left.float(), right=right.float().contiguous(), energy=energy, lost=lost)


def truncate_product(left: Tensor, right: Tensor, *, rank: int | None) -> Truncated:
    """The same for a matrix that is a product, without forming it; as it is, if the rank allows it.

    Args:
        left, right: (m, K) and (K, n), float32.
        rank: R, or null for K.
    """
    import torch

    q_left, r_left = torch.linalg.qr(left.double())
    q_right, r_right = torch.linalg.qr(right.double().T)
    core = r_left @ r_right.T
    energy = float(core.square().sum())
    if rank is None or rank >= left.shape[1]:
        return Truncated(left=left, right=right, energy=energy, lost=0.0)
    u, s, v = torch.linalg.svd(core, full_matrices=False)
    lost = float(s[rank:].square().sum())
    return Truncated(left=(q_left @ (u[:, :rank] * s[:rank])).float(), right=(v[:rank] @ q_right.T).float(), energy=energy, lost=lost)


def _factors_of(
    name: str, *, merged: Merged, vectors: Sequence[TaskVector], config: MergeConfig, rank: int | None
) -> tuple[Truncated, bool]:
    """The factors of one merged update, and whether the base stores it transposed."""
    import torch

    from merging.methods.slerp import arc_coefficients

    weights = config.trial_weights(len(vectors))
    found = [(weight, vector.factors(name)) for weight, vector in zip(weights, vectors, strict=True)]
    pairs = [(weight, pair) for weight, pair in found if pair is not None]
    transpose = pairs[0][1].transpose
    if merged.factors is not None:
        return truncate_product(merged.factors.left, merged.factors.right, rank=rank), transpose
    if config.method == "slerp":
        zero = torch.zeros_like(merged.update)
        arc = arc_coefficients(updates=[zero if pair is None else pair.dense() for _, pair in found], weights=weights)
        pairs = [(factor, pair) for factor, (_, pair) in zip(arc, found, strict=True) if pair is not None]
    elif config.method == "linear":
        pairs = [(weight / sum(weights), pair) for weight, pair in pairs]
    elif config.method != "task_arithmetic":
        wanted = rank or sum(pair.rank for _, pair in pairs)
        return truncate(merged.update, rank=wanted), transpose
    left = torch.cat([pair.left * factor for factor, pair in pairs], dim=1)
    right = torch.cat([pair.right for _, pair in pairs], dim=0)
    return truncate_product(left, right, rank=rank), transpose


def _check_factors(vectors: Sequence[TaskVector]) -> None:
    for vector in vectors:
        whole = sorted(name for name, rank in vector.ranks().items() if rank is None)
        if whole:
            kind = "is a full checkpoint" if vector.kind == "full" else f"stores tensor {whole[0]} whole"
            raise InputError(
                f"trial {vector.trial} {kind}, and an adapter cannot hold that",
                where=str(vector.folder),
                why=f"{len(whole)} of its tensors have no factors",
                fix="write the merge as a model: --output model",
            )


def _write_adapter(folder: Path, *, factors: dict[str, LowRank], vectors: Sequence[TaskVector], base: Path) -> None:
    """``adapter_model.safetensors`` and ``adapter_config.json`` as peft reads them, with a scaling of 1."""
    from safetensors.torch import save_file

    embeddings = {name for vector in vectors if vector.adapter for name, pair in vector.adapter.factors.items() if "embedding" in pair.a}
    tensors: dict[str, Tensor] = {}
    modules: dict[str, int] = {}
    for name, pair in factors.items():
        module = name.removesuffix(".weight")
        modules[module] = pair.rank
        keys = ("lora_embedding_A", "lora_embedding_B") if name in embeddings else ("lora_A.weight", "lora_B.weight")
        for key, value in zip(keys, (pair.a, pair.b), strict=True):
            tensors[f"{PREFIX}{module}.{key}"] = value.contiguous()
    common = Counter(modules.values()).most_common(1)[0][0]
    pattern = {module: rank for module, rank in modules.items() if rank != common}
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
    write_json(
        folder / ADAPTER_CONFIG,
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(base),
            "inference_mode": True,
            "r": common,
            "lora_alpha": common,
            # alpha = rank everywhere: the factors carry every scale.
            "rank_pattern": pattern,
            "alpha_pattern": pattern,
            "target_modules": sorted(modules),
            "fan_in_fan_out": any(pair.transpose for name, pair in factors.items() if name not in embeddings),
            "lora_dropout": 0.0,
            "bias": "none",
            "init_lora_weights": True,
            "use_rslora": False,
        },
    )

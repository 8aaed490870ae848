"""Merge trials into a checkpoint on disk, streamed one tensor at a time over the base file."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merging.config import MergeConfig
from merging.methods.table import METHODS
from merging.task_vectors import TaskVector, all_finite, open_task_vector
from merging.tensor_store import INDEX, Rewritten, TensorStore, header_hash, open_base, rewrite_shards, tensor_bytes
from trainers.errors import InputError, RunError, SetupError
from trainers.files import atomic_folder, check_writable, read_json, sha256_file, sha256_json, write_json
from trainers.modeling import check_model_folder

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "merge.json"
SCHEMA_VERSION = 1
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
RECORDS = (
    "manifest.json",
    MANIFEST,
    "README.md",
    "eval.json",
    "validation.json",
    "eval-rows.jsonl",
    "validation-rows.jsonl",
    "training_args.bin",
)
"""Files that speak of the base alone, and would be false beside the merged weights."""
DISK_MARGIN = 64 << 20
MAX_WORKERS = 4
"""Each holds a few copies of a tensor."""


def merge_checkpoint(
    *,
    base: Path,
    trials: Sequence[Path],
    out: Path,
    config: MergeConfig,
    progress: Callable[[str], None] | None = None,
    device: str | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """Write ``base + scale * merge(trial - base, ...)`` as a model folder, and say in its ``merge.json`` how.

    Updates are formed and merged in float32 and rounded once, to the base's dtype. Tensors that no trial changes keep their bytes, the
    shard files their headers, the other files of the base (configuration, tokenizer, index) are copied. ``out`` appears only when all of
    it is written. Memory: a few float32 copies of the largest tensor per worker.

    Args:
        base: the model folder that every trial started from.
        trials: trial or checkpoint folders, LoRA adapters or full weights.
        out: new folder; an earlier merge there is replaced.
        config: method and parameters.
        progress: called with a line of text per tensor.
        device: where the arithmetic is done; null takes a GPU if there is one. A GPU adds in another order, so that about one weight in a
            million is rounded the other way.
        workers: tensors under way at the same time; null takes one per core, four at most.

    Returns:
        The content of ``merge.json``.

    Raises:
        InputError: if the inputs do not fit each other, hold values that are not finite, or ``out`` is in use. Nothing is left in ``out``.
        SetupError: if the disk is too small.
    """
    from merging.combine import check_vectors

    started = time.monotonic()
    device, workers = (
        device or _device(),
        workers or min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1, MAX_WORKERS),
    )
    base, out = Path(base), Path(out)
    check_request(base=base, trials=trials, out=out, config=config)
    store = open_base(check_model_folder(base))
    # The base is hashed while it is read for the merge, which is the only time: a trial of another base is found out at the end.
    vectors = [open_task_vector(base=base, trial=trial, check_base=False) for trial in trials]
    check_out_apart(out, inputs=[base, *(vector.folder for vector in vectors)])
    check_vectors(vectors, config=config)
    copied = [file for file in sorted(base.iterdir()) if _is_copied(file)]
    _check_disk(out, needed=store.num_bytes + sum(file.stat().st_size for file in copied))

    with atomic_folder(out) as folder:
        tensors, rewritten = _write_weights(
            store=store, vectors=vectors, config=config, folder=folder, progress=progress, device=device, workers=workers
        )
        base_hash = sha256_json(rewritten.sources)
        for vector in vectors:
            vector.check_base(base_hash, base=base)
        for file in copied:
            shutil.copyfile(file, folder / file.name)
        record = {
            "schema_version": SCHEMA_VERSION,
            "base": {"path": str(base), "hash": base_hash, "bytes": store.num_bytes},
            "trials": [vector.describe() for vector in vectors],
            "config": config.model_dump(mode="json"),
            "weights": list(config.trial_weights(len(vectors))),
            "formula": config.formula(),
            **plugin_record(config),
            "arithmetic": "float32 on dense updates (B @ A for adapters), rounded once to the base's dtype",
            "notes": merge_notes(vectors, config=config),
            "shards": {shard.name: {"bytes": shard.stat().st_size, "header": header_hash(shard)} for shard in store.shards},
            "files": {file.name: sha256_file(folder / file.name) for file in copied},
            "tensors": {name: {**stats, "sha256": rewritten.tensors[name]} for name, stats in tensors.items()},
            "untouched": len(store.tensors) - len(tensors),
            "changed_weights": sum(stats["changed_weights"] for stats in tensors.values()),
            "device": device,
            "seconds": round(time.monotonic() - started, 3),
            "peak_rss_bytes": _peak_rss(),
        }
        # Last: a folder with this file is complete.
        write_json(folder / MANIFEST, record)
        verify_merge(folder, contents=False)
    return record


def verify_merge(out: Path, *, contents: bool = True) -> dict[str, Any]:
    """Compare a merged folder with the plan in its ``merge.json``: files, headers, index and, if asked, the bytes of every merged tensor.

    Returns:
        The content of ``merge.json``.

    Raises:
        RunError: at the first difference, naming file or tensor.
        InputError: if the folder holds no merge.
    """
    out = Path(out)
    record = read_json(out / MANIFEST)
    for name, plan in record["shards"].items():
        if not (out / name).exists() or (out / name).stat().st_size != plan["bytes"] or header_hash(out / name) != plan["header"]:
            raise RunError(
                f"shard {name} is not the one that was planned", where=str(out), why="its size or header differs", fix="merge again"
            )
    store = open_base(out)
    if len(store.tensors) != len(record["tensors"]) + record["untouched"]:
        raise RunError(f"the merged model has {len(store.tensors)} tensors, not those of its base", where=str(out), fix="merge again")
    for name, digest in record["files"].items():
        if not (out / name).exists() or (contents and sha256_file(out / name) != digest):
            raise RunError(f"file {name} is not the base's", where=str(out), fix="merge again")
    if contents:
        for name, plan in record["tensors"].items():
            if hashlib.sha256(tensor_bytes(store.read(name))).hexdigest() != plan["sha256"]:
                raise RunError(f"tensor {name} does not hold the merged values", where=str(out), why="the file changed", fix="merge again")
    return record


def _write_weights(
    *,
    store: TensorStore,
    vectors: Sequence[TaskVector],
    config: MergeConfig,
    folder: Path,
    progress: Callable[[str], None] | None,
    device: str,
    workers: int,
) -> tuple[dict[str, dict[str, Any]], Rewritten]:
    import torch

    from merging.combine import add_update, combine, count_changed, majority_sign, model_thresholds

    names = [name for name in store.tensors if any(name in vector.names for vector in vectors)]
    thresholds = None
    if config.method == "ties" and config.trim_scope == "model":
        if progress:
            progress("finding the thresholds of the whole task vectors")
        thresholds = model_thresholds(vectors=vectors, density=config.density, device=device, trim_count=config.trim_count)
    majority = None
    if config.method == "ties" and config.zero_sum == "majority":
        majority = majority_sign(vectors=vectors, thresholds=thresholds, config=config, device=device)
    tensors: dict[str, dict[str, Any]] = {}
    meter = Meter(total_bytes=sum(store.tensors[name].num_bytes for name in names), say=progress)

    @torch.no_grad()
    def replacement(name: str, stored: Tensor) -> Tensor:
        before = stored.to(device)
        merged = combine(name, vectors=vectors, config=config, thresholds=thresholds, majority=majority, device=device)
        after = add_update(before, update=merged.update, scale=config.scale)
        if not all_finite(after):
            raise InputError(
                f"the merged tensor {name} is not finite in {str(after.dtype).removeprefix('torch.')}",
                where=f"trials {', '.join(vector.trial for vector in vectors)}",
                fix="lower the scale or the weights",
            )
        changed = count_changed(before, after)
        tensors[name] = {
            "shape": list(before.shape),
            "kept": list(merged.kept),
            "sign_conflicts": merged.conflicts,
            "norm_ratio": merged.norm_ratio,
            "changed_weights": changed,
        }
        meter.add(store.tensors[name].num_bytes, what=f"{name}: {changed / max(after.numel(), 1):.0%} of the weights changed")
        return after.cpu()

    rewritten = rewrite_shards(store=store, folder=folder, names=names, replacement=replacement, workers=workers)
    return {name: tensors[name] for name in names}, rewritten


class Meter:
    """Lines of progress: bytes done, bytes in all, and the time that the rest will take at the speed so far.

    Args:
        total_bytes: of everything that is to be done.
        say: called with each line; null for silence.
        clock: seconds.
    """

    def __init__(self, *, total_bytes: int, say: Callable[[str], None] | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._say, self._clock = total_bytes, say, clock
        self._done, self._started = 0, clock()
        self._lock = threading.Lock()

    def add(self, num_bytes: int, *, what: str) -> None:
        """So many bytes more are done; threads may call this."""
        with self._lock:
            self._done += num_bytes
            seconds = self._clock() - self._started
            rest = seconds * (self._total - self._done) / self._done if self._done else 0.0
            if self._say:
                self._say(f"{self._done / 2**20:,.0f} of {self._total / 2**20:,.0f} MiB, {rest:.0f} s to go; {what}")


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def check_request(*, base: Path, trials: Sequence[Path], out: Path, config: MergeConfig) -> None:
    """Refuse what can be refused without opening a file of the trials.

    Raises:
        InputError: naming the trial, setting or folder.
    """
    if not trials:
        raise InputError("no trial to merge", fix="name at least one trial or checkpoint folder")
    try:
        config.trial_weights(len(trials))
    except ValueError as error:
        raise InputError(
            str(error), where="trials and weights", fix="name as many trials as the method merges, and one weight for each, in order"
        ) from None
    if out.exists() and not out.is_dir():
        raise InputError("the output is a file", where=str(out), fix="name a new folder")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).exists():
        raise InputError(
            "the output folder is not empty and holds no earlier merge",
            where=str(out),
            why="only a folder with merge.json is replaced",
            fix="name a new folder, or empty this one",
        )
    check_out_apart(out, inputs=[base, *map(Path, trials)])
    check_writable(out)


def check_out_apart(out: Path, *, inputs: Sequence[Path]) -> None:
    """Raises InputError if writing the output folder would overwrite an input."""
    target = out.resolve()
    for path in inputs:
        if path.resolve().is_relative_to(target):
            raise InputError(
                f"the output folder is or contains the input {path}", where=str(out), why="it would be overwritten", fix="name another"
            )


def _check_disk(out: Path, *, needed: int) -> None:
    existing = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed + DISK_MARGIN:
        raise SetupError(
            f"the disk has {free / 2**30:.1f} GiB free, but the merge writes {needed / 2**30:.1f} GiB",
            where=str(existing),
            fix="free space or name an output folder on another disk",
        )


def _is_copied(file: Path) -> bool:
    if not file.is_file() or file.name in RECORDS or file.name.startswith("."):
        return False
    if file.name.endswith(".index.json"):
        # An index of pickled or other weights would point at files that are not copied.
        return file.name == INDEX and not (file.parent / "model.safetensors").exists()
    return not file.name.endswith(WEIGHT_SUFFIXES)


def plugin_record(config: MergeConfig) -> dict[str, Any]:
    """File and content hash of the plugin that brought the method, under ``plugin``; empty for a built-in one."""
    plugin = METHODS[config.method].plugin
    return {} if plugin is None else {"plugin": dict(plugin)}


def merge_notes(vectors: Sequence[TaskVector], *, config: MergeConfig) -> list[str]:
    """What a reader of the record should know about the trials."""
    notes = [
        f"{vector.trial} is stored in {', '.join(vector.details['dtypes'])}: its task vector carries the rounding of every weight"
        for vector in vectors
        if vector.details.get("rounded")
    ]
    seeds = [vector.details.get("seed") for vector in vectors]
    if config.method == "seed" and len(vectors) > 1 and (None in seeds or len(set(seeds)) > 1):
        told = ", ".join(f"{vector.trial}: {'unknown' if seed is None else seed}" for vector, seed in zip(vectors, seeds, strict=True))
        notes.append(
            f"factors were merged apart, which has a meaning only for trials that started from the same factor A, but their seeds differ "
            f"or are unknown ({told})"
        )
    return notes


def _peak_rss() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

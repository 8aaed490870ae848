"""Task vectors: what a trial added to the target's weights, one float32 tensor at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merging.adapters import Adapter, deciding_settings, open_adapter
from merging.tensor_store import MERGEABLE, TensorStore, open_base
from trainers.errors import InputError
from trainers.files import read_json, sha256_file, sha256_json, weights_hash

if TYPE_CHECKING:
    from torch import Tensor

    from merging.methods.low_rank import LowRank

_COMPARED = 1 << 18
"""Elements compared at a time: the widened copies stay in the cache."""


@dataclass(frozen=True)
class TaskVector:
    """Trial weights minus target weights.

    ``names`` are the base tensors that the trial changes, in the base's file order.
    """

    trial: str
    folder: Path
    kind: str
    names: tuple[str, ...]
    details: dict[str, Any]
    read: Callable[[str, str], Tensor]
    target_hash: str | None = None
    """Hash of the weights that the trial started from, where it recorded one."""
    adapter: Adapter | None = None
    """The factors, if it is an adapter."""

    def update(self, name: str, *, device: str = "cpu") -> Tensor:
        """The update of one base tensor, float32, in the base's shape; computed on ``device``.

        Raises:
            KeyError: if the trial does not change the tensor.
            InputError: if it holds a value that is not finite, naming tensor and trial.
        """
        if name not in self.names:
            raise KeyError(f"trial {self.trial} does not change {name}")
        update = self.read(name, device)
        check_finite(update, name=name, trial=self.trial, folder=self.folder)
        return update

    def factors(self, name: str, *, device: str = "cpu") -> LowRank | None:
        """The float32 factors whose product is the update of one base tensor, on ``device``; null if the tensor is stored whole."""
        return None if self.adapter is None or name not in self.adapter.factors else _low_rank(self.adapter, name, device)

    def ranks(self) -> dict[str, int | None]:
        """The rank of each changed tensor's factors; null for tensors that are stored whole."""
        factors = self.adapter.factors if self.adapter else {}
        return {
            name: self.adapter.store.tensors[factors[name].a].shape[0] if self.adapter and name in factors else None for name in self.names
        }

    def check_base(self, found: str, *, base: Path) -> None:
        """Compare the base's hash (see ``weights_hash``) with the one that the trial recorded.

        Raises:
            InputError: if the trial started from other weights.
        """
        if self.target_hash and self.target_hash != found:
            raise InputError(
                "the trial was trained from another target",
                where=f"trial {self.trial}, {self.folder / 'manifest.json'}: target_hash = {self.target_hash[:12]}…",
                why=f"the weights of {base} have the hash {found[:12]}…, so trial minus base is not what the trial learned",
                fix="give --base the model that the trial started from",
            )

    def describe(self) -> dict[str, Any]:
        """Name, folder, kind, content hash and what decides the update, for records."""
        return {"trial": self.trial, "path": str(self.folder), "kind": self.kind, "tensors": len(self.names), **self.details}

    @property
    def content_hash(self) -> str:
        """SHA-256 over the stored tensors and the settings that decide the update."""
        return self.details["hash"]


def open_task_vector(*, base: Path, trial: Path, name: str | None = None, check_base: bool = True) -> TaskVector:
    """Open a trial's update for streaming; everything but the arithmetic is checked here.

    Args:
        base: the model folder that the trial started from (its target).
        trial: a trial folder (its newest complete checkpoint is taken) or a checkpoint folder, with a LoRA adapter or full weights.
        name: what records and messages call it; null takes the trial folder's name.
        check_base: whether the base's bytes are compared with those that the trial recorded now, or later by ``TaskVector.check_base``.

    Raises:
        InputError: if the trial was trained from other weights, if a tensor is missing, extra, mis-shaped or not finite, or if the
            adapter's kind is not understood.
    """
    base, folder = Path(base), resolve_checkpoint(trial)
    name, store = name or trial_name(folder), open_base(base)
    recorded = _check_manifest(folder, trial=name)
    tied = _tied_names(base)
    if (folder / "adapter_config.json").exists():
        vector = _open_lora(folder, store=store, trial=name, tied=tied)
    else:
        vector = _open_full(folder, store=store, trial=name)
    vector = replace(vector, target_hash=recorded)
    if check_base and recorded:
        vector.check_base(weights_hash(base), base=base)
    return vector


def resolve_checkpoint(trial: Path) -> Path:
    """The checkpoint folder that a trial path stands for.

    Raises:
        InputError: if it holds neither weights nor a complete checkpoint.
    """
    trial = Path(trial)
    if not trial.is_dir():
        what = "a file where a trial folder is expected" if trial.exists() else "trial folder not found"
        raise InputError(what, where=str(trial), fix="give a trial folder or one of its checkpoints")
    if _has_weights(trial):
        return trial
    runs = sorted(folder for folder in (trial / "trials").glob("*") if folder.is_dir())
    if len(runs) == 1:  # what `unlearn train` writes: a run of one trial
        return resolve_checkpoint(runs[0])
    if runs:
        raise InputError(
            f"a run of {len(runs)} trials where one trial is expected", where=str(trial), fix=f"give one of them, such as {runs[0]}"
        )
    found = [folder for folder in (trial / "checkpoints").glob("*") if (folder / "manifest.json").exists() and _has_weights(folder)]
    if not found:
        raise InputError(
            "the trial has no complete checkpoint",
            where=str(trial),
            why="a checkpoint counts when it has weights beside its manifest.json",
            fix="give a folder with adapter_model.safetensors or model.safetensors, or let the trial finish",
        )
    return max(found, key=lambda folder: (_step(folder), folder.name))


def trial_name(folder: Path) -> str:
    """A short name for messages and records: the trial's folder for a checkpoint inside one, else the folder itself."""
    folder = Path(folder).absolute()
    return folder.parent.parent.name if folder.parent.name == "checkpoints" else folder.name


def checkpoint_hash(folder: Path) -> str:
    """SHA-256 of what a checkpoint's update depends on: its tensors and, for an adapter, the settings that scale them."""
    settings = None
    if (Path(folder) / "adapter_config.json").exists():
        settings = deciding_settings(read_json(Path(folder) / "adapter_config.json"))
    return sha256_json({"tensors": weights_hash(folder), "settings": settings})


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite; one pass without a copy, because the extremes of a tensor with a NaN are NaN."""
    if not values.numel():
        return True
    return all(bool(extreme.isfinite()) for extreme in values.aminmax())


def check_finite(values: Tensor, *, name: str, trial: str, folder: Path) -> None:
    """Raises InputError naming tensor and trial if a value is NaN or infinite."""
    if not all_finite(values):
        count = int((~values.isfinite()).sum())
        raise InputError(
            f"{count} of {values.numel()} values of tensor {name} are not finite",
            where=f"trial {trial}, {folder}",
            why="a merge would spread them over the whole model",
            fix="leave this trial out, or take an earlier checkpoint of it",
        )


def _has_weights(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists() or any(folder.glob("model*.safetensors"))


def _step(folder: Path) -> int:
    digits = "".join(letter for letter in folder.name if letter.isdigit())
    return int(digits) if digits else -1


def _check_manifest(folder: Path, *, trial: str) -> str | None:
    """A checkpoint must hold the bytes that were written; returns the hash of the weights that it started from, if it names one."""
    path = folder / "manifest.json"
    if not path.exists():
        return None
    manifest = read_json(path)
    if not isinstance(manifest, dict):
        raise InputError("the checkpoint's manifest is not an object", where=f"trial {trial}, {path}", fix="take another checkpoint")
    name, digest = manifest.get("weights_file"), manifest.get("weights_sha256")
    if name and digest and (folder / name).exists() and sha256_file(folder / name) != digest:
        raise InputError(
            "the checkpoint's weights are not those that were written",
            where=f"trial {trial}, {folder / name}",
            why="their SHA-256 differs from the one in manifest.json: the file was cut off or changed",
            fix="copy the checkpoint again, or take an earlier one of the trial",
        )
    return manifest.get("target_hash")


def _tied_names(base: Path) -> frozenset[str]:
    """Embedding tensors that the model also uses as its head."""
    config = read_json(base / "config.json") if (base / "config.json").exists() else {}
    if not config.get("tie_word_embeddings"):
        return frozenset()
    return frozenset(
        {"model.embed_tokens.weight", "transformer.wte.weight", "gpt_neox.embed_in.weight", "model.decoder.embed_tokens.weight"}
    )


def _check_mergeable(name: str, *, store: TensorStore, trial: str) -> None:
    dtype = store.tensors[name].dtype
    if dtype not in MERGEABLE:
        raise InputError(
            f"tensor {name} is stored as {dtype}, which an update cannot be added to", where=f"trial {trial}, base {store.folder}"
        )


def _open_lora(folder: Path, *, store: TensorStore, trial: str, tied: frozenset[str]) -> TaskVector:
    adapter = open_adapter(folder, base=store, trial=trial, tied=tied)
    for key in adapter.store.tensors:
        # Factors are small: looking at them now stops a broken trial before the first byte is written.
        check_finite(adapter.store.read(key), name=key, trial=trial, folder=folder)
    # peft may save an embedding whole without having trained it.
    full = {name for name, key in adapter.full.items() if _differs(adapter.store.read(key), store.read(name))}
    for name in sorted(full & tied):
        raise InputError(
            f"tensor {name} is tied to the output head, but the adapter saved it alone",
            where=f"trial {trial}, {folder}",
            why="a merged weight would change the head too",
        )
    names = tuple(name for name in store.tensors if name in adapter.factors or name in full)
    for name in names:
        _check_mergeable(name, store=store, trial=trial)
    details = {
        "hash": checkpoint_hash(folder),
        "ranks": sorted({adapter.store.tensors[factors.a].shape[0] for factors in adapter.factors.values()}),
        "scales": sorted({factors.scale for factors in adapter.factors.values()}),
        "full_tensors": sorted(full),
        "seed": _train_seed(folder),
    }
    trained = Adapter(adapter.store, adapter.factors, {name: key for name, key in adapter.full.items() if name in full})
    return TaskVector(trial, folder, "lora", names, details, functools.partial(_read_lora, adapter, store), adapter=trained)


def _read_lora(adapter: Adapter, store: TensorStore, name: str, device: str) -> Tensor:
    import torch

    if name in adapter.full:
        return adapter.store.read(adapter.full[name]).to(device, torch.float32) - store.read(name).to(device, torch.float32)
    return _low_rank(adapter, name, device).dense()


def _low_rank(adapter: Adapter, name: str, device: str) -> LowRank:
    import torch

    from merging.methods.low_rank import LowRank

    factors = adapter.factors[name]
    a, b = (adapter.store.read(key).to(device, torch.float32) for key in (factors.a, factors.b))
    return LowRank(a=a, b=b, scale=factors.scale, transpose=factors.transpose)


def _train_seed(folder: Path) -> int | None:
    """The seed that a checkpoint's manifest records, or null."""
    manifest = read_json(folder / "manifest.json") if (folder / "manifest.json").exists() else {}
    train = manifest.get("train") if isinstance(manifest, dict) else None
    return train.get("seed") if isinstance(train, dict) else None


def _open_full(folder: Path, *, store: TensorStore, trial: str) -> TaskVector:
    saved = open_base(folder)
    where = f"trial {trial}, {folder}"
    for verb, names in (("lacks", set(store.tensors) - set(saved.tensors)), ("has", set(saved.tensors) - set(store.tensors))):
        if names:
            also = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(
                f"the checkpoint {verb} tensor {min(names)}{also}, "
                + ("which the base has" if verb == "lacks" else "which the base lacks"),
                where=where,
                why=f"base: {store.folder}",
                fix="give the base that the trial was trained on",
            )
    changed = []
    for name, tensor in store.tensors.items():
        other = saved.tensors[name]
        if other.shape != tensor.shape:
            raise InputError(f"tensor {name} has shape {list(other.shape)}, but the base has {list(tensor.shape)}", where=where)
        values = saved.read(name)
        if _differs(values, store.read(name)):
            _check_mergeable(name, store=store, trial=trial)
            check_finite(values, name=name, trial=trial, folder=folder)
            changed.append(name)
    if not changed:
        raise InputError("the checkpoint is equal to the base in every tensor", where=where, why="there is nothing to merge")
    dtypes = sorted({saved.tensors[name].dtype for name in changed})
    details = {"hash": checkpoint_hash(folder), "dtypes": dtypes, "rounded": dtypes != ["F32"], "seed": _train_seed(folder)}
    return TaskVector(trial, folder, "full", tuple(changed), details, functools.partial(_read_full, saved, store))


def _differs(new: Tensor, old: Tensor) -> bool:
    """Whether two tensors of one shape differ in value, whatever their dtypes; ends with the first block that does."""
    import torch

    if new.dtype == old.dtype:
        return not torch.equal(new, old)
    # Every value of the narrower types is one of the wider type's, so widening loses nothing.
    wider = torch.promote_types(new.dtype, old.dtype)
    wider = wider if wider.is_floating_point and wider.itemsize > 2 else torch.float64
    return any(
        not torch.equal(one.to(wider), other.to(wider))
        for one, other in zip(new.reshape(-1).split(_COMPARED), old.reshape(-1).split(_COMPARED), strict=True)
    )


def _read_full(saved: TensorStore, store: TensorStore, name: str, device: str) -> Tensor:
    import torch

    return saved.read(name).to(device, torch.float32) - store.read(name).to(device, torch.float32)

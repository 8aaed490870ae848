"""Checkpoints that resume exactly: weights, portable optimizer state, and a manifest that is written last."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.config import LoraConfig, TrainConfig
from trainers.engine.base import TrainingState
from trainers.errors import InputError
from trainers.files import OPTIMIZER, atomic_folder, read_json, sha256_file, sha256_json, write_json
from trainers.modeling import model_skeleton, torch_dtype
from trainers.patience import patient

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"
ADAPTER = "adapter_model.safetensors"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SPREADING_KEYS = ("engine.name", "engine.zero_stage", "engine.ranks", "per_device_train_batch_size", "activation_checkpointing")
"""Settings that may change when a trial resumes. The dtype may not: it changes every number."""
_STEP = re.compile(r"step-(\d+)$")


def checkpoint_folder(trial: Path, *, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return Path(trial) / "checkpoints" / f"step-{step:06d}"


def finished_checkpoints(trial: Path) -> list[Path]:
    """Checkpoints of a trial that have a manifest, in the order of their steps."""
    root = Path(trial) / "checkpoints"
    folders = root.glob("step-*") if root.is_dir() else ()
    return sorted(folder for folder in folders if _STEP.search(folder.name) and (folder / MANIFEST).exists())


@dataclass(frozen=True)
class Export:
    """Weights to publish in place of the trained ones.

    Args:
        record: what the manifest says about it.
        weight: the weight to publish, float32, from a trained parameter's name and value.
    """

    record: dict[str, Any]
    weight: Callable[[str, Tensor], Tensor]


class StoredTensors:
    """The tensors of a model folder's safetensors files by name, mapped into memory rather than read.

    Raises:
        InputError: if the weights cannot be read.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._opened: dict[Path, Any] = {}
        single = self.folder / WEIGHTS
        if single.exists():
            self._files = dict.fromkeys(self._open(single).keys(), single)
        else:
            self._files = {name: self.folder / file for name, file in read_json(self.folder / INDEX)["weight_map"].items()}

    @property
    def names(self) -> tuple[str, ...]:
        """All names."""
        return tuple(self._files)

    def __getitem__(self, name: str) -> Tensor:
        check_stored([name], stored=self)
        return self._open(self._files[name]).get_tensor(name)

    def _open(self, file: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        if file not in self._opened:
            try:
                self._opened[file] = safe_open(str(file), framework="pt")
            except (SafetensorError, OSError) as error:
                raise InputError(f"the target's weights cannot be read: {error}", where=str(file), fix="copy the file again") from error
        return self._opened[file]


def check_stored(names: Iterable[str], *, stored: StoredTensors) -> None:
    """Refuse a model whose files know its parameters under other names: a checkpoint could not be completed from them.

    Raises:
        InputError: naming the first parameter that the files do not hold.
    """
    absent = sorted(set(names) - set(stored.names))
    if absent:
        raise InputError(
            f"the target's files hold no tensor {absent[0]}",
            where=str(stored.folder),
            why="they store the model's parameters under other names, so that trained and frozen ones cannot be put together",
            fix="train with lora",
        )


def check_finite(folder: Path | str) -> None:
    """Refuse a target with a value that is no number: every loss would be none either.

    Raises:
        InputError: naming the first such tensor.
    """
    stored = StoredTensors(folder)
    broken = [name for name in stored.names if not bool(stored[name].isfinite().all())]
    if broken:
        raise InputError(
            f"{len(broken)} of the target's {len(stored.names)} tensors are not finite, the first is {broken[0]}",
            where=str(folder),
            why="every loss computed with it would be nan",
            fix="copy the model's files again, or name another model",
        )


def negated_export(*, train: TrainConfig, base: Path | str, scale: float) -> Export:
    """Task-vector negation: publish the target minus ``scale`` times what training added to it.

    For adapters lora_B times -scale, so that the update is -scale * B @ A. For the model's own parameters
    theta_0 - scale * (theta - start), in float32, with theta_0 read from the target one tensor at a time; start is theta_0 as the
    trial loaded it, rounded to ``train.engine.dtype``, so that this rounding is not taken for an update.

    Source: Ilharco et al. 2022, https://arxiv.org/abs/2212.04089
    """
    record = {"method": "task_vector_negation", "scale": scale}
    if train.lora is not None:
        return Export(record, lambda name, value: value * -scale if ".lora_B." in name else value)
    target = StoredTensors(base)
    dtype = torch_dtype(train.engine.dtype)

    def negated(name: str, value: Tensor) -> Tensor:
        before = target[name]
        return before.float() - scale * (value - before.to(dtype).float())

    return Export(record, negated)


def adapter_targets(names: Iterable[str], *, base: Path | str) -> list[str]:
    """``target_modules`` with which peft places adapters exactly where the factors of these names are.

    The last parts of the modules' names where those reach no other module of the base, else the full names.
    """
    adapted = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in names}
    short = {module.rsplit(".", 1)[-1] for module in adapted}
    reached = {module for module, _ in model_skeleton(base).named_modules() if module.rsplit(".", 1)[-1] in short}
    return sorted(short if reached == adapted else adapted)


def whole_model(weights: dict[str, Tensor], *, train: TrainConfig, base: Path | str) -> dict[str, Tensor]:
    """The tensors of a complete model: the trained ones, and for the rest those of the base, mapped, in its dtype.

    The names are those of the base's files; where these store a tied embedding under both of its names, both get the trained one.

    Raises:
        InputError: if the base stores a trained parameter under another name.
    """
    stored = StoredTensors(base)
    if train.trainable.everything and not set(weights) <= set(stored.names):
        return weights  # complete by themselves
    check_stored(weights, stored=stored)
    first: dict[int, str] = {}
    parameters = model_skeleton(base).named_parameters(remove_duplicate=False)
    tied_to = {name: first.setdefault(id(parameter), name) for name, parameter in parameters}
    tensors = {}
    for name in stored.names:
        other = tied_to.get(name, name)
        if name in weights:
            tensors[name] = weights[name]
        elif other in weights and stored[name].equal(stored[other]):  # else transformers does not tie them
            # A copy: safetensors refuses two names of one tensor in memory.
            tensors[name] = weights[other].clone()
        else:
            tensors[name] = stored[name]
    return tensors


def adapter_config(lora: LoraConfig, *, target_modules: list[str], base: str) -> dict[str, Any]:
    """peft's adapter_config.json for adapters whose names we know."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": target_modules,
        "use_rslora": lora.use_rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


@patient
def save_checkpoint(
    trial: Path,
    *,
    state: TrainingState,
    train: TrainConfig,
    facts: dict[str, Any],
    model_files: Path,
    export: Export | None = None,
) -> Path:
    """Write one checkpoint atomically; only rank 0 calls it.

    A LoRA checkpoint holds float32 adapters that plain peft loads; any other one a whole model with the configuration and
    tokenizer of ``model_files``, float32 where it was trained. The optimizer state is unsharded, so that any world size and
    ZeRO stage can go on from it; older checkpoints of the trial lose theirs.

    Args:
        export: weights to publish instead of the trained ones, which then lie with the optimizer state, for resuming; they are in
            memory all at once.
    """
    from safetensors.torch import save_file

    def save(tensors: dict[str, Tensor], file: Path) -> None:
        save_file({name: value.contiguous() for name, value in tensors.items()}, file, metadata={"format": "pt"})

    path = checkpoint_folder(trial, step=state.optimizer_step)
    with atomic_folder(path) as folder:
        published = {name: export.weight(name, value) for name, value in state.weights.items()} if export else state.weights
        if train.lora is not None:
            save({name.replace(".default.", "."): value for name, value in published.items()}, folder / ADAPTER)
            modules = adapter_targets(published, base=model_files)
            write_json(folder / "adapter_config.json", adapter_config(train.lora, target_modules=modules, base=str(model_files)))
            weights_file = ADAPTER
        else:
            save(whole_model(published, train=train, base=model_files), folder / WEIGHTS)
            for file in Path(model_files).iterdir():
                if file.is_file() and file.suffix in (".json", ".txt", ".model", ".jinja") and not file.name.endswith(".index.json"):
                    (folder / file.name).write_bytes(file.read_bytes())
            # float32 holds every value of the narrower dtypes that frozen tensors may be stored in.
            config = read_json(folder / "config.json") | {"dtype": "float32"}
            config.pop("torch_dtype", None)
            write_json(folder / "config.json", config)
            weights_file = WEIGHTS
        resume = {f"{key}/{name}": value for key in ("exp_avg", "exp_avg_sq") for name, value in getattr(state, key).items()}
        if export:
            resume |= {f"weights/{name}": value for name, value in state.weights.items()}
        save(resume, folder / OPTIMIZER)
        write_json(
            folder / MANIFEST,
            {
                "schema_version": 1,
                "optimizer_step": state.optimizer_step,
                "optimizer_age": state.optimizer_age,
                "kind": "lora" if train.lora is not None else "full",
                "weights_file": weights_file,
                "weights_sha256": sha256_file(folder / weights_file),
                "trained": list(state.weights),
                "export": export.record if export else None,
                "train_hash": sha256_json(train.model_dump(mode="json")),
                "train": train.model_dump(mode="json"),
                "optimizer_sha256": sha256_file(folder / OPTIMIZER),
                **facts,
            },
        )
    for older in finished_checkpoints(trial):
        if older != path and older.name < path.name:
            (older / OPTIMIZER).unlink(missing_ok=True)
    return path


def load_checkpoint(folder: Path, *, train: TrainConfig, target_hash: str, rows_key: str | None = None) -> TrainingState:
    """The training state of a checkpoint: the trained parameters and their moments, whatever else its weights file holds.

    Raises:
        InputError: if it is damaged, cannot be resumed, or belongs to another configuration, other rows or another target.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    manifest = read_json(folder / MANIFEST)
    if manifest.get("target_hash") != target_hash:
        raise InputError(
            "the checkpoint was trained from another target model", where=str(folder), fix="start the trial in a new run folder"
        )
    if rows_key is not None and manifest.get("rows_key") != rows_key:
        raise InputError("the checkpoint was trained on other rows", where=str(folder), fix="start the trial in a new run folder")
    changed = changed_keys(manifest["train"], train.model_dump(mode="json"))
    # How a trial is spread over processes does not change what it computes.
    changed = [key for key in changed if key not in SPREADING_KEYS]
    if changed:
        raise InputError(
            f"the checkpoint was made with another configuration: {', '.join(changed)}", where=str(folder), fix="use a new run folder"
        )
    step = int(manifest["optimizer_step"])
    age = int(manifest.get("optimizer_age", step))
    exported = manifest.get("export") is not None
    weights_path = folder / manifest["weights_file"]
    try:
        if sha256_file(weights_path) != manifest["weights_sha256"]:
            raise InputError("the checkpoint's weights do not match its manifest", where=str(weights_path), fix="delete this checkpoint")
        resume = {}
        if (folder / OPTIMIZER).exists():
            if sha256_file(folder / OPTIMIZER) != manifest["optimizer_sha256"]:
                raise InputError(
                    "the optimizer state does not match the manifest", where=str(folder / OPTIMIZER), fix="delete this checkpoint"
                )
            resume = load_file(folder / OPTIMIZER)
        elif age > 0 or exported:
            raise InputError("the checkpoint holds no optimizer state and cannot be resumed", where=str(folder))
        weights = _under(resume, "weights") if exported else _trained(weights_path, manifest=manifest)
    except (SafetensorError, OSError) as error:
        raise InputError(f"the checkpoint cannot be read: {error}", where=str(folder), fix="delete this checkpoint") from error
    return TrainingState(
        optimizer_step=step,
        optimizer_age=age,
        weights=weights,
        exp_avg=_under(resume, "exp_avg"),
        exp_avg_sq=_under(resume, "exp_avg_sq"),
    )


def _under(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``part/``, without it."""
    return {name.removeprefix(f"{part}/"): value for name, value in tensors.items() if name.startswith(f"{part}/")}


def _trained(weights_path: Path, *, manifest: dict[str, Any]) -> dict[str, Tensor]:
    """The trained parameters in a weights file, under the model's own names."""
    from safetensors import safe_open

    with safe_open(str(weights_path), framework="pt") as file:
        names = list(file.keys())
        if manifest["kind"] == "lora":
            return {re.sub(r"\.(lora_[AB])\.weight$", r".\1.default.weight", name): file.get_tensor(name) for name in names}
        # Checkpoints from before the manifest named the trained parameters hold nothing else.
        return {name: file.get_tensor(name) for name in manifest.get("trained", names)}


def changed_keys(old: Any, new: Any, *, prefix: str = "") -> list[str]:
    """Dotted paths at which two nested configurations differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(set(old) | set(new)):
            found += changed_keys(old.get(key), new.get(key), prefix=f"{prefix}.{key}" if prefix else str(key))
        return found
    return [] if old == new else [prefix]

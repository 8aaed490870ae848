"""Loading, building and adapting causal language models."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.config import LoraConfig, TrainableConfig
from trainers.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FACTOR_NAMES = (".lora_A.default.weight", ".lora_B.default.weight")


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a configuration word."""
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def check_model_folder(path: Path | str) -> Path:
    """The folder of a model, after a look at what it holds.

    Raises:
        InputError: if it is missing, or holds no configuration, weights or tokenizer.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        what = "a file where a model folder is expected" if folder.exists() else "model folder not found"
        raise InputError(what, where=str(folder), fix="give a folder in Hugging Face layout: config.json, *.safetensors, tokenizer.json")
    names = {file.name for file in folder.iterdir()}
    if "config.json" not in names:
        raise InputError(
            "no config.json in the model folder",
            where=str(folder),
            why=f"found: {', '.join(sorted(names)[:12]) or 'nothing'}",
            fix="give a folder that save_pretrained wrote",
        )
    if not any(name.endswith(".safetensors") for name in names):
        raise InputError(
            "no .safetensors weights in the model folder",
            where=str(folder),
            why="pickled weights can run code when they are read, so they are not" if _pickled(names) else None,
            fix="convert pickled weights to safetensors first" if _pickled(names) else "copy the weights into the folder",
        )
    if "tokenizer.json" not in names and "tokenizer_config.json" not in names:
        raise InputError("no tokenizer in the model folder", where=str(folder), fix="save the tokenizer beside the weights")
    return folder


def _pickled(names: set[str]) -> bool:
    return any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in names)


def load_model_config(path: Path | str) -> Any:
    """The configuration of a local model folder.

    Raises:
        InputError: if it cannot be read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(path), local_files_only=True)
    except Exception as error:
        raise InputError(
            f"the model's configuration cannot be read: {_first_line(error)}",
            where=str(Path(path) / "config.json"),
            fix="copy the file again; its model_type must be known to transformers",
        ) from error


def load_tokenizer(path: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder; padding falls back to the end token.

    Raises:
        InputError: if it cannot be read or has no end token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:
        raise InputError(
            f"the tokenizer cannot be read: {_first_line(error)}", where=str(path), fix="copy the tokenizer's files into the folder again"
        ) from error
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end token", where=str(path), fix="set eos_token in tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(path: Path | str, *, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
    """A causal language model of a local folder, in evaluation mode.

    Raises:
        InputError: if the folder does not hold a readable and complete checkpoint.
    """
    from transformers import AutoModelForCausalLM

    folder = check_model_folder(path)
    try:
        # The stub knows neither the pair that is returned nor the devices of `to`.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=torch_dtype(dtype), local_files_only=True, output_loading_info=True
        )
    except Exception as error:
        raise InputError(
            f"the checkpoint cannot be read: {_first_line(error)}",
            where=str(folder),
            fix="check that the folder was written completely and that its architecture is known to transformers",
        ) from error
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        # transformers would go on with random numbers in their place.
        raise InputError(
            f"the checkpoint lacks {len(missing)} of the model's tensors, the first is {missing[0]}",
            where=str(folder),
            fix="copy all of its .safetensors files, or correct config.json",
        )
    return model.eval().to(device)


def model_skeleton(path: Path | str) -> PreTrainedModel:
    """The model of a local folder without weights, on the meta device: its names, shapes and ties for the price of its configuration.

    Raises:
        InputError: if the configuration cannot be read.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = load_model_config(path)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def context_length(model_config: Any) -> int:
    """The longest row, in tokens, that a model was configured for."""
    return int(getattr(model_config, "max_position_embeddings", None) or 2048)


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder layers of a causal language model, lowest first: its outermost list of as many modules as the configuration says.

    Raises:
        InputError: if the architecture has no such list.
    """
    from torch import nn

    count = getattr(model.config, "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise InputError(
        f"the decoder layers of {type(model).__name__} were not found",
        why=f"it has no list of num_hidden_layers = {count} modules",
        fix="use an objective that steers no layer, and leave train.trainable.layers and last_layers at null",
    )


def layer_index(model: Any, *, layer: int | None, setting: str = "train.objective.layer") -> int:
    """A decoder layer's index from 0.

    Args:
        model: the model, or its number of decoder layers.
        layer: counted from 0; negative counts from the end, -1 being the last; None is a quarter of the way up, 7 of 32 layers.
        setting: where ``layer`` was given, for the message.

    Raises:
        InputError: if the model has no such layer.
    """
    count = model if isinstance(model, int) else len(decoder_layers(model))
    if layer is None:
        return max(0, count // 4 - 1)
    if not -count <= layer < count:
        raise InputError(
            f"decoder layer {layer} does not exist",
            where=f"{setting} = {layer}",
            why=f"the model has {count} decoder layers: 0 to {count - 1}, or -{count} to -1 from the end",
            fix="name one of them",
        )
    return layer % count


def select_trainable(model: Any, *, trainable: TrainableConfig) -> None:
    """Make exactly the parameters that a configuration names require gradients.

    Without a layer range ``modules`` are taken from the whole model; with one, from its layers only. ``embeddings`` adds all
    that lies outside the decoder layers, whatever ``modules`` says. A module stands for everything inside it. An embedding
    tied to the head is one parameter with it: naming either trains both.

    Raises:
        InputError: if the model has no such layer, or a name in ``modules`` matches nothing that could be trained.
    """
    if trainable.everything:
        model.requires_grad_(True)
        return
    chosen = list(_named_parameters_of(model, trainable=trainable))
    if trainable.embeddings:
        inside = {id(value) for value in decoder_layers(model).parameters()}
        chosen += [value for value in model.parameters() if id(value) not in inside]
    model.requires_grad_(False)
    for value in chosen:
        value.requires_grad_(True)


def _named_parameters_of(model: Any, *, trainable: TrainableConfig) -> Iterable[nn.Parameter]:
    """What ``modules`` and the layer range name together."""
    scope, where = _layers_in_range(model, trainable=trainable)
    if not trainable.modules:
        for module in scope.values():
            yield from module.parameters()
        return
    names = {name: module for root, top in scope.items() for name, module in top.named_modules(prefix=root) if _has_parameters(module)}
    for wanted in trainable.modules:
        found = [module for name, module in names.items() if name.rsplit(".", 1)[-1] == wanted]
        if not found:
            raise _nothing_called(wanted, model=model, known=names, where=where, trainable=trainable)
        for module in found:
            yield from module.parameters()


def _layers_in_range(model: Any, *, trainable: TrainableConfig) -> tuple[dict[str, nn.Module], str]:
    """The chosen decoder layers by name with their description, or the model itself."""
    if trainable.layers is None and trainable.last_layers is None:
        return {"": model}, "the model"
    layers = decoder_layers(model)
    count = len(layers)
    if trainable.last_layers is not None:
        if trainable.last_layers > count:
            raise InputError(
                f"the last {trainable.last_layers} decoder layers do not exist",
                where=f"train.trainable.last_layers = {trainable.last_layers}",
                why=f"the model has {count} decoder layers",
                fix=f"give a number up to {count}",
            )
        first, last = count - trainable.last_layers, count - 1
    else:
        assert trainable.layers is not None
        setting = f"train.trainable.layers: {list(trainable.layers)}, of which"
        first, last = (layer_index(count, layer=layer, setting=setting) for layer in trainable.layers)
        if first > last:
            raise InputError(
                f"decoder layers {first} to {last} are none",
                where=f"train.trainable.layers = {list(trainable.layers)}",
                why=f"the first must not lie above the last; the model has {count} decoder layers, 0 to {count - 1}",
                fix=f"use [{last}, {first}]",
            )
    prefix = next(name for name, module in model.named_modules() if module is layers)
    return {f"{prefix}.{index}": layers[index] for index in range(first, last + 1)}, f"decoder layers {first} to {last}"


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _nothing_called(wanted: str, *, model: Any, known: Iterable[str], where: str, trainable: TrainableConfig) -> InputError:
    """The message for a name that matches no module with parameters."""
    everywhere = [name for name, module in model.named_modules() if name.rsplit(".", 1)[-1] == wanted]
    last_parts = sorted({part for name in known if name and not (part := name.rsplit(".", 1)[-1]).isdigit()})
    near = difflib.get_close_matches(wanted, last_parts, n=1)
    if not everywhere:
        what, why = f"no module of the model is called {wanted!r}", f"there are {', '.join(last_parts)}"
        fix = f"did you mean {near[0]!r}?" if near else "name some of these"
    elif not any(_has_parameters(model.get_submodule(name)) for name in everywhere):
        what, why = f"the modules called {wanted!r} have no parameters", f"{everywhere[0]} has none"
        fix = f"leave it out; with parameters there are {', '.join(last_parts)}"
    else:
        what, why = f"no module called {wanted!r} lies in {where}", f"{everywhere[0]} lies elsewhere"
        fix = "leave it out, or set embeddings: true, which trains all that lies outside the decoder layers"
    return InputError(what, where=f"train.trainable.modules = {list(trainable.modules)}", why=why, fix=fix)


def enable_activation_checkpointing(model: Any) -> None:
    """Keep only the input of each decoder layer for the backward pass, and compute what lies inside a second time.

    Loss and gradients stay the same, dropout included. The layers are checkpointed without re-entering autograd, so that
    adapters train although no input of a frozen layer requires a gradient (with re-entry they would silently not,
    https://github.com/locuslab/open-unlearning/issues/178).

    Args:
        model: a causal language model, or a peft model around one.

    Raises:
        InputError: if the architecture does not support it.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    arguments = {"use_reentrant": False}
    try:
        if hasattr(inner, "activation_checkpointing_enable"):
            inner.activation_checkpointing_enable(activation_checkpointing_kwargs=arguments)
        else:  # its name in older releases of transformers
            inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    except ValueError as error:
        raise InputError(
            f"{type(inner).__name__} cannot recompute activations: {_first_line(error)}",
            where="train.activation_checkpointing = true",
            fix="set it to false and lower train.per_device_train_batch_size",
        ) from error
    if getattr(inner, "_require_grads_hook", None) is not None:
        # transformers asks for gradients of the embedding's output, which only re-entry needs; they would carry the backward
        # pass, and the recomputation, through every frozen layer below the trained ones.
        inner.disable_input_require_grads()


@contextlib.contextmanager
def scaled_adapters(model: Any, *, scale: float) -> Iterator[None]:
    """Inside, the update of every adapter counts ``scale`` times; a model without adapters is left as it is."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scaling.update({name: value * scale for name, value in layer.scaling.items()})
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)


def add_lora(model: PreTrainedModel, *, lora: LoraConfig, seed: int) -> Any:
    """Wrap a model in trainable float32 adapters whose initial values follow from the seed.

    Raises:
        InputError: if a target module does not exist in the model, or is not linear.
    """
    import torch
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(
                model,
                PeftLoraConfig(
                    r=lora.r,
                    lora_alpha=lora.lora_alpha,  # type: ignore[arg-type]  # peft takes fractions too
                    lora_dropout=lora.lora_dropout,
                    target_modules=targets,
                    use_rslora=lora.use_rslora,
                    task_type="CAUSAL_LM",
                ),
            )
        except (ValueError, re.error) as error:
            raise InputError(
                f"adapters cannot be added: {_first_line(error)}",
                where=f"train.lora.target_modules = {lora.target_modules!r}",
                fix="name linear modules of the model, for instance [q_proj, v_proj], or all-linear; a text is a regular expression "
                "for their full names, for instance '.*layers\\.(0|1)\\.mlp\\.down_proj'",
            ) from error
    odd = [name for name, value in adapted.named_parameters() if value.requires_grad and not name.endswith(_FACTOR_NAMES)]
    if odd:
        raise InputError(
            f"{odd[0].split('.lora_')[0]} is no linear module",
            where=f"train.lora.target_modules = {lora.target_modules!r}",
            why="checkpoints hold the adapters of linear modules only",
            fix="name linear modules of the model, for instance [q_proj, v_proj], or all-linear",
        )
    return adapted


def load_adapted_model(base: Path | str, checkpoint: Path | str, *, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
    """The model that a trial's checkpoint stands for: base plus adapter (added in float32), or the full weights.

    Raises:
        InputError: if the checkpoint holds neither an adapter nor a model.
    """
    checkpoint = Path(checkpoint)
    if (checkpoint / "adapter_config.json").exists():
        from peft import PeftModel

        model = load_model(base, dtype="float32", device=device)
        try:
            merged = PeftModel.from_pretrained(model, str(checkpoint)).merge_and_unload(safe_merge=True)
        except Exception as error:
            raise InputError(
                f"the adapter cannot be read: {_first_line(error)}",
                where=str(checkpoint),
                fix="copy the checkpoint again; where its update is not finite, train with a lower train.learning_rate",
            ) from error
        return merged.to(torch_dtype(dtype)).eval()
    return load_model(checkpoint, dtype=dtype, device=device)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

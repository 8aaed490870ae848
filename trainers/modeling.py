"""Loading, building and adapting causal language models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.config import LoraConfig
from trainers.errors import InputError

if TYPE_CHECKING:
    import torch
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


def context_length(model_config: Any) -> int:
    """The longest row, in tokens, that a model was configured for."""
    return int(getattr(model_config, "max_position_embeddings", None) or 2048)


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
        except ValueError as error:
            raise InputError(
                f"adapters cannot be added: {_first_line(error)}",
                where=f"train.lora.target_modules = {lora.target_modules!r}",
                fix="name linear modules of the model, for instance [q_proj, v_proj], or all-linear",
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
            raise InputError(f"the adapter cannot be read: {_first_line(error)}", where=str(checkpoint)) from error
        return merged.to(torch_dtype(dtype)).eval()
    return load_model(checkpoint, dtype=dtype, device=device)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

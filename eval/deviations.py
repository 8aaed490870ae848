"""How an evaluation differs from the benchmark's own script, in sentences for the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.config import EvalConfig
from eval.generate import altered_generation
from eval.mmlu import MmluData, as_pandas_reads
from eval.mmlu_accuracy import MmluResult


def list_deviations(
    *, model: Any, tokenizer: Any, config: EvalConfig, mmlu: MmluData | None, mmlu_result: MmluResult | None, outputs: Sequence[str]
) -> list[str]:
    """One sentence per difference that applies to this evaluation; the script meant is the final release (December 2024)."""
    found = []
    if not config.official:
        found += _fast_mode(model, tokenizer, config, mmlu, measured=mmlu_result is not None, outputs=outputs)
    elif any("\r" in output for output in outputs):
        found.append("Some generations hold a carriage return, on which the script's CSV files break; here they are scored as they are.")
    dtype = str(getattr(model, "dtype", config.dtype)).removeprefix("torch.")
    if dtype != "bfloat16":
        found.append(f"The model runs in {dtype}; the script always uses bfloat16.")
    if config.max_new_tokens != 256:
        found.append(f"At most {config.max_new_tokens} tokens are generated; the script's default is 256.")
    if mmlu_result is not None:
        found.append("MMLU runs in the type of the evaluation; the MMLU script uses the one in the checkpoint's config.json.")
        if config.mmlu_shots != 5:
            found.append(f"MMLU prompts have {config.mmlu_shots} solved examples; the MMLU script's default is 5.")
        limit = min(config.mmlu_max_prompt_tokens, int(getattr(model.config, "max_position_embeddings", None) or 2048))
        if limit != 2048:
            found.append(f"MMLU prompts are limited to {limit} tokens; the MMLU script's limit is 2048.")
    return found


def _fast_mode(
    model: Any, tokenizer: Any, config: EvalConfig, mmlu: MmluData | None, *, measured: bool, outputs: Sequence[str]
) -> list[str]:
    found = ["Rows run in padded batches instead of one at a time: losses and near ties of tokens may differ by rounding."]
    if not altered_generation(model):
        found.append("What teacher forcing shows to be generated anyway (a prefix of the gold answer) is not decoded again.")
        if config.stop_decided_questions:
            found.append("A question stops as soon as its text can no longer equal the answer: the score is the same, the text shorter.")
        configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ids = configured if isinstance(configured, (list, tuple)) else [configured]
        if tokenizer.eos_token_id not in ids:
            found.append("Generation also stops at the tokenizer's end token, which the generation configuration does not name.")
        found.append("Generation stops where the model's context is full; the script goes on.")
    found.append("Texts are not written to CSV and read back: an empty generation is scored as empty, not as the text 'nan'.")
    if measured and mmlu is not None:
        found.append("The solved examples of an MMLU subject run once and are shared by its questions: near ties may differ by rounding.")
        changed = sum(a != b for a, b in zip(mmlu.questions, as_pandas_reads(mmlu).questions, strict=True))
        if changed:
            found.append(f"{changed} MMLU questions keep a choice such as 'None' that the MMLU script reads as 'nan'.")
    return found

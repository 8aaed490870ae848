"""How an evaluation differs from the benchmark's own script, in sentences for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval.config import EvalConfig
from eval.generate import altered_generation
from eval.measure import AttackLosses
from eval.mia import count_not_finite
from eval.mmlu import MmluData, as_pandas_reads
from eval.mmlu_accuracy import MmluResult
from trainers.modeling import context_length


def list_deviations(*, model: Any, tokenizer: Any, config: EvalConfig, mmlu: MmluData | None, mmlu_result: MmluResult | None) -> list[str]:
    """One sentence per difference that is known before anything is scored; the script meant is the final release (December 2024),
    run in one process.

    Args:
        model: what is evaluated.
        tokenizer: its tokenizer.
        config: limits and mode.
        mmlu: the questions, or None.
        mmlu_result: their answers, or None.
    """
    found = []
    if config.official:
        found.append("Losses are summed in float64, the script's in float32: documents that are nearly equal may change places.")
        if mmlu_result is not None:
            found.append("MMLU prompts run alone; the MMLU script pads them to batches: near ties may differ by rounding.")
    else:
        found += _fast_mode(model, tokenizer, config, mmlu, measured=mmlu_result is not None)
    dtype = str(getattr(model, "dtype", config.dtype)).removeprefix("torch.")
    if dtype != "bfloat16":
        found.append(f"The model runs in {dtype}; the script always uses bfloat16.")
    if config.max_new_tokens != 256:
        found.append(f"At most {config.max_new_tokens} tokens are generated; the script's default is 256.")
    if mmlu_result is not None:
        found.append("MMLU runs in the type of the evaluation; the MMLU script uses the one in the checkpoint's config.json.")
        if config.mmlu_shots != 5:
            found.append(f"MMLU prompts have {config.mmlu_shots} solved examples; the MMLU script's default is 5.")
        limit = min(config.mmlu_max_prompt_tokens, context_length(model.config))
        if limit != 2048:
            found.append(f"MMLU prompts are limited to {limit} tokens; the MMLU script's limit is 2048.")
    return found


def _fast_mode(model: Any, tokenizer: Any, config: EvalConfig, mmlu: MmluData | None, *, measured: bool) -> list[str]:
    found = ["Rows run in batches instead of one at a time: losses and near ties of tokens may differ by rounding."]
    if not altered_generation(model):
        found.append("What teacher forcing shows to be generated anyway (a prefix of the gold answer) is not decoded again.")
        if config.stop_decided_questions:
            found.append("A question stops as soon as its text can no longer equal the answer: the score is the same, the text shorter.")
        if config.stop_decided_completions:
            found.append(
                "A completion of the forget set stops once it holds the whole reference: its recall stays 1, the text is shorter. "
                "Those of the retain set, from which the share of degenerate texts is read, are whole."
            )
        configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ids = configured if isinstance(configured, (list, tuple)) else [configured]
        if tokenizer.eos_token_id not in ids:
            found.append("Generation also stops at the tokenizer's end token, which the generation configuration does not name.")
        found.append("Generation stops where the model's context is full; the script goes on.")
    found.append("Texts are not written to CSV and read back: an empty one, or one such as 'None', is scored as it is, not as 'nan'.")
    if measured and mmlu is not None:
        found.append("The solved examples of an MMLU subject run once and are shared by its questions: near ties may differ by rounding.")
        changed = sum(a != b for a, b in zip(mmlu.questions, as_pandas_reads(mmlu).questions, strict=True))
        if changed:
            found.append(f"{changed} MMLU questions keep a choice such as 'None' that the MMLU script reads as 'nan'.")
    return found


def deviations_found(*, rows: Sequence[Mapping[str, Any]], attacked: AttackLosses | None, official: bool) -> list[str]:
    """The same for differences that only the measured values tell.

    Args:
        rows: of the report.
        attacked: the membership attack, or None.
        official: the mode.
    """
    found = []
    texts = (row[name] for row in rows if row["part"] == "task" for name in ("id", "input", "expected", "output"))
    if official and any("\r" in text for text in texts):
        found.append(
            "Some texts hold a carriage return: they are scored as Python 3.12.3 and later (3.11.9) write them to CSV; under an older one "
            "the rows of the script's files break apart and its scores are undefined."
        )
    lost = count_not_finite([*attacked.members, *attacked.nonmembers]) if attacked else 0
    if lost:
        found.append(f"{lost} attack documents have no finite loss; the script stops there and writes no result.")
    return found

"""What an evaluation measures with: names, defaults and units."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trainers.config import Frozen


class EvalConfig(Frozen):
    """Settings of one evaluation; the defaults are the benchmark's own, made fast."""

    max_new_tokens: int = Field(256, ge=1, description="tokens generated per row at most")
    batch_tokens: int = Field(8192, ge=1, description="positions per batch, padding included")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="type the caller loads the model in")
    mmlu_shots: int = Field(5, ge=0, description="solved examples before each MMLU question")
    mmlu_max_prompt_tokens: int = Field(2048, ge=16, description="an MMLU prompt drops its last example while it is longer")
    bootstrap_samples: int = Field(1000, ge=1, description="resamples behind every interval")
    bootstrap_seed: int = Field(0, ge=0)
    confidence: float = Field(0.95, gt=0, lt=1, description="coverage of the intervals")
    stop_decided_questions: bool = Field(
        True, description="stop decoding a question as soon as its text can no longer equal the answer; never in official mode"
    )
    stop_decided_completions: bool = Field(
        True,
        description="stop decoding a completion of the forget set as soon as it holds the whole reference; never in official mode",
    )
    official: bool = Field(
        False, description="one row at a time, every token decoded, text as it comes back from the benchmark's CSV files"
    )

"""What an evaluation on TOFU or MUSE measures with: names, defaults and units."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import Field

from trainers.config import Frozen


class PromptStyle(StrEnum):
    """How a question becomes a prompt."""

    PLAIN = "plain"
    """``Question: ...``, a line break, ``Answer:``; the answer follows after a space."""
    BARE = "bare"
    """The question as it is; the answer follows after a space. So are questions that a sweep reads from the same files."""
    CHAT = "chat"
    """The tokenizer's chat template, one user message; the answer follows at once."""


class SuiteConfig(Frozen):
    """Settings of one evaluation; the defaults are those of the published code."""

    max_new_tokens: int | None = Field(
        None, ge=1, description="tokens generated per row; null: 200 in TOFU, 32 for the questions and 128 for the passages of MUSE"
    )
    batch_tokens: int = Field(8192, ge=1, description="positions per batch, padding included")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="type the caller loads the model in")
    prompt: PromptStyle = Field(PromptStyle.PLAIN, description="how a question becomes a prompt")
    min_k_fraction: float = Field(0.4, gt=0, le=1, description="share of the least likely tokens that the membership attack averages")
    bootstrap_samples: int = Field(1000, ge=1, description="resamples behind every interval")
    bootstrap_seed: int = Field(0, ge=0)
    confidence: float = Field(0.95, gt=0, lt=1, description="coverage of the intervals")

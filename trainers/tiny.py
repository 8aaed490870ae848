"""A tiny OLMo from random weights, with a tokenizer trained on the data at hand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from trainers.config import Frozen

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TinyOlmoConfig(Frozen):
    """Shape of an OLMo small enough for a CPU; everything else follows OLMo-1B-0724."""

    vocab_size: int = Field(2048, ge=300, description="entries of the byte-level BPE tokenizer")
    hidden_size: int = Field(128, ge=8)
    intermediate_size: int = Field(512, ge=8)
    num_hidden_layers: int = Field(4, ge=1)
    num_attention_heads: int = Field(4, ge=1)
    max_position_embeddings: int = Field(1024, ge=16, description="context, tokens")

    @model_validator(mode="after")
    def _heads_divide(self) -> TinyOlmoConfig:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size = {self.hidden_size} is no multiple of 2 * num_attention_heads = {2 * self.num_attention_heads}: "
                "rotary positions turn pairs of entries of a head"
            )
        return self


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer in OLMo's manner: NFC, no prefix space, nothing added to a text.

    The same texts in the same order give the same tokenizer.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|padding|>")


def build_tiny_olmo(config: TinyOlmoConfig, *, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """An ``OlmoForCausalLM`` with random float32 weights that follow from the seed."""
    import torch
    from transformers import OlmoConfig, OlmoForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return OlmoForCausalLM(
            OlmoConfig(
                vocab_size=-(-len(tokenizer) // 64) * 64,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                max_position_embeddings=config.max_position_embeddings,
                clip_qkv=8.0,
                tie_word_embeddings=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=None,
            )
        ).eval()

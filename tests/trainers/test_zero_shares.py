"""Every ZeRO stage leaves on each of two real ranks as many numbers as the estimate says: weights, gradients, masters and moments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import OlmoConfig, OlmoForCausalLM

from tests.helpers.ranks import RankGroup
from tests.helpers.tiny_trial import random_rows
from trainers.config import EngineConfig, LoraConfig, TrainConfig
from trainers.data.packing import pack
from trainers.distributed import Rank
from trainers.loop import build_engine
from trainers.lora import fuse_adapters
from trainers.memory import BatchSize, estimate_memory
from trainers.model_shape import shape_of, trained_of
from trainers.modeling import add_lora
from trainers.scoring import Request, ScoringModel, Segment

RANKS = 2
PADDING = 0.002
"""Shares are padded to equal sizes, and aligned; here all of them come out even, to the last number."""


def config() -> OlmoConfig:
    return OlmoConfig(
        vocab_size=40, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64,
        pad_token_id=0, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip


def trial(stage: int, *, full: bool) -> TrainConfig:
    return TrainConfig(
        lora=None if full else LoraConfig(r=8, lora_dropout=0.0),
        engine=EngineConfig(zero_stage=stage, ranks=RANKS),
        train_batch_size=4,
        per_device_train_batch_size=2,
    )


def numbers_on_a_rank(*, rank: Rank, stage: int, full: bool) -> dict[str, int]:
    """What one rank holds after the backward passes of a step, and after the step; elements of DeepSpeed's own tensors."""
    train = trial(stage, full=full)
    torch.manual_seed(0)
    lm: Any = OlmoForCausalLM(config())
    if not full:
        lm = add_lora(lm, lora=train.lora, seed=0)
        if stage < 3:
            fuse_adapters(lm)
    engine = build_engine(ScoringModel(lm), train=train, device="cpu")
    batch = pack(random_rows(12, 9, seed=rank.rank), pad_token_id=0)
    found, gradients = {"weights": 0}, []
    for last in (False, True):
        scores = engine.forward(batch, Request((Segment(0, len(batch.label_N)),)))
        engine.backward(scores.link - scores.segments[0].log_prob_N.sum(), last=last)
        found["weights"], number = _weights_and_gradients(engine)
        gradients.append(number)
    # Stage 1 shares gradients out in a step's last pass, and holds all of them until then; stage 2 in every pass.
    found["gradients"] = max(gradients)
    engine.step(learning_rate=1e-3)
    inner = engine._inner  # type: ignore[attr-defined]
    moments = [value for state in inner.state.values() for name, value in state.items() if name in ("exp_avg", "exp_avg_sq")]
    found["moments"] = sum(value.numel() for value in moments)
    optimizer = engine._engine.optimizer  # type: ignore[attr-defined]
    masters = optimizer.fp32_partitioned_groups_flat if stage == 3 else getattr(optimizer, "single_partition_of_fp32_groups", [])
    found["masters"] = sum(value.numel() for value in masters)
    engine.close()
    return found


def _weights_and_gradients(engine: Any) -> tuple[int, int]:
    parameters, optimizer = list(engine.model.parameters()), engine._engine.optimizer
    weights = sum(value.ds_tensor.numel() if hasattr(value, "ds_tensor") else value.numel() for value in parameters)
    if hasattr(optimizer, "grad_partitions_flat_buffer"):
        return weights, optimizer.grad_partitions_flat_buffer.numel()
    whole = sum(value.grad.numel() for value in parameters if value.grad is not None)
    shares = [value for values in getattr(optimizer, "averaged_gradients", {}).values() for value in values or ()]
    return weights, whole + sum(value.numel() for value in shares)


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankGroup]:
    with RankGroup(RANKS) as group:
        yield group


@pytest.mark.parametrize("full", [True, False], ids=["whole model", "adapters"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_rank_holds_its_share(ranks: RankGroup, stage: int, full: bool) -> None:
    """In numbers: the estimate's bytes over the bytes of a number, 4 of weights and gradients, 8 of moments, 4 of masters in stages 1 to 3.

    Whole tensors are exact; shares agree up to ``PADDING``, which a share of one rank more or less, half as much again, would exceed.
    """
    found = ranks.call(numbers_on_a_rank, timeout_s=180, stage=stage, full=full)
    train = trial(stage, full=full)
    shape, trained = shape_of(config()), trained_of(config(), train=train)
    expected = estimate_memory(shape, train=train, trained=trained, batch=BatchSize(21, 24, 9, 9), device="cpu")
    optimizer = expected.optimizer / (12 if stage else 8)
    for numbers in found:
        assert numbers["weights"] == pytest.approx((expected.weights + expected.adapters) / 4, rel=PADDING if stage == 3 else 0)
        assert numbers["gradients"] == pytest.approx(expected.gradients / 4, rel=PADDING if stage > 1 else 0)
        assert numbers["moments"] / 2 == pytest.approx(optimizer, rel=PADDING if stage else 0)
        assert numbers["masters"] == (pytest.approx(optimizer, rel=PADDING) if stage else 0)
    other = estimate_memory(shape, train=train, trained=trained, batch=BatchSize(21, 24, 9, 9), device="cpu", ranks=RANKS + 1)
    if stage:
        assert found[0]["masters"] != pytest.approx(other.optimizer / 12, rel=PADDING), "control: three ranks"

"""A trial's memory is planned for its longest rows together; activations are recomputed where the device says so, and nowhere else."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import OlmoConfig

from tests.helpers.tiny_trial import tiny_inputs, tiny_train
from trainers import loop
from trainers.config import EngineConfig, LoraConfig, ObjectiveConfig, ScheduleConfig, TrainConfig
from trainers.data.encode import EncodedRow
from trainers.data.packing import pack
from trainers.distributed import Rank
from trainers.memory import GIB
from trainers.memory_plan import (
    MemoryPlan,
    largest_micro_batch,
    memory_setting,
    plan_memory,
    recomputes_activations,
    text_setting,
)
from trainers.plan import plan_trial, split_step
from trainers.signals import SignalRows
from trainers.trial_rows import EncodedTrial, encode_trial

NO_SIGNALS = SignalRows([], [], [], [])


def row(length: int, *, scored: int) -> EncodedRow:
    return EncodedRow(str(length), (5,) * length, length - scored)


def random_rows(seed: int, *, count: int) -> list[EncodedRow]:
    generator = np.random.default_rng(seed)
    return [row(int(length), scored=int(generator.integers(1, length))) for length in generator.integers(4, 200, size=count)]


def trial_of(forget: Sequence[EncodedRow], retain: Sequence[EncodedRow]) -> EncodedTrial:
    return EncodedTrial(forget=forget, retain=retain, signals=NO_SIGNALS, pad_token_id=1)


# ---- the largest micro-batch


def test_the_longest_rows_meet() -> None:
    """Two forget rows of 9 + 7 tokens and four retain rows of 6 + 5 + 4 + 3; scored 4 + 3 and 2 + 2 + 1 + 1, of which KL reads the
    retain set's six."""
    forget = [row(5, scored=1), row(9, scored=4), row(7, scored=3)]
    retain = [row(3, scored=1), row(6, scored=2), row(2, scored=1), row(4, scored=1), row(5, scored=2)]
    train = TrainConfig(train_batch_size=4, per_device_train_batch_size=2, schedule=ScheduleConfig(retain_per_forget=2))
    size = largest_micro_batch(forget=forget, retain=retain, train=train)
    assert (size.tokens, size.evaluated, size.segment, size.compared) == (34, 13, 7, 6)
    assert size.positions >= size.tokens
    without_kl = train.model_copy(update={"objective": ObjectiveConfig(name="grad_diff")})
    assert largest_micro_batch(forget=forget, retain=retain, train=without_kl).compared == 0


def test_a_rank_holds_no_more_rows_than_its_share() -> None:
    """Four forget rows per step over four ranks are one on each, whatever fits into a pass."""
    train = TrainConfig(train_batch_size=4, per_device_train_batch_size=4, engine=EngineConfig(ranks=4))
    assert largest_micro_batch(forget=[row(8, scored=2)] * 9, retain=[row(4, scored=1)] * 9, train=train).tokens == 12


@pytest.mark.parametrize("schedule", ["paired", "chunked", "alternating"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_no_micro_batch_of_a_trial_is_larger(schedule: str, ranks: int) -> None:
    train = TrainConfig(
        num_train_epochs=3,
        train_batch_size=6,
        per_device_train_batch_size=2,
        engine=EngineConfig(ranks=ranks),
        schedule=ScheduleConfig(name=schedule, retain_per_forget=2, chunk_size=7),
    )
    forget, retain = random_rows(1, count=23), random_rows(2, count=17)
    bound = largest_micro_batch(forget=forget, retain=retain, train=train)
    tokens = [
        len(pack([*(forget[index] for index in micro.forget), *(retain[index] for index in micro.retain)], pad_token_id=1).input_ids_S)
        for plan in plan_trial(train=train, num_forget=len(forget), num_retain=len(retain))
        for rank in range(ranks)
        for micro in split_step(plan, rank=rank, world_size=ranks, micro_batch_size=train.per_device_train_batch_size)
    ]
    assert 0.5 * bound.tokens < max(tokens) <= bound.tokens


# ---- whether to recompute


def plan_7b(*, capacity_gib: float | None, device: str = "cuda", **changes: Any) -> MemoryPlan:
    """OLMo-7B on adapters in bfloat16, four pairs of 400 tokens each: about 42 GiB, or 18 with recomputation."""
    train = TrainConfig(engine=EngineConfig(dtype="bfloat16"), **changes)
    rows = trial_of([row(400, scored=90)] * 8, [row(400, scored=90)] * 8)
    capacity = None if capacity_gib is None else int(capacity_gib * GIB)
    return plan_memory(OlmoConfig(clip_qkv=8.0), rows=rows, train=train, device=device, capacity_bytes=capacity)


def test_activations_are_recomputed_on_a_small_gpu_only() -> None:
    large, small = plan_7b(capacity_gib=80), plan_7b(capacity_gib=40)
    assert (large.recomputes, small.recomputes) == (False, True)
    assert small.plain == large.estimate
    assert small.estimate.total < 0.5 * large.estimate.total
    assert "(no recomputation, of 80.0 GiB)" in str(large)
    assert f"(activations recomputed, {large.estimate.total / GIB:.1f} GiB without, of 40.0 GiB)" in str(small)


def test_what_fits_neither_way_is_said() -> None:
    plan = plan_7b(capacity_gib=16)
    assert plan.recomputes
    assert str(plan).endswith("of 16.0 GiB: it may not fit)")


def test_a_cpu_never_recomputes_by_itself() -> None:
    plan = plan_7b(capacity_gib=1, device="cpu")
    assert not plan.recomputes
    assert not plan_7b(capacity_gib=None).recomputes


@pytest.mark.parametrize("setting", [True, False])
def test_a_setting_is_obeyed(setting: bool) -> None:
    plan = plan_7b(capacity_gib=16 if not setting else 200, activation_checkpointing=setting)
    assert plan.recomputes is setting
    assert "as configured" in str(plan)


def test_retain_rows_count_only_where_they_are_used() -> None:
    rows = trial_of([row(40, scored=9)] * 8, [row(400, scored=90)] * 8)
    sizes = [
        plan_memory(OlmoConfig(), rows=rows, train=TrainConfig(objective=ObjectiveConfig(name=name)), device="cuda").estimate.activations
        for name in ("grad_ascent", "grad_diff")
    ]
    assert sizes[1] > 8 * sizes[0]


# ---- before and at the start of a trial


def test_only_settings_that_matter_tell_trials_apart() -> None:
    base = TrainConfig()
    assert memory_setting(base.model_copy(update={"learning_rate": 1.0, "seed": 7})) == memory_setting(base)
    weights = ObjectiveConfig(forget_weight=0.9, beta=0.3)
    assert memory_setting(base.model_copy(update={"objective": weights})) == memory_setting(base)
    for change in ({"lora": LoraConfig(r=4)}, {"train_batch_size": 8}, {"max_length": 64}, {"objective": ObjectiveConfig(name="npo")}):
        assert memory_setting(base.model_copy(update=change)) != memory_setting(base)


def test_only_settings_that_change_token_ids_tell_their_rows_apart() -> None:
    """The seed draws refusals, which only IDK-DPO reads; where distributions are compared matters with a KL term only."""
    base = TrainConfig(objective=ObjectiveConfig(name="npo_ce_kl"))
    for same in ({"seed": 7}, {"lora": LoraConfig(r=4)}, {"train_batch_size": 8}):
        assert text_setting(base.model_copy(update=same)) == text_setting(base)
    everywhere = base.model_copy(update={"objective": ObjectiveConfig(name="npo_ce_kl", kl_scope="real")})
    for other in (base.model_copy(update={"max_length": 64}), base.model_copy(update={"forget_scope": "document"}), everywhere):
        assert text_setting(other) != text_setting(base)
    refusing = TrainConfig(objective=ObjectiveConfig(name="idk_dpo"))
    assert text_setting(refusing.model_copy(update={"seed": 7})) != text_setting(refusing)


def test_a_starting_trial_decides_by_the_size_of_its_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    inputs, train = tiny_inputs(tmp_path), tiny_train()
    model, rows = loop.build_model(inputs, train=train), encode_trial(inputs, train=train)
    needed = plan_memory(model.causal_lm.config, rows=rows, train=train, device="cuda").estimate.total
    monkeypatch.setattr(torch, "tensor", lambda value, device: value)
    gpu: Any = SimpleNamespace(rank=0, world_size=1, device="cuda:0")
    with caplog.at_level(logging.INFO, logger="trainers.memory_plan"):
        for capacity, expected in ((2 * needed, False), (needed, True)):
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, size=capacity: (0, size))
            assert recomputes_activations(model, rows=rows, train=train, rank=gpu) is expected
    assert [("activations recomputed" in line, "GiB per rank" in line) for line in caplog.messages] == [(False, True), (True, True)]
    assert not recomputes_activations(model, rows=rows, train=train, rank=Rank()), "never on a CPU"


@pytest.mark.parametrize("decision", [True, False])
def test_the_loop_does_what_was_decided(decision: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    monkeypatch.setattr(loop, "recomputes_activations", lambda *args, **kwargs: decision)
    monkeypatch.setattr(loop, "enable_activation_checkpointing", done.append)
    steps: Any = loop.train_worker(train=tiny_train(), inputs=tiny_inputs(tmp_path / "in"), trial=tmp_path / "trial")
    next(steps)
    steps.close()
    assert len(done) == decision

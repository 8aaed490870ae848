"""Sharding by need: a trial gets as few GPUs as it fits on, and what a user sets stays as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.nodes import Node
from launcher.planner import ShardingPlan, plan_sharding
from trainers.config import EngineConfig, LoraConfig, TrainConfig
from trainers.data.encode import EncodedRow
from trainers.errors import InputError
from trainers.memory import GIB, KEPT_FREE
from trainers.modeling import load_model_config
from trainers.plan import plan_trial, split_step
from trainers.signals import SignalRows
from trainers.trial_rows import EncodedTrial

OLMO = {
    "model_type": "olmo",
    "architectures": ["OlmoForCausalLM"],
    "vocab_size": 50304,
    "max_position_embeddings": 2048,
    "clip_qkv": 8.0,
    "eos_token_id": 50279,
    "pad_token_id": 1,
}
SHAPES: dict[str, dict[str, Any]] = {
    "1B": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16, "intermediate_size": 8192, "tie_word_embeddings": True},
    "7B": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008},
}
OPEN = EngineConfig(ranks=None, zero_stage=None, dtype="bfloat16")
BATCH = 32


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The configurations of OLMo-1B and OLMo-7B, read from a folder each."""
    found = {}
    for name, shape in SHAPES.items():
        folder = tmp_path_factory.mktemp(name)
        (folder / "config.json").write_text(json.dumps(OLMO | shape))
        found[name] = load_model_config(Path(folder))
    return found


def row(length: int, *, scored: int) -> EncodedRow:
    return EncodedRow(str(length), (5,) * length, length - scored)


ROWS = EncodedTrial(
    forget=[row(300, scored=150)] * 64, retain=[row(300, scored=150)] * 64, signals=SignalRows([], [], [], []), pad_token_id=1
)


def gpus(nodes: int, per_node: int, gib: float) -> list[Node]:
    return [Node(f"node-{index}", "", cpus=64, gpus=per_node, gpu_bytes=int(gib * GIB)) for index in range(nodes)]


def trial(*, full: bool = False, **changes: Any) -> TrainConfig:
    """A trial of 32 pairs per step that leaves everything to the planner."""
    values = {"lora": None if full else LoraConfig(), "engine": OPEN, "train_batch_size": BATCH, "per_device_train_batch_size": None}
    return TrainConfig(**(values | changes))


def plan(model: Any, train: TrainConfig, nodes: list[Node], **options: Any) -> ShardingPlan:
    return plan_sharding(model, rows=ROWS, train=train, nodes=nodes, **options)


def choice(found: ShardingPlan) -> tuple[int, int | None, int, bool]:
    return found.ranks, found.zero_stage, found.micro_batch, found.recomputes


# ---- what is chosen


@pytest.mark.parametrize(
    ("name", "full", "nodes", "expected"),
    [
        # adapters: one GPU, whatever there is, and the micro-batch follows its size
        ("1B", False, (1, 1, 16), (1, 1, 4, False)),
        ("1B", False, (1, 8, 24), (1, 1, 8, False)),
        ("1B", False, (2, 8, 80), (1, 1, 32, False)),
        ("7B", False, (1, 1, 24), (1, 1, 1, False)),
        ("7B", False, (1, 8, 40), (1, 1, 4, False)),
        ("7B", False, (2, 8, 80), (1, 1, 8, False)),
        # 13.8 GB of frozen weights leave no room on 16 GiB: they are sharded
        ("7B", False, (1, 8, 16), (2, 3, 8, True)),
        # a whole model of 1B: 16 bytes per number and the update's 8
        ("1B", True, (1, 8, 80), (1, 1, 32, False)),
        ("1B", True, (1, 8, 24), (2, 2, 4, False)),
        ("1B", True, (1, 8, 16), (4, 2, 4, False)),
        # a whole model of 7B: never on one GPU
        ("7B", True, (1, 2, 140), (2, 2, 16, False)),
        ("7B", True, (1, 8, 80), (2, 3, 4, False)),
        ("7B", True, (1, 8, 40), (4, 3, 1, False)),
        ("7B", True, (1, 8, 24), (8, 3, 4, True)),
        # over whole nodes where one has too few
        ("7B", True, (2, 1, 80), (2, 3, 4, False)),
        ("7B", True, (4, 1, 40), (4, 3, 1, False)),
        ("7B", True, (4, 6, 20), (12, 3, 1, False)),
    ],
)
def test_a_trial_takes_as_few_gpus_as_it_fits_on(
    models: dict[str, Any], name: str, full: bool, nodes: tuple[int, int, float], expected: tuple[int, int, int, bool]
) -> None:
    found = plan(models[name], trial(full=full), gpus(*nodes))
    assert choice(found) == expected
    assert found.fits


def test_the_reason_is_said(models: dict[str, Any]) -> None:
    assert plan(models["1B"], trial(), gpus(1, 8, 80)).why.startswith("adapters train; it fits on one GPU, so nothing is shared out")
    several = plan(models["7B"], trial(full=True), gpus(1, 8, 40))
    assert several.why.startswith("the whole model trains; it does not fit on 2 GPUs; 35.5 of 40.0 GiB")
    recomputed = plan(models["7B"], trial(), gpus(1, 8, 16))
    assert "without recomputation it would be" in recomputed.why


def test_a_trial_that_fits_nowhere_is_refused_with_the_least_that_would_do(models: dict[str, Any]) -> None:
    """And that least really fits: with the GPUs that are named, the same trial is planned."""
    train = trial(full=True)
    with pytest.raises(InputError) as caught:
        plan(models["7B"], train, gpus(1, 2, 24))
    assert "it needs 8 GPUs of 24 GiB or 2 GPUs of 67 GiB" in str(caught.value)
    assert "train adapters" in str(caught.value)
    assert plan(models["7B"], train, gpus(1, 8, 24)).ranks == 8
    assert plan(models["7B"], train, gpus(1, 2, 67)).ranks == 2
    for too_few in (gpus(1, 4, 24), gpus(1, 2, 66)):
        with pytest.raises(InputError):
            plan(models["7B"], train, too_few)


def test_every_rank_needs_a_pair(models: dict[str, Any]) -> None:
    """Four GPUs would do, but a step of two pairs keeps two of them busy."""
    assert plan(models["7B"], trial(full=True), gpus(1, 8, 40)).ranks == 4
    with pytest.raises(InputError, match=r"raise train\.train_batch_size above 2"):
        plan(models["7B"], trial(full=True, train_batch_size=2), gpus(1, 8, 40))


def test_plain_torch_is_never_spread(models: dict[str, Any]) -> None:
    engine = EngineConfig(name="torch", ranks=None, zero_stage=None, dtype="float32")
    assert plan(models["1B"], trial(engine=engine), gpus(1, 8, 80)).ranks == 1
    with pytest.raises(InputError, match=r"train\.engine\.name: deepspeed"):
        plan(models["7B"], trial(engine=engine), gpus(1, 8, 24))


def test_ranks_that_share_a_gpu_are_alone_and_have_their_share_of_it(models: dict[str, Any]) -> None:
    whole = plan(models["1B"], trial(), gpus(1, 8, 40))
    half = plan(models["1B"], trial(), gpus(1, 8, 80), gpus_per_rank=0.5)
    assert choice(half) == choice(whole)
    with pytest.raises(InputError):
        plan(models["7B"], trial(full=True), gpus(1, 8, 80), gpus_per_rank=0.5)


def test_the_smallest_gpu_counts(models: dict[str, Any]) -> None:
    mixed = gpus(1, 4, 24) + gpus(1, 8, 80) + [Node("head", "", cpus=4, gpus=0)]
    assert choice(plan(models["7B"], trial(), mixed)) == choice(plan(models["7B"], trial(), gpus(1, 8, 24)))


def test_without_gpus_nothing_is_planned(models: dict[str, Any]) -> None:
    """One rank, stage 2 and at most four pairs, which are the defaults of settings that are left out."""
    cpu = [Node("laptop", "", cpus=8, gpus=0)]
    assert choice(plan(models["7B"], trial(full=True), cpu)) == (1, 2, 4, False)
    assert choice(plan(models["7B"], trial(full=True, train_batch_size=2), cpu)) == (1, 2, 2, False)
    assert plan(models["7B"], trial(), gpus(1, 8, 80), gpus_per_rank=0).capacity_bytes is None


def test_unknown_memory_counts_as_enough(models: dict[str, Any]) -> None:
    found = plan(models["7B"], trial(full=True), [Node("node", "", cpus=8, gpus=8)])
    assert choice(found) == (1, 1, 32, False)
    assert "not known" in found.why


# ---- what a user sets


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"engine": EngineConfig(ranks=8, zero_stage=None, dtype="bfloat16")}, (8, 2, 4, False)),
        ({"engine": EngineConfig(ranks=None, zero_stage=2, dtype="bfloat16")}, (4, 2, 8, False)),
        ({"per_device_train_batch_size": 1}, (2, 3, 1, False)),
        ({"activation_checkpointing": True}, (2, 3, 16, True)),
        ({"engine": EngineConfig(ranks=16, zero_stage=3, dtype="bfloat16"), "per_device_train_batch_size": 1}, (16, 3, 1, False)),
    ],
)
def test_what_is_set_stays(models: dict[str, Any], settings: dict[str, Any], expected: tuple[int, int, int, bool]) -> None:
    assert choice(plan(models["7B"], trial(full=True, **settings), gpus(1, 8, 80))) == expected


def test_a_trial_that_leaves_nothing_open_is_planned_as_it_is_even_if_it_may_not_fit(models: dict[str, Any]) -> None:
    train = trial(full=True, engine=EngineConfig(dtype="bfloat16"), per_device_train_batch_size=4)
    found = plan(models["7B"], train, gpus(1, 8, 24))
    assert (found.ranks, found.zero_stage, found.micro_batch) == (1, 2, 4)
    assert not found.fits
    assert "as configured: it may not fit" in found.why


def test_defaults_are_set(models: dict[str, Any]) -> None:
    """A configuration that says nothing means what it always meant: one rank, stage 2, four pairs."""
    assert choice(plan(models["7B"], TrainConfig(engine=EngineConfig(dtype="bfloat16")), gpus(1, 8, 80))) == (1, 2, 4, False)


# ---- laws


@given(
    gib=st.floats(4, 200),
    more=st.floats(0, 100),
    per_node=st.integers(1, 8),
    nodes=st.integers(1, 3),
    full=st.booleans(),
    batch=st.sampled_from([1, 3, 8, 32]),
    name=st.sampled_from(["1B", "7B"]),
)
@settings(max_examples=40, deadline=None)
def test_laws(models: dict[str, Any], gib: float, more: float, per_node: int, nodes: int, full: bool, batch: int, name: str) -> None:
    """A plan fits, keeps the global batch, gives every rank a pair, and needs no more ranks on larger GPUs."""
    train = trial(full=full, train_batch_size=batch)
    try:
        small = plan(models[name], train, gpus(nodes, per_node, gib))
    except InputError:
        return
    assert small.estimate.total <= (1 - KEPT_FREE) * gib * GIB
    assert small.ranks <= min(batch, nodes * per_node)
    assert small.ranks in (1, 2, 4, *(per_node * (1 + index) for index in range(nodes)))
    large = plan(models[name], train, gpus(nodes, per_node, gib + more))
    assert large.ranks <= small.ranks
    if large.ranks == small.ranks:
        assert large.zero_stage <= small.zero_stage
    applied = small.apply(train)
    assert applied.train_batch_size == batch
    assert (applied.engine.ranks, applied.engine.zero_stage, applied.per_device_train_batch_size) == choice(small)[:3]
    untouched = {"engine", "per_device_train_batch_size", "activation_checkpointing"}
    assert applied.model_dump(exclude=untouched) == train.model_dump(exclude=untouched)
    assert applied.engine.dtype == train.engine.dtype


@pytest.mark.parametrize(("name", "full", "nodes"), [("7B", True, (1, 8, 24)), ("7B", True, (4, 6, 20)), ("1B", False, (1, 1, 16))])
def test_a_step_reads_the_same_rows_however_it_is_sharded(
    models: dict[str, Any], name: str, full: bool, nodes: tuple[int, int, float]
) -> None:
    train = trial(full=full)
    sharded = plan(models[name], train, gpus(*nodes)).apply(train)
    for step in plan_trial(train=sharded, num_forget=64, num_retain=64)[:3]:
        micro = [
            batch
            for rank in range(sharded.engine.num_ranks)
            for batch in split_step(step, rank=rank, world_size=sharded.engine.num_ranks, micro_batch_size=sharded.micro_batch_size)
        ]
        assert sorted(index for batch in micro for index in batch.forget) == sorted(step.forget)
        assert max(len(batch.forget) for batch in micro) <= sharded.micro_batch_size
        assert len(step.forget) == BATCH


def test_recomputation_that_is_not_needed_stays_open(models: dict[str, Any]) -> None:
    """A trial looks again when it knows its GPU; what the planner decided on is written down."""
    train = trial(full=True)
    assert plan(models["7B"], train, gpus(1, 8, 80)).apply(train).activation_checkpointing is None
    assert plan(models["7B"], train, gpus(1, 8, 24)).apply(train).activation_checkpointing is True
    refused = trial(full=True, activation_checkpointing=False)
    assert plan(models["7B"], refused, gpus(1, 8, 80)).apply(refused).activation_checkpointing is False

"""One trial gives the same numbers however it is computed: plain torch or ZeRO 0 to 3, one process, two or four, at once or resumed.

The matrix holds every cell of engine x processes x adapters or all parameters x float32 or bfloat16 against plain torch on one
process, over the same steps of four pairs of rows. Plain torch in bfloat16 is ``tests.helpers.master_weights``.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from tests.helpers.ranks import RankGroup
from tests.helpers.tiny_trial import tiny_inputs, tiny_train
from tests.helpers.trial_runs import MASTER_WEIGHTS, Run, Trials, differences, hash_state, run_rank
from trainers import loop
from trainers.checkpoint import finished_checkpoints
from trainers.config import EngineConfig, LoraConfig, ObjectiveName, TrainConfig
from trainers.data.types import ForgetRetain
from trainers.distributed import Rank
from trainers.engine.base import TrainingState
from trainers.errors import InputError
from trainers.files import read_jsonl
from trainers.loop import build_engine, build_model
from trainers.plan import MicroBatch, StepPlan, plan_trial
from trainers.trial_rows import TrialInputs

KINDS: dict[str, dict[str, Any]] = {"lora": {}, "full": {"lora": None, "learning_rate": 1e-3}}
DROPOUT = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1)


@dataclass(frozen=True)
class Tolerance:
    """Largest ``Differences`` of two runs of one trial that are taken for rounding."""

    loss: float
    norm: float
    weight: float
    spread: float


FLOAT32 = Tolerance(loss=1e-5, norm=1e-4, weight=0.2, spread=2e-3)
"""Measured over the matrix: 2e-7 of the loss (17 nats), 2e-7 of the norm, 6e-4 learning rates. Over all tests of this file: 2e-7, 4e-6
(where a gradient is the small difference of two distributions), single weights 0.02, their spread 2e-4. The rest is left for other
machines. The mistakes below move the loss by 6e-2 or the norm by 0.5; lost moments the loss by 9e-4 and the spread by 0.3."""

BFLOAT16 = Tolerance(loss=1e-3, norm=1e-2, weight=math.inf, spread=0.2)
"""Numbers have 8 bits: 4e-3 of each. Measured over the matrix: 6e-5 of the loss, 2e-3 of the norm, a spread of 0.07. Where a gradient is
hardly more than rounding AdamW may move a weight either way, so that single ones differ by two learning rates. The same rows on every
rank give a spread of 0.9."""

TOLERANCES = {"float32": FLOAT32, "bfloat16": BFLOAT16}


def config(
    kind: str = "lora", *, stage: int | None = None, ranks: int = 1, dtype: str = "float32", num_epochs: float = 1, **changes: Any
) -> TrainConfig:
    """A trial of three steps an epoch; without a ZeRO stage in plain torch. The more processes, the smaller the micro-batches."""
    engine = EngineConfig(name="torch", dtype=dtype) if stage is None else EngineConfig(zero_stage=stage, ranks=ranks, dtype=dtype)
    defaults = {
        "engine": engine,
        "per_device_train_batch_size": 4 if stage is None else max(1, 2 // ranks),
        "num_train_epochs": num_epochs,
        "signals": 0,
        "checkpoints": 1 if num_epochs == 1 else 2,
    }
    return tiny_train(**{**defaults, **KINDS[kind], **changes})


def plain(trials: Trials, kind: str = "lora", *, dtype: str = "float32", **changes: Any) -> Run:
    """The trial in plain torch on one process."""
    if dtype == "float32":
        return trials.undisturbed(config(kind, **changes))
    return trials.undisturbed(config(kind, stage=1, dtype=dtype, per_device_train_batch_size=4, **changes), engine=MASTER_WEIGHTS)


def assert_same(actual: Run, expected: Run, *, tolerance: Tolerance = FLOAT32, from_step: int = 1) -> None:
    """Losses and gradient norms of every step from ``from_step`` on, and the weights at the end, agree up to rounding."""
    found = differences(actual, expected, from_step=from_step)
    for name, limit in asdict(tolerance).items():
        assert getattr(found, name) < limit, f"{name}: {found}, allowed {tolerance}"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> TrialInputs:
    """Twelve forget and twelve retain rows; every forget row has an alternative answer."""
    found = tiny_inputs(tmp_path_factory.mktemp("engines"))
    forget = tuple(replace(record, alternative=f"nobody {index}") for index, record in enumerate(found.train.forget))
    return replace(found, train=ForgetRetain(forget, found.train.retain))


@pytest.fixture(scope="module")
def trials(inputs: TrialInputs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trials]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # DeepSpeed collects garbage with every engine, which would otherwise go through everything that is imported.
    gc.freeze()
    found = Trials(inputs=inputs, root=tmp_path_factory.mktemp("trials"))
    yield found
    found.stop()
    gc.unfreeze()
    torch.set_num_threads(num_threads)


def several(ranks: int, *values: Any) -> Any:
    """A case's parameters, marked if it needs several processes."""
    return pytest.param(ranks, *values, marks=pytest.mark.ranks if ranks > 1 else ())


# --- the matrix ---


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [several(1), several(2), several(4)])
def test_zero_equals_plain_torch(trials: Trials, stage: int, ranks: int, kind: str, dtype: str) -> None:
    """Also, on every rank: the metrics are those of the whole step, and the weights and moments at the end are the same."""
    if stage == 0 and dtype == "bfloat16":
        with pytest.raises(ValidationError, match="no float32 master weights"):
            config(kind, stage=stage, ranks=ranks, dtype=dtype)
        return
    assert_same(
        trials.undisturbed(config(kind, stage=stage, ranks=ranks, dtype=dtype)),
        plain(trials, kind, dtype=dtype),
        tolerance=TOLERANCES[dtype],
    )


MISTAKES = {"counts of one rank": "loss", "gradients averaged": "norm", "same rows on every rank": "loss"}


@pytest.mark.ranks
@pytest.mark.parametrize("wrong", MISTAKES)
@pytest.mark.parametrize(
    ("ranks", "stage", "kind", "dtype"), [(2, 2, "lora", "float32"), (4, 3, "full", "float32"), (2, 3, "full", "bfloat16")]
)
def test_the_tolerances_reject_mistakes(trials: Trials, wrong: str, ranks: int, stage: int, kind: str, dtype: str) -> None:
    """Negative control. AdamW is blind to a common factor of all gradients, so only the norm tells an average from a sum."""
    run = trials.run(config(kind, stage=stage, ranks=ranks, dtype=dtype), wrong=wrong)
    found = differences(run, plain(trials, kind, dtype=dtype))
    assert getattr(found, MISTAKES[wrong]) > 10 * getattr(TOLERANCES[dtype], MISTAKES[wrong]), found


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_change_nothing(trials: Trials, kind: str) -> None:
    assert_same(trials.undisturbed(config(kind, per_device_train_batch_size=1)), plain(trials, kind))


def test_plain_torch_is_for_one_process_and_for_weights_that_keep_small_updates() -> None:
    """The cells of the matrix that the configuration leaves to DeepSpeed."""
    with pytest.raises(ValidationError, match="one rank only"):
        EngineConfig(name="torch", ranks=2)
    with pytest.raises(ValidationError, match="without float32 masters"):
        config("full", dtype="bfloat16")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ranks", "stage"), [several(1, 1), several(1, 2), several(2, 3)])
def test_bfloat16_trains_float32_masters(trials: Trials, ranks: int, stage: int, kind: str) -> None:
    """Checkpoints hold more than bfloat16 can, and training goes the way of float32.

    Measured: the loss is within 3e-4 of float32's; the three steps move it by 1e-2.
    """
    run = trials.undisturbed(config(kind, stage=stage, ranks=ranks, dtype="bfloat16"))
    assert any(not torch.equal(value, value.bfloat16().float()) for value in run.weights.values())
    assert run.values("loss") == pytest.approx(plain(trials, kind).values("loss"), rel=2e-3)


def test_plain_torch_trains_float32_adapters_on_a_bfloat16_model(trials: Trials) -> None:
    run = trials.undisturbed(config(dtype="bfloat16"))
    assert {value.dtype for value in run.weights.values()} == {torch.float32}
    assert run.values("loss") == pytest.approx(plain(trials).values("loss"), rel=2e-3)


# --- rows ---


def rows_of(run: Run, *, step: int) -> list[tuple[list[int], list[int]]]:
    """The forget and retain rows that each rank computed in the run's step (from 0), in order."""
    return [
        (
            [row for micro in rank.micro_batches[step] for row in micro.forget],
            [row for micro in rank.micro_batches[step] for row in micro.retain],
        )
        for rank in run.ranks
    ]


def planned(trials: Trials, train: TrainConfig) -> list[StepPlan]:
    return plan_trial(train=train, num_forget=len(trials.inputs.train.forget), num_retain=len(trials.inputs.train.retain))


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("stage", [1, 3])
def test_ranks_share_the_rows_of_every_step(trials: Trials, ranks: int, stage: int) -> None:
    """Disjoint over ranks, complete, equally many forward passes; and a function of seed, epoch and position alone."""
    train = config(stage=stage, ranks=ranks)
    run = trials.undisturbed(train)
    plans = planned(trials, train)
    assert [len(rank.micro_batches) for rank in run.ranks] == [len(plans)] * ranks
    for step, plan in enumerate(plans):
        shares = rows_of(run, step=step)
        for side, rows in enumerate((plan.forget, plan.retain)):
            together = [row for share in shares for row in share[side]]
            assert len(together) == len(set(together))
            assert sorted(together) == sorted(rows)
        assert len({len(rank.micro_batches[step]) for rank in run.ranks}) == 1
    assert plans == planned(trials, config()), "the plan of one process"
    assert plans != planned(trials, config(seed=43))


@pytest.mark.ranks
def test_the_same_rows_on_every_rank_are_seen(trials: Trials) -> None:
    """Negative control."""
    run = trials.run(config(stage=1, ranks=2), wrong="same rows on every rank")
    first, second = rows_of(run, step=0)
    assert first == second


# --- what objectives and schedules need, under ZeRO-3 on two processes ---

RMU = {"name": "rmu", "layer": 0, "steering": 2.0, "retain_activation_weight": 10.0}
UNEVEN = {"train_batch_size": 11}
"""Steps of eleven rows and of one: a rank has no rows in the last pass of the first step, and none at all in the second."""


@pytest.mark.ranks
@pytest.mark.parametrize("name", ObjectiveName)
def test_every_objective_is_the_same_under_zero_3_although_a_rank_has_no_rows_in_some_passes(trials: Trials, name: ObjectiveName) -> None:
    """Ranks whose passes differ in what they reach would wait for each other for ever."""
    objective = RMU | {"name": name} if name in (ObjectiveName.RMU, ObjectiveName.ADAPTIVE_RMU) else {"name": name}
    run = trials.undisturbed(config(stage=3, ranks=2, objective=objective, **UNEVEN))
    rows = [[(len(micro.forget), len(micro.retain)) for micro in rank.micro_batches[0]] for rank in run.ranks]
    assert [len(passes) for passes in rows] == [6, 6]
    assert (rows[0][-1][0], rows[1][-1]) == (1, (0, 0))
    assert run.ranks[1].micro_batches[1] == [MicroBatch((), ())]
    assert_same(run, plain(trials, objective=objective, **UNEVEN))


SPECIAL: dict[str, dict[str, Any]] = {
    "one module of one layer below which nothing trains": {
        "objective": RMU | {"layer": 1},
        "lora": None,
        "trainable": {"modules": ("down_proj",), "layers": (1, 1)},
        "learning_rate": 1e-3,
    },
    "one module of a layer above which nothing runs": {
        "objective": RMU,
        "lora": None,
        "trainable": {"modules": ("down_proj",), "layers": (0, 0)},
        "learning_rate": 1e-3,
    },
    "gradients of both sides, all parameters": {"objective": {"name": "ng_diff"}, **KINDS["full"]},
    "distributions rebuilt with a copy of the head": {"objective": {"name": "undial", "retain_ce_weight": 1.0}, **KINDS["full"]},
    "alternative answers, all parameters": {"objective": {"name": "dpo", "retain_ce_weight": 1.0}, **KINDS["full"]},
    "mean logits of a head that trains": {"objective": {"name": "ce_u", "retain_ce_weight": 1.0}, **KINDS["full"]},
    "KL at every real token": {"objective": {"name": "kl_min", "kl_scope": "real"}, **KINDS["full"]},
    "a negated update, all parameters": {"objective": {"name": "task_vector_negation"}, **KINDS["full"]},
    "an optimizer that starts anew with every chunk": {"schedule": {"name": "chunked", "chunk_size": 6}},
    "an optimizer that starts anew, all parameters": {"schedule": {"name": "chunked", "chunk_size": 6}, **KINDS["full"]},
    "retain rows alone in some steps": {
        "objective": {"name": "grad_diff"},
        "schedule": {"name": "alternating", "chunk_size": 6, "annealing_fraction": 0.5},
    },
    "two retain rows for every forget row": {"schedule": {"name": "paired", "retain_per_forget": 2}, "train_batch_size": 5},
    "a weight of retain cross-entropy that adapts": {"objective": {"name": "grad_diff"}, "adaptive_retain": {}},
}


@pytest.mark.ranks
@pytest.mark.parametrize("need", SPECIAL)
def test_every_need_is_met_under_zero_3(trials: Trials, need: str) -> None:
    assert_same(trials.undisturbed(config(stage=3, ranks=2, **SPECIAL[need])), plain(trials, **SPECIAL[need]))


@pytest.mark.ranks
def test_moments_that_outlive_their_chunk_are_seen(trials: Trials) -> None:
    """Negative control for the optimizer that starts anew."""
    changes = SPECIAL["an optimizer that starts anew with every chunk"]
    run = trials.run(config(stage=3, ranks=2, **changes), wrong="optimizer never reset")
    assert differences(run, plain(trials, **changes)).spread > 10 * FLOAT32.spread


@pytest.mark.parametrize(("ranks", "stage"), [several(1, 0), several(1, 2), several(2, 0), several(2, 1), several(2, 2)])
def test_gradients_of_both_sides_leave_no_trace_in_the_update(trials: Trials, ranks: int, stage: int) -> None:
    """NG-Diff looks at two gradients before the one it applies; DeepSpeed must take them for no part of the update."""
    changes = {"objective": {"name": "ng_diff"}, **UNEVEN}
    assert_same(trials.undisturbed(config(stage=stage, ranks=ranks, **changes)), plain(trials, **changes))


IN_BFLOAT16: dict[str, tuple[dict[str, Any], Tolerance]] = {
    "rmu": (RMU, BFLOAT16),
    "undial": ({"name": "undial", "retain_ce_weight": 1.0}, BFLOAT16),
    "dpo": ({"name": "dpo"}, BFLOAT16),
    # Its loss is divided by gradient norms, each of which is off by 2e-3.
    "ng_diff": ({"name": "ng_diff"}, replace(BFLOAT16, loss=2e-2)),
}


@pytest.mark.ranks
@pytest.mark.parametrize("name", IN_BFLOAT16)
def test_needs_are_met_in_bfloat16(trials: Trials, name: str) -> None:
    objective, tolerance = IN_BFLOAT16[name]
    run = trials.undisturbed(config(stage=3, ranks=2, dtype="bfloat16", objective=objective))
    assert_same(run, plain(trials, dtype="bfloat16", objective=objective), tolerance=tolerance)


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [2, 3])
def test_signals_are_the_same_and_measuring_changes_nothing(trials: Trials, stage: int) -> None:
    """Measured after steps 2 and 3 of 3. The rows fill one batch, so the second rank takes part with an empty one."""
    run, expected = trials.undisturbed(config(stage=stage, ranks=2, signals=2)), plain(trials, signals=2)
    assert_same(run, plain(trials))
    found = [metrics.get("signals") for metrics in run.ranks[0].metrics]
    wanted = [metrics.get("signals") for metrics in expected.ranks[0].metrics]
    assert [value is not None for value in found] == [value is not None for value in wanted] == [False, True, True]
    for actual, one in zip(found[1:], wanted[1:], strict=True):
        assert actual == pytest.approx(one, rel=1e-5)


# --- recomputed activations ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ranks", "stage"), [several(1, None), several(2, 2), several(2, 3)])
def test_recomputing_activations_changes_no_number(trials: Trials, ranks: int, stage: int | None, kind: str) -> None:
    """Up to rounding; the lowest layer runs twice as often."""
    kept, recomputed = (trials.undisturbed(config(kind, stage=stage, ranks=ranks, activation_checkpointing=on)) for on in (False, True))
    assert recomputed.ranks[0].layer_passes == 2 * kept.ranks[0].layer_passes
    assert_same(recomputed, kept)


# --- resuming: six steps, checkpoints at the third and the sixth, interrupted after the fourth ---

SAME: dict[str, dict[str, Any]] = {
    "torch": {},
    **{f"zero {stage}": {"stage": stage} for stage in (0, 1, 2, 3)},
    **{f"zero {stage}, bfloat16": {"stage": stage, "dtype": "bfloat16"} for stage in (1, 2, 3)},
    **{f"zero {stage} on two": {"stage": stage, "ranks": 2} for stage in (2, 3)},
    "zero 3 on two, bfloat16": {"stage": 3, "ranks": 2, "dtype": "bfloat16"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", [pytest.param(name, marks=pytest.mark.ranks if "on two" in name else ()) for name in SAME])
def test_a_resumed_trial_is_bit_equal_to_an_undisturbed_one(trials: Trials, where: str, kind: str) -> None:
    """At the same world size and stage: losses, weights and moments. Adapters have dropout, so the random stream resumes too."""
    train = config(kind, num_epochs=2, **SAME[where], **({"lora": DROPOUT} if kind == "lora" else {}))
    undisturbed = trials.undisturbed(train)
    folder = trials.interrupted(train, after=4)
    assert [path.name for path in finished_checkpoints(folder)] == ["step-000003"]
    resumed = trials.run(train, trial=folder)
    assert resumed.values("loss") == undisturbed.values("loss")[3:]
    assert resumed.values("grad_norm") == undisturbed.values("grad_norm")[3:]
    assert resumed.ranks[0].state == undisturbed.ranks[0].state
    assert [rank.micro_batches for rank in resumed.ranks] == [rank.micro_batches[3:] for rank in undisturbed.ranks], "the same rows"
    assert [line["step"] for line in read_jsonl(folder / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6], "no step is logged twice"


def test_a_resumed_trial_without_its_random_stream_is_seen(trials: Trials) -> None:
    """Negative control: with another seed of the dropout the losses after the checkpoint differ."""
    train = config(num_epochs=2, lora=DROPOUT)
    resumed = trials.run(train, trial=trials.interrupted(train, after=4), wrong="other dropout")
    assert resumed.values("loss") != trials.undisturbed(train).values("loss")[3:]


ELSEWHERE: list[tuple[tuple[int, int | None], tuple[int, int | None]]] = [
    ((1, None), (2, 2)),
    ((1, 3), (2, 3)),
    ((2, 3), (1, None)),
    ((2, 2), (1, 0)),
    ((2, 2), (4, 3)),
    ((4, 3), (2, 1)),
    ((1, 3), (1, 1)),
    ((1, 0), (1, 3)),
]


def place(ranks: int, stage: int | None) -> str:
    return f"{'torch' if stage is None else f'zero {stage}'} on {ranks}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("before", "after"),
    [pytest.param(a, b, marks=pytest.mark.ranks if max(a[0], b[0]) > 1 else (), id=f"{place(*a)}, then {place(*b)}") for a, b in ELSEWHERE],
)
def test_a_checkpoint_resumes_at_another_world_size_and_stage(
    trials: Trials, before: tuple[int, int | None], after: tuple[int, int | None], kind: str
) -> None:
    """With the losses, from the next one on, and the final weights of a trial that plain torch computes from end to end."""
    first, second = (config(kind, ranks=ranks, stage=stage, num_epochs=2) for ranks, stage in (before, after))
    resumed = trials.run(second, trial=trials.interrupted(first, after=4))
    assert len(resumed.values("loss")) == 3
    assert_same(resumed, plain(trials, kind, num_epochs=2), from_step=4)


@pytest.mark.ranks
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_in_bfloat16_resumes_at_another_world_size_and_stage(trials: Trials, kind: str) -> None:
    """The float32 masters travel, not the rounded weights."""
    first, second = (config(kind, ranks=ranks, stage=stage, dtype="bfloat16", num_epochs=2) for ranks, stage in ((2, 3), (1, 1)))
    resumed = trials.run(second, trial=trials.interrupted(first, after=4))
    assert_same(resumed, plain(trials, kind, dtype="bfloat16", num_epochs=2), tolerance=BFLOAT16, from_step=4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ranks", "stage"), [several(1, 1), several(2, 3)])
def test_moments_that_do_not_travel_are_seen(trials: Trials, ranks: int, stage: int, kind: str) -> None:
    """Negative control: without moments the first step after the checkpoint already moves the weights elsewhere."""
    train = config(kind, ranks=ranks, stage=stage, num_epochs=2)
    resumed = trials.run(train, trial=trials.interrupted(config(kind, num_epochs=2), after=4), wrong="moments lost")
    found = differences(resumed, plain(trials, kind, num_epochs=2), from_step=4)
    assert found.loss > 10 * FLOAT32.loss, found
    assert found.spread > 10 * FLOAT32.spread, found


# --- what is refused, and what others can read ---


def altered(state: TrainingState, *, how: str) -> TrainingState:
    """The state with its last parameter gone or of another shape; all others fit."""
    last = list(state.weights)[-1]
    weights = {name: value for name, value in state.weights.items() if name != last}
    return replace(state, weights=weights if how == "missing" else {**weights, last: torch.zeros(1, 1)})


def refused_state(*, inputs: TrialInputs, train: TrainConfig, how: str, rank: Rank | None = None) -> tuple[str, bool]:
    """The refusal of a state that does not fit an engine, and whether the engine is as it was."""
    model = build_model(inputs, train=train)
    if train.engine.name == "deepspeed":
        loop.start_process_group(rank or Rank())
    engine = build_engine(model, train=train, device=(rank or Rank()).device)
    before = engine.state()
    other = replace(before, optimizer_step=7, weights={name: value + 1 for name, value in before.weights.items()})
    with pytest.raises(InputError) as refusal:
        engine.load_state(altered(other, how=how))
    after = engine.state()
    engine.close()
    return str(refusal.value), hash_state(after) == hash_state(before)


@pytest.mark.parametrize("how", ["missing", "another shape"])
@pytest.mark.parametrize(("ranks", "stage"), [several(1, None), several(1, 0), several(1, 1), several(1, 3), several(2, 2), several(2, 3)])
def test_a_state_that_does_not_fit_is_refused_before_anything_is_overwritten(
    trials: Trials, ranks: int, stage: int | None, how: str
) -> None:
    """On every rank; DeepSpeed's own loader has overwritten the weights by the time it complains."""
    arguments = {"inputs": trials.inputs, "train": config("full", stage=stage, ranks=ranks), "how": how}
    found = trials.groups[ranks].call(refused_state, **arguments) if ranks > 1 else [refused_state(**arguments)]
    for message, unchanged in found:
        assert ("other trainable parameters" if how == "missing" else "has shape") in message
        assert unchanged


def test_a_checkpoint_of_another_configuration_or_target_is_refused(trials: Trials) -> None:
    """The folder stays as it is, so that the right trial can still go on from it."""
    train = config(num_epochs=2)
    folder = trials.interrupted(train, after=4)
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="learning_rate"):
        trials.run(config(num_epochs=2, learning_rate=1e-3), trial=folder)
    with pytest.raises(InputError, match=r"dtype|other rows"):
        trials.run(config(num_epochs=2, dtype="bfloat16"), trial=folder)
    with pytest.raises(InputError, match="another target"):
        run_rank(train=train, inputs=replace(trials.inputs, target_hash="0" * 64), trial=folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files
    assert trials.run(train, trial=folder).values("loss") == trials.undisturbed(train).values("loss")[3:]


def test_a_damaged_checkpoint_is_refused(trials: Trials) -> None:
    train = config(num_epochs=2)
    folder = trials.interrupted(train, after=4)
    file = finished_checkpoints(folder)[-1] / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 0xFF
    file.write_bytes(data)
    with pytest.raises(InputError, match="do not match its manifest"):
        trials.run(train, trial=folder)


@pytest.mark.parametrize(("ranks", "stage"), [several(1, None), several(2, 3), several(4, 3)])
def test_the_saved_adapter_loads_in_plain_peft(trials: Trials, ranks: int, stage: int | None) -> None:
    """Whole, whatever was sharded: the same logits as the adapter that plain torch saved, far from the target's."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def logits(run: Run) -> torch.Tensor:
        base = AutoModelForCausalLM.from_pretrained(trials.inputs.target)
        return PeftModel.from_pretrained(base, str(finished_checkpoints(run.trial)[-1]))(ids).logits.detach()

    ids = torch.arange(10)[None]
    actual = logits(trials.undisturbed(config(stage=stage, ranks=ranks)))
    untouched = AutoModelForCausalLM.from_pretrained(trials.inputs.target)(ids).logits.detach()
    assert float((actual - untouched).abs().max()) > 1e-2
    torch.testing.assert_close(actual, logits(plain(trials)), rtol=0, atol=1e-4)


# --- the processes of these tests ---


def misbehave(*, rank: Rank, how: str) -> int:
    """Rank 1 fails in some way while rank 0 waits for it."""
    if how == "none":
        return rank.rank
    if rank.rank == 1 and how == "error":
        raise ValueError("rank 1 cannot go on")
    if rank.rank == 1 and how == "death":
        os._exit(3)
    time.sleep(60)
    return rank.rank


@pytest.mark.ranks
def test_a_rank_that_fails_dies_or_hangs_fails_its_own_call_only() -> None:
    with RankGroup(2, join=False) as group:
        for how, limit, message in (
            ("error", 30.0, "rank 1 cannot go on"),
            ("death", 30.0, "exit code 3"),
            ("hang", 0.5, "did not finish"),
        ):
            started = time.monotonic()
            with pytest.raises(AssertionError, match=message):
                group.call(misbehave, how=how, timeout_s=limit)
            assert time.monotonic() - started < 20
            assert group.call(misbehave, how="none") == [0, 1]

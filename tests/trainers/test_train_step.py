"""One optimizer step: padding, micro-batches and ranks change neither its loss nor its gradient; a loss that is not finite stops it.

The steps run in float64, so that what is equal in theory is equal to 1e-12 here and nothing else is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.ranks import run_ranks
from tests.helpers.thread_ranks import Meeting, ThreadEngine, run_threads
from tests.helpers.tiny_trial import tiny_inputs, tiny_records, tiny_train
from trainers import loop
from trainers.config import EngineConfig, ObjectiveConfig, TrainConfig
from trainers.data.batches import MicroBatch, StepPlan, collate, plan_steps, split_step
from trainers.data.encode import EncodedRow
from trainers.data.types import ForgetRetain
from trainers.distributed import Rank, start_process_group, stop_process_group
from trainers.engine.local import LocalEngine
from trainers.files import read_jsonl
from trainers.loop import (
    DivergedError,
    EncodedTrial,
    TrialInputs,
    build_engine,
    build_model,
    encode_trial,
    evenly_spaced,
    local_counts,
    obtain_reference,
    prepare_reference,
    score_micro_batch,
    train_step,
    train_worker,
    uses_retain,
)
from trainers.objectives.log_probs import token_log_probs
from trainers.objectives.terms import LossTerm, StepCounts, step_loss
from trainers.reference import Reference, ReferenceSide
from trainers.scoring import ScoringModel, set_step_seed
from trainers.signals import SignalRows
from trainers.tiny import TinyOlmoConfig, build_tiny_olmo, train_tokenizer

TOLERANCE = 1e-12
"""Measured over 150 splits: gradients differ by at most 5e-16, losses by 6e-15. The negative controls differ by more than 1e-3."""

OBJECTIVE = ObjectiveConfig(name="npo_ce_kl", forget_weight=1.0, retain_ce_weight=0.5, retain_kl_weight=0.5)
PAD = 1
VOCABULARY = 320
HIDDEN = 16

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> ScoringModel:
    tokenizer = train_tokenizer([record.text for record in tiny_records("f", count=2)], vocab_size=VOCABULARY)
    config = TinyOlmoConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    return ScoringModel(build_tiny_olmo(config, tokenizer=tokenizer, seed=0).double().requires_grad_(True))


@dataclass(frozen=True)
class Update:
    """What one step did."""

    metrics: dict
    gradient: Tensor
    weights: Tensor


def draw_rows(generator: torch.Generator, *, number: int) -> list[EncodedRow]:
    """Random rows of 3 to 14 tokens, of which 1 to 9 are scored."""
    rows = []
    for index in range(number):
        num_prompt, num_scored = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((2, 6), (1, 10)))
        ids = torch.randint(2, VOCABULARY, (num_prompt + num_scored,), generator=generator).tolist()
        rows.append(EncodedRow(f"row{index}", tuple(ids), num_prompt))
    return rows


def draw_trial(*, num_forget: int, num_retain: int, seed: int) -> tuple[EncodedTrial, Reference]:
    """Random rows with a random reference, far from the model so that every term has a gradient."""
    generator = torch.Generator().manual_seed(seed)
    forget, retain = draw_rows(generator, number=num_forget), draw_rows(generator, number=num_retain)

    def side(rows: list[EncodedRow], *, hidden: bool) -> ReferenceSide:
        starts = [0]
        for row in rows:
            starts.append(starts[-1] + row.num_scored)
        return ReferenceSide(
            tuple(starts),
            -8 * torch.rand(starts[-1], generator=generator),
            torch.randn(starts[-1], HIDDEN, generator=generator) if hidden else None,
        )

    # A float64 head: products in float32 would depend on the number of rows by 5e-8.
    head_VD = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)
    reference = Reference(side(forget, hidden=False), side(retain, hidden=True), head_VD)
    return EncodedTrial(forget, retain, SignalRows((), (), (), ()), PAD), reference


def update(
    model: ScoringModel,
    *,
    rows: EncodedTrial,
    reference: Reference,
    micro_batch_size: int = 99,
    world_size: int = 1,
    objective: ObjectiveConfig = OBJECTIVE,
    engine_type: type[ThreadEngine] = ThreadEngine,
    order: tuple[int, ...] | None = None,
) -> Update:
    """One step over all rows from a copy of the model, forget rows in the order given; threads as ranks, whose results must agree."""
    train = TrainConfig(
        objective=objective, lora=None, engine=EngineConfig(name="torch"), per_device_train_batch_size=micro_batch_size, learning_rate=1e-2
    )
    plan = StepPlan(1, 1.0, order or tuple(range(len(rows.forget))), tuple(range(len(rows.retain))))

    def work(meeting: Meeting, rank: int) -> Update:
        engine = engine_type(copy.deepcopy(model), meeting=meeting, rank=rank)
        metrics = train_step(plan, engine=engine, rows=rows, reference=reference, train=train, num_steps=10)
        return Update(metrics, flatten(engine.gradient), flatten(engine.model.trainable()))

    updates = run_threads(work, world_size=world_size)
    for other in updates[1:]:
        assert other.metrics == updates[0].metrics
        assert torch.equal(other.weights, updates[0].weights)
    return updates[0]


def flatten(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.detach().flatten() for value in tensors.values()])


def assert_same_update(actual: Update, expected: Update) -> None:
    torch.testing.assert_close(actual.gradient, expected.gradient, rtol=0, atol=TOLERANCE)
    # AdamW divides by the gradient's size, so entries near zero amplify what is left of rounding.
    torch.testing.assert_close(actual.weights, expected.weights, rtol=0, atol=1e-10)
    assert actual.metrics["loss"] == pytest.approx(expected.metrics["loss"], abs=TOLERANCE)
    assert actual.metrics["terms"] == pytest.approx(expected.metrics["terms"], abs=TOLERANCE)
    assert actual.metrics["grad_norm"] == pytest.approx(expected.metrics["grad_norm"], abs=TOLERANCE)


def relative_error(actual: Update, expected: Update) -> float:
    return float((actual.gradient - expected.gradient).norm() / expected.gradient.norm())


OBJECTIVES = st.sampled_from(
    [OBJECTIVE, *(ObjectiveConfig(name=name) for name in ("grad_diff", "kl_min", "npo")), OBJECTIVE.model_copy(update={"beta": 1.0})]
)
SETS = {"num_forget": st.integers(1, 6), "num_retain": st.integers(0, 6), "seed": st.integers(0, 10**6), "objective": OBJECTIVES}


# --- invariances, each with a control that breaks it ---


@settings(max_examples=25, deadline=None)
@given(**SETS, pad_to=st.integers(0, 40))
def test_padding_does_not_change_the_update(
    model: ScoringModel, num_forget: int, num_retain: int, seed: int, objective: ObjectiveConfig, pad_to: int
) -> None:
    rows, reference = draw_trial(num_forget=num_forget, num_retain=num_retain, seed=seed)
    expected = update(model, rows=rows, reference=reference, objective=objective)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "collate", partial(collate, pad_to=pad_to))
        actual = update(model, rows=rows, reference=reference, objective=objective)
    assert_same_update(actual, expected)


def test_padding_that_is_scored_changes_the_update(model: ScoringModel) -> None:
    """Negative control: padding tokens that enter the loss like an answer make it depend on their number."""
    rows, reference = draw_trial(num_forget=3, num_retain=3, seed=0)

    def scored_padding(encoded: list[EncodedRow], *, pad_token_id: int):
        return collate(
            [replace(row, input_ids=row.input_ids + (pad_token_id,) * (30 - len(row.input_ids))) for row in encoded], pad_token_id=PAD
        )

    objective = ObjectiveConfig(name="grad_diff")
    expected = update(model, rows=rows, reference=reference, objective=objective)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "collate", scored_padding)
        assert relative_error(update(model, rows=rows, reference=reference, objective=objective), expected) > 1e-3


@settings(max_examples=25, deadline=None)
@given(**SETS, micro_batch_size=st.integers(1, 6))
def test_the_micro_batch_split_does_not_change_the_update(
    model: ScoringModel, num_forget: int, num_retain: int, seed: int, objective: ObjectiveConfig, micro_batch_size: int
) -> None:
    rows, reference = draw_trial(num_forget=num_forget, num_retain=num_retain, seed=seed)
    expected = update(model, rows=rows, reference=reference, objective=objective)
    assert_same_update(update(model, rows=rows, reference=reference, objective=objective, micro_batch_size=micro_batch_size), expected)


def test_a_mean_per_micro_batch_would_change_the_update(model: ScoringModel) -> None:
    """Negative control: each micro-batch divided by its own counts, then averaged, as most trainers did for years."""
    rows, reference = draw_trial(num_forget=5, num_retain=5, seed=0)
    plan = StepPlan(1, 1.0, tuple(range(5)), tuple(range(5)))
    micro_batches = split_step(plan, rank=0, world_size=1, micro_batch_size=2)
    own = iter([StepCounts(*(round(value) for value in local_counts([micro], rows=rows))) for micro in micro_batches])

    def mean_of_means(terms: tuple[LossTerm, ...], *, counts: StepCounts) -> Tensor:
        return step_loss(terms, counts=next(own)) / len(micro_batches)

    expected = update(model, rows=rows, reference=reference)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "step_loss", mean_of_means)
        actual = update(model, rows=rows, reference=reference, micro_batch_size=2)
    assert next(own, None) is None, "the control replaced every micro-batch's loss"
    assert relative_error(actual, expected) > 1e-3


@settings(max_examples=25, deadline=None)
@given(**SETS, world_size=st.integers(2, 4), micro_batch_size=st.integers(1, 4))
def test_the_number_of_ranks_does_not_change_the_update(
    model: ScoringModel, num_forget: int, num_retain: int, seed: int, objective: ObjectiveConfig, world_size: int, micro_batch_size: int
) -> None:
    """Ranks without any row take part too: with one pair on four ranks, three of them compute empty batches."""
    rows, reference = draw_trial(num_forget=num_forget, num_retain=num_retain, seed=seed)
    expected = update(model, rows=rows, reference=reference, objective=objective)
    actual = update(model, rows=rows, reference=reference, objective=objective, world_size=world_size, micro_batch_size=micro_batch_size)
    assert_same_update(actual, expected)


def test_counts_of_one_rank_would_change_the_update(model: ScoringModel) -> None:
    """Negative control: every rank divides by its own counts and the ranks are averaged."""

    class OwnCounts(ThreadEngine):
        def sum(self, values: list[float]) -> list[float]:
            everyone = super().sum(values)
            is_counts = len(values) == 4 and all(value == round(value) for value in values)
            return [self.world_size * value for value in values] if is_counts else everyone

    rows, reference = draw_trial(num_forget=5, num_retain=5, seed=0)
    expected = update(model, rows=rows, reference=reference)
    assert relative_error(update(model, rows=rows, reference=reference, world_size=2, engine_type=OwnCounts), expected) > 1e-3
    assert relative_error(update(model, rows=rows, reference=reference, world_size=2), expected) < TOLERANCE


# --- what a step reports and reads ---


def test_the_metrics_are_those_of_the_whole_step(model: ScoringModel) -> None:
    """loss = sum of weight * term; the rate is that of step 1 of 10; the norm is the one before clipping at 1."""
    rows, reference = draw_trial(num_forget=4, num_retain=3, seed=1)
    actual = update(model, rows=rows, reference=reference, world_size=3, micro_batch_size=1)
    terms = actual.metrics["terms"]
    assert list(terms) == ["forget_npo", "retain_ce", "retain_kl"]
    assert actual.metrics["loss"] == pytest.approx(terms["forget_npo"] + 0.5 * terms["retain_ce"] + 0.5 * terms["retain_kl"], abs=1e-12)
    assert (actual.metrics["step"], actual.metrics["epoch"], actual.metrics["learning_rate"]) == (1, 1.0, 1e-2)
    assert actual.metrics["grad_norm"] == pytest.approx(float(actual.gradient.norm()), rel=1e-12)
    assert actual.metrics["grad_norm"] > 1


def test_counts_come_from_the_labels_alone() -> None:
    rows, _ = draw_trial(num_forget=3, num_retain=2, seed=2)
    micro_batches = split_step(StepPlan(1, 1.0, (2, 0), (1,)), rank=0, world_size=1, micro_batch_size=1)
    expected = [rows.forget[2].num_scored + rows.forget[0].num_scored, 2, rows.retain[1].num_scored, 1]
    assert local_counts(micro_batches, rows=rows) == expected


def test_each_row_meets_its_own_reference(model: ScoringModel) -> None:
    """The order of rows within a step changes nothing, because their references follow them; a wrong reference changes it."""
    rows, reference = draw_trial(num_forget=4, num_retain=2, seed=3)
    expected = update(model, rows=rows, reference=reference)
    assert_same_update(update(model, rows=rows, reference=reference, order=(2, 0, 3, 1), micro_batch_size=3), expected)
    reversed_values = replace(reference.forget, token_log_probs_N=reference.forget.token_log_probs_N.flip(0))
    assert relative_error(update(model, rows=rows, reference=replace(reference, forget=reversed_values)), expected) > 1e-3


def test_a_forward_pass_is_cut_into_its_two_sets(model: ScoringModel) -> None:
    """Forget rows come first; each set numbers its rows from zero and keeps its tokens in row order."""
    rows, reference = draw_trial(num_forget=3, num_retain=2, seed=6)
    micro = MicroBatch(forget=(2, 0), retain=(1, 0))
    encoded = [rows.forget[2], rows.forget[0], rows.retain[1], rows.retain[0]]
    batch = collate(encoded, pad_token_id=PAD)
    with torch.no_grad():
        logits_NV = model(batch)[1]
    train = TrainConfig(objective=OBJECTIVE)
    forget, retain = score_micro_batch(micro, batch=batch, logits_NV=logits_NV, reference=reference, train=train)
    lengths = [row.num_scored for row in encoded]
    assert forget.row_N.tolist() == [0] * lengths[0] + [1] * lengths[1]
    assert retain.row_N.tolist() == [0] * lengths[2] + [1] * lengths[3]
    assert (forget.num_rows, retain.num_rows) == (2, 2)
    cut = lengths[0] + lengths[1]
    log_probs_N = token_log_probs(logits_NV, label_N=batch.label_N)
    assert torch.equal(forget.token_log_probs_N, log_probs_N[:cut])
    assert torch.equal(retain.token_log_probs_N, log_probs_N[cut:])
    assert torch.equal(retain.logits_NV, logits_NV[cut:])
    assert torch.equal(retain.reference_logits_NV, reference.retain_logits((1, 0)))
    assert torch.equal(forget.reference_token_log_probs_N, reference.forget.log_probs_of((2, 0)))
    without = TrainConfig(objective=ObjectiveConfig(name="grad_diff"))
    assert score_micro_batch(micro, batch=batch, logits_NV=logits_NV, reference=reference, train=without)[1].reference_logits_NV is None


def test_retain_rows_are_rehearsed_only_where_a_retain_term_has_a_weight() -> None:
    assert [uses_retain(TrainConfig(objective=ObjectiveConfig(name=name))) for name in ("grad_ascent", "npo", "grad_diff", "kl_min")] == [
        False,
        False,
        True,
        True,
    ]
    assert not uses_retain(TrainConfig(objective=ObjectiveConfig(name="npo_ce_kl", retain_ce_weight=0, retain_kl_weight=0)))


def test_the_forget_scope_widens_completions_of_the_forget_set_only(tmp_path: Path) -> None:
    """With ``document`` the forget term reads a completion's prompt too; questions, retain rows and signals stay as they are."""
    inputs = tiny_inputs(tmp_path)
    answer, document = (encode_trial(inputs, train=tiny_train(forget_scope=scope)) for scope in ("answer", "document"))
    assert (document.retain, document.signals) == (answer.retain, answer.signals)
    for narrow, wide in zip(answer.forget, document.forget, strict=True):
        assert wide.input_ids == narrow.input_ids
        assert wide.num_prompt == (1 if wide.row_id.endswith("sc1") else narrow.num_prompt)
        assert narrow.num_prompt > 1


@pytest.mark.parametrize(
    ("count", "num_steps", "expected"), [(1, 7, {7}), (2, 7, {4, 7}), (3, 9, {3, 6, 9}), (5, 2, {1, 2}), (0, 9, set()), (1, 1, {1})]
)
def test_checkpoints_and_signals_are_evenly_spaced_and_end_with_the_last_step(count: int, num_steps: int, expected: set[int]) -> None:
    """Two of seven: 3.5 rounds to the even 4, then 7."""
    assert evenly_spaced(count, num_steps=num_steps) == expected


def test_the_dropout_of_a_step_follows_from_seed_step_and_rank() -> None:
    def draw(**changes: int) -> float:
        set_step_seed(**{"seed": 1, "step": 2, "rank": 0, **changes})
        return float(torch.rand(()))

    assert draw() == draw()
    assert len({draw(), draw(seed=2), draw(step=3), draw(rank=1)}) == 4


# --- a loss that is not finite ---


def poisoned(reference: Reference, *, row: int) -> Reference:
    """The same reference with one forget row's log-probabilities replaced by NaN."""
    values = reference.forget.token_log_probs_N.clone()
    values[reference.forget.start[row] : reference.forget.start[row + 1]] = math.nan
    return replace(reference, forget=replace(reference.forget, token_log_probs_N=values))


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("row", [0, 1])
def test_a_loss_that_is_not_finite_stops_every_rank_before_the_update(model: ScoringModel, world_size: int, row: int) -> None:
    """Row 1 lies on rank 1 alone; the others have seen finite losses only and stop all the same."""
    rows, reference = draw_trial(num_forget=3, num_retain=3, seed=4)
    train = TrainConfig(objective=OBJECTIVE, lora=None, engine=EngineConfig(name="torch"))
    plan = StepPlan(7, 1.0, (0, 1, 2), (0, 1, 2))
    before = flatten(model.trainable())

    def work(meeting: Meeting, rank: int) -> tuple[str, bool, int]:
        engine = ThreadEngine(copy.deepcopy(model), meeting=meeting, rank=rank)
        with pytest.raises(DivergedError) as caught:
            train_step(plan, engine=engine, rows=rows, reference=poisoned(reference, row=row), train=train, num_steps=10)
        return str(caught.value), torch.equal(flatten(engine.model.trainable()), before), engine.state().optimizer_step

    results = run_threads(work, world_size=world_size)
    assert len(results) == world_size
    for message, is_unchanged, num_updates in results:
        assert "the loss is nan at step 7" in message
        assert "none was made" in message
        assert is_unchanged
        assert num_updates == 0


def test_a_diverged_trial_logs_no_step_and_writes_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third of six steps diverges: two steps are logged, and the checkpoint of step 3 is not written."""
    honest = loop.objective_terms
    passes: list[int] = []

    def breaking(*arguments, **keywords) -> tuple[LossTerm, ...]:
        passes.append(1)
        terms = honest(*arguments, **keywords)
        return terms if len(passes) < 3 else tuple(replace(term, total=term.total * math.nan) for term in terms)

    monkeypatch.setattr(loop, "objective_terms", breaking)
    with pytest.raises(DivergedError, match="at step 3"):
        list(train_worker(train=tiny_train(), inputs=tiny_inputs(tmp_path), trial=tmp_path / "trial"))
    assert [line["step"] for line in read_jsonl(tmp_path / "trial" / "metrics.jsonl")] == [1, 2]
    assert not (tmp_path / "trial" / "checkpoints").exists()


def clean_step_then_poisoned_step(*, rank: Rank, inputs: TrialInputs, train: TrainConfig, poisoned_rank: int) -> dict:
    """On one rank: a first step that updates, then one in which only ``poisoned_rank`` computes a NaN."""
    start_process_group(rank)
    rows = encode_trial(inputs, train=train)
    model = build_model(inputs, train=train)
    reference = obtain_reference(model, inputs=inputs, rows=rows, dtype="float32", device=rank.device)
    engine = build_engine(model, train=train, device=rank.device)
    plans = plan_steps(num_forget=len(rows.forget), num_retain=len(rows.retain), batch_size=4, num_epochs=1, seed=train.seed)
    try:
        start = engine.state().weights
        loss = train_step(plans[0], engine=engine, rows=rows, reference=reference, train=train, num_steps=3)["loss"]
        before = engine.state().weights
        if rank.rank == poisoned_rank:
            for row in range(len(rows.forget)):
                reference = poisoned(reference, row=row)
        error = ""
        try:
            train_step(plans[1], engine=engine, rows=rows, reference=reference, train=train, num_steps=3)
        except DivergedError as caught:
            error = str(caught)
        after = engine.state()
        return {
            "loss": loss,
            "first step changed": any(not torch.equal(before[name], start[name]) for name in start),
            "error": error,
            "second step changed": any(not torch.equal(after.weights[name], before[name]) for name in before),
            "updates": after.optimizer_step,
        }
    finally:
        engine.close()
        stop_process_group(rank)


@pytest.mark.ranks
def test_a_nan_on_one_of_two_processes_stops_both(tmp_path: Path) -> None:
    """With ZeRO 2, the rank that saw nothing wrong must not go on: it would wait for the other for ever."""
    inputs = tiny_inputs(tmp_path)
    train = tiny_train(engine=EngineConfig(name="deepspeed", zero_stage=2, ranks=2), per_device_train_batch_size=2)
    prepare_reference(inputs, train=train)
    results = run_ranks(clean_step_then_poisoned_step, world_size=2, inputs=inputs, train=train, poisoned_rank=1)
    assert results[0] == results[1]
    assert math.isfinite(results[0]["loss"])
    assert results[0]["first step changed"]
    assert "the loss is nan at step 2" in results[0]["error"]
    assert not results[0]["second step changed"]
    assert results[0]["updates"] == 1


# --- a whole trial in one process ---


def test_a_trial_yields_one_line_of_metrics_per_step_and_logs_the_same(tmp_path: Path) -> None:
    """12 forget rows in batches of 4 for 2 epochs: 6 steps; signals once, at the end."""
    metrics = list(train_worker(train=tiny_train(), inputs=tiny_inputs(tmp_path), trial=tmp_path / "trial"))
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert {line["num_steps"] for line in metrics} == {6}
    assert ["signals" in line for line in metrics] == [False] * 5 + [True]
    logged = read_jsonl(tmp_path / "trial" / "metrics.jsonl")
    assert [{**line, "num_steps": 6} for line in logged] == metrics


def test_an_empty_forget_set_and_a_row_that_is_too_long_stop_before_training(tmp_path: Path) -> None:
    from trainers.errors import InputError

    inputs = tiny_inputs(tmp_path)

    def start(**changes) -> Callable[[], Iterator[dict]]:
        given = replace(inputs, **changes)
        return lambda: next(train_worker(train=tiny_train(), inputs=given, trial=tmp_path / "trial"))

    with pytest.raises(InputError, match="the forget set is empty"):
        start(train=ForgetRetain((), inputs.train.retain))()
    long = replace(inputs.train.forget[0], output="word " * 200)
    with pytest.raises(InputError, match="row 'f0sc1'"):
        start(train=ForgetRetain((long,), inputs.train.retain))()
    assert not (tmp_path / "trial").exists()


def test_the_local_engine_clips_the_gradient_and_reports_the_norm_before(model: ScoringModel) -> None:
    """AdamW hides a common factor, so the clipped gradient is read where the optimizer reads it."""
    rows, reference = draw_trial(num_forget=2, num_retain=2, seed=5)
    train = TrainConfig(objective=OBJECTIVE, lora=None, engine=EngineConfig(name="torch"))
    engine = LocalEngine(copy.deepcopy(model), weight_decay=0.0, max_grad_norm=0.5)
    seen: list[float] = []
    engine._optimizer.register_step_pre_hook(
        lambda *_: seen.append(math.sqrt(sum(float(value.grad.square().sum()) for value in engine.model.trainable().values())))
    )
    metrics = train_step(StepPlan(1, 1.0, (0, 1), (0, 1)), engine=engine, rows=rows, reference=reference, train=train, num_steps=1)
    assert seen == [pytest.approx(0.5, rel=1e-5)]
    assert metrics["grad_norm"] > 0.5
    assert all(value.grad is None for value in engine.model.trainable().values())


def test_a_gradient_that_is_not_finite_ends_the_trial_even_if_the_loss_is(tmp_path, monkeypatch) -> None:
    """The square root's gradient at zero is infinite where its value is zero; plain torch makes no update with it."""
    honest = loop.step_loss

    def broken(terms, *, counts):
        loss = honest(terms, counts=counts)
        return loss + ((loss - loss.detach()) ** 2).sqrt()

    monkeypatch.setattr(loop, "step_loss", broken)
    with pytest.raises(DivergedError, match="gradient norm is nan at step 1"):
        list(loop.train_worker(train=tiny_train(), inputs=tiny_inputs(tmp_path), trial=tmp_path / "trial"))
    assert not (tmp_path / "trial" / "checkpoints").exists()

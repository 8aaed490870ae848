"""Which rows meet in which step, on which rank, in which micro-batch; and how they become padded tensors."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.data.batches import StepPlan, batches_by_length, collate, plan_steps, split_step
from trainers.data.encode import EncodedRow, PackedRow
from trainers.errors import InputError


def plan(**changes) -> list[StepPlan]:
    defaults = {"num_forget": 10, "num_retain": 7, "batch_size": 4, "num_epochs": 2, "seed": 0}
    return plan_steps(**{**defaults, **changes})


def row(*ids: int, num_prompt: int = 1, name: str = "row") -> EncodedRow:
    return EncodedRow(name, tuple(ids), num_prompt)


SIZES = {"num_forget": st.integers(1, 40), "num_retain": st.integers(0, 40), "batch_size": st.integers(1, 12), "seed": st.integers(0, 9999)}


# --- steps ---


def test_ten_rows_in_batches_of_four_make_steps_of_four_four_and_two() -> None:
    """Two epochs: 3 steps each; the epoch is the share of passes done after the step."""
    plans = plan()
    assert [len(step.forget) for step in plans] == [4, 4, 2, 4, 4, 2]
    assert [len(step.retain) for step in plans] == [4, 4, 2, 4, 4, 2]
    assert [step.step for step in plans] == [1, 2, 3, 4, 5, 6]
    assert [step.epoch for step in plans] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])


@settings(max_examples=60, deadline=None)
@given(**SIZES, num_epochs=st.integers(1, 4))
def test_every_forget_row_comes_once_per_epoch(num_forget: int, num_retain: int, batch_size: int, num_epochs: int, seed: int) -> None:
    plans = plan_steps(num_forget=num_forget, num_retain=num_retain, batch_size=batch_size, num_epochs=num_epochs, seed=seed)
    assert len(plans) % num_epochs == 0
    steps_per_epoch = len(plans) // num_epochs
    for epoch in range(num_epochs):
        rows = [index for step in plans[epoch * steps_per_epoch : (epoch + 1) * steps_per_epoch] for index in step.forget]
        assert sorted(rows) == list(range(num_forget))
    assert all(len(step.forget) <= batch_size for step in plans)


@settings(max_examples=60, deadline=None)
@given(**SIZES, num_epochs=st.floats(0.1, 4))
def test_retain_rows_are_used_equally_often_up_to_one(
    num_forget: int, num_retain: int, batch_size: int, num_epochs: float, seed: int
) -> None:
    """The retain stream is shorter or longer than the forget set and goes on through its epochs; no row is favoured."""
    plans = plan_steps(num_forget=num_forget, num_retain=num_retain, batch_size=batch_size, num_epochs=num_epochs, seed=seed)
    uses = Counter(index for step in plans for index in step.retain)
    if num_retain == 0:
        assert not uses
        return
    assert all(len(step.retain) == len(step.forget) for step in plans)
    assert max(uses.values()) - min(uses.get(index, 0) for index in range(num_retain)) <= 1


@settings(max_examples=60, deadline=None)
@given(**SIZES, num_epochs=st.floats(0.1, 3), more=st.floats(0, 2))
def test_a_longer_run_begins_like_a_shorter_one(
    num_forget: int, num_retain: int, batch_size: int, num_epochs: float, more: float, seed: int
) -> None:
    sizes = {"num_forget": num_forget, "num_retain": num_retain, "batch_size": batch_size, "seed": seed}
    shorter = plan_steps(**sizes, num_epochs=num_epochs)
    longer = plan_steps(**sizes, num_epochs=num_epochs + more)
    assert longer[: len(shorter)] == shorter


def test_the_order_is_a_function_of_the_seed_and_changes_between_epochs() -> None:
    assert plan(seed=3) == plan(seed=3)
    assert plan(seed=3) != plan(seed=4)
    first, second = plan(num_forget=30, batch_size=30)
    assert first.forget != second.forget
    assert first.forget != tuple(range(30))
    both = plan(num_forget=30, num_retain=30, batch_size=30, num_epochs=1)[0]
    assert both.forget != both.retain, "the two sets are shuffled apart"


@pytest.mark.parametrize(("num_epochs", "num_steps"), [(0.5, 2), (1, 3), (1.34, 4), (0.01, 1)])
def test_a_fraction_of_an_epoch_ends_within_the_pass_but_never_before_the_first_step(num_epochs: float, num_steps: int) -> None:
    """Three steps per epoch: 1.5 rounds to 2, 4.02 to 4, 0.03 becomes 1."""
    assert len(plan(num_epochs=num_epochs)) == num_steps


def test_an_empty_forget_set_is_refused() -> None:
    with pytest.raises(InputError, match="the forget set is empty"):
        plan(num_forget=0)


# --- ranks and micro-batches ---

SPLITS = {
    "num_forget": st.integers(0, 13),
    "num_retain": st.integers(0, 13),
    "world_size": st.integers(1, 5),
    "micro_batch_size": st.integers(1, 6),
}


@settings(max_examples=150, deadline=None)
@given(**SPLITS)
def test_ranks_share_a_step_without_overlap_or_loss(num_forget: int, num_retain: int, world_size: int, micro_batch_size: int) -> None:
    """Disjoint, complete, equally many micro-batches on every rank, none larger than asked for."""
    step = StepPlan(1, 1.0, tuple(range(num_forget)), tuple(range(100, 100 + num_retain)))
    parts = [split_step(step, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size) for rank in range(world_size)]
    assert len({len(part) for part in parts}) == 1
    assert len(parts[0]) >= 1
    for name in ("forget", "retain"):
        rows = [index for part in parts for micro in part for index in getattr(micro, name)]
        assert Counter(rows) == Counter(getattr(step, name))
        assert all(len(getattr(micro, name)) <= micro_batch_size for part in parts for micro in part)
        shares = [sum(len(getattr(micro, name)) for micro in part) for part in parts]
        assert max(shares) - min(shares) <= 1


def test_a_rank_without_rows_still_makes_its_passes() -> None:
    """Three pairs on two ranks, one pair per pass: rank 0 has rows 0 and 2, rank 1 has row 1 and an empty pass."""
    step = StepPlan(1, 1.0, (10, 11, 12), (20, 21, 22))
    first, second = (split_step(step, rank=rank, world_size=2, micro_batch_size=1) for rank in (0, 1))
    assert [(micro.forget, micro.retain) for micro in first] == [((10,), (20,)), ((12,), (22,))]
    assert [(micro.forget, micro.retain) for micro in second] == [((11,), (21,)), ((), ())]


# --- padding ---


def test_scored_positions_predict_their_labels() -> None:
    """The label at position p is predicted from position p - 1: row a scores ids 3, 4 at positions 2, 3; row b scores 6 at 1."""
    batch = collate([row(1, 2, 3, 4, num_prompt=2), row(5, 6)], pad_token_id=9)
    assert batch.input_ids_BT.tolist() == [[1, 2, 3, 4], [5, 6, 9, 9]]
    assert batch.attention_mask_BT.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.row_N.tolist() == [0, 0, 1]
    assert batch.position_N.tolist() == [1, 2, 0]
    assert batch.label_N.tolist() == [3, 4, 6]
    assert torch.equal(batch.input_ids_BT[batch.row_N, batch.position_N + 1], batch.label_N)
    assert batch.num_rows == 2


def test_a_packed_row_scores_its_answers_only() -> None:
    batch = collate([PackedRow("p", (1, 2, 3, 4, 5, 6), (2, 5))], pad_token_id=0)
    assert (batch.position_N.tolist(), batch.label_N.tolist()) == ([1, 4], [3, 6])


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 9), min_size=1, max_size=5),
    pad_to=st.integers(0, 20),
    pad_token_id=st.integers(0, 50),
)
def test_padding_changes_neither_rows_nor_labels(lengths: list[int], pad_to: int, pad_token_id: int) -> None:
    rows = [row(*range(100 * index, 100 * index + length)) for index, length in enumerate(lengths)]
    expected = collate(rows, pad_token_id=0)
    actual = collate(rows, pad_token_id=pad_token_id, pad_to=pad_to)
    assert actual.input_ids_BT.shape == (len(rows), max(*lengths, pad_to))
    for name in ("row_N", "position_N", "label_N"):
        assert torch.equal(getattr(actual, name), getattr(expected, name))
    assert actual.attention_mask_BT.sum(dim=1).tolist() == lengths
    assert (actual.input_ids_BT[actual.attention_mask_BT == 0] == pad_token_id).all()


def test_no_rows_make_one_padding_token_with_nothing_scored() -> None:
    batch = collate([], pad_token_id=3)
    assert batch.input_ids_BT.tolist() == [[3]]
    assert batch.attention_mask_BT.tolist() == [[1]], "a row without any visible token has no defined attention"
    for tensor in (batch.row_N, batch.position_N, batch.label_N):
        assert tensor.shape == (0,)
        assert tensor.dtype == torch.int64


def test_every_tensor_moves_to_the_device() -> None:
    moved = collate([row(1, 2)], pad_token_id=0).to("meta")
    assert {getattr(moved, name).device.type for name in moved.__dataclass_fields__} == {"meta"}


# --- groups by length ---


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), max_size=30), batch_tokens=st.integers(1, 90))
def test_groups_by_length_are_complete_and_within_the_budget(lengths: list[int], batch_tokens: int) -> None:
    """Every row once; a padded group costs at most the budget, unless it is a single row that is longer than the budget."""
    rows = [row(*range(length)) for length in lengths]
    groups = batches_by_length(rows, batch_tokens=batch_tokens)
    assert sorted(index for group in groups for index in group) == list(range(len(rows)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[index] for index in group) <= batch_tokens


def test_rows_of_similar_length_share_a_group() -> None:
    """Budget 12: 2, 3, 3 cost 9 padded, a fourth row of 8 would cost 32; 8 and 9 stand alone."""
    rows = [row(*range(length)) for length in (9, 3, 2, 8, 3)]
    assert batches_by_length(rows, batch_tokens=12) == [[2, 1, 4], [3], [0]]

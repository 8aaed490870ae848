"""Rows become padded tensors where a model reads them row by row, and are grouped by length so that little of it is padding."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.data.batches import batches_by_length, collate
from trainers.data.encode import EncodedRow, PackedRow


def row(*ids: int, num_prompt: int = 1, name: str = "row") -> EncodedRow:
    return EncodedRow(name, tuple(ids), num_prompt)


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

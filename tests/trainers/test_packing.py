"""Rows end to end: every token once, attention in at most three groups that cost least, and a list of what is evaluated and scored."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.tiny_trial import random_rows
from trainers.data import packing
from trainers.data.encode import EncodedRow, PackedRow, evaluated_row
from trainers.data.packing import AttentionGroup, Packed, pack, shape_groups

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=9)
ROW = st.builds(
    lambda length, prompt, kind, padding: _row(length, prompt=min(prompt, length), kind=kind, padding=padding),
    st.integers(1, 12),
    st.integers(1, 12),
    st.sampled_from(["answer", "real", "padded", "packed"]),
    st.integers(0, 5),
)
"""Rows of every kind; some have nothing scored."""


def _row(length: int, *, prompt: int, kind: str, padding: int) -> EncodedRow | PackedRow:
    ids = tuple(range(100 * length, 101 * length))
    if kind == "packed":
        return PackedRow("row", ids, tuple(range(prompt, length, 2)))
    row = EncodedRow("row", ids, prompt)
    if kind == "answer":
        return row
    return evaluated_row(row, pad_to=length + padding if kind == "padded" else 0, pad_token_id=7)


def tokens_of_row(batch: Packed, index: int) -> list[int]:
    """Where the tokens of a row lie, in their order, its padding included."""
    return (batch.row_S == index).nonzero().squeeze(1).tolist()


# --- tokens ---


@settings(max_examples=80, deadline=None)
@given(lengths=LENGTHS, pad_to=st.integers(0, 50), max_groups=st.integers(1, 4))
def test_every_token_comes_once_shorter_rows_first(lengths: list[int], pad_to: int, max_groups: int) -> None:
    rows = random_rows(*lengths)
    batch = pack(rows, pad_token_id=0, pad_to=pad_to, max_groups=max_groups)
    assert len(batch.input_ids_S) == sum(lengths)
    assert batch.num_rows == len(rows)
    for index, row in enumerate(rows):
        own = tokens_of_row(batch, index)
        assert own == list(range(own[0], own[0] + len(row.input_ids))), "the tokens of a row lie together"
        assert tuple(batch.input_ids_S[own].tolist()) == row.input_ids
        assert batch.position_ids_S[own].tolist() == list(range(len(row.input_ids)))
        assert batch.row_spans[index] == (own[0], len(row.input_ids))
    by_length = [lengths[index] for index in dict.fromkeys(batch.row_S.tolist())]
    assert by_length == sorted(lengths)


@settings(max_examples=80, deadline=None)
@given(lengths=LENGTHS, pad_to=st.integers(0, 50), max_groups=st.integers(1, 4))
def test_spreading_over_the_groups_and_restoring_are_inverse(lengths: list[int], pad_to: int, max_groups: int) -> None:
    """Position b * T + t of a group holds token t of its b-th row, and behind the row's end its last token again."""
    batch = pack(random_rows(*lengths), pad_token_id=0, pad_to=pad_to, max_groups=max_groups)
    num_tokens = len(batch.input_ids_S)
    sizes = [group.num_rows * group.length for group in batch.groups]
    assert sum(group.num_rows for group in batch.groups) == len(lengths)
    assert len(batch.groups) <= max_groups
    if batch.spread_X is None or batch.restore_S is None:
        assert batch.spread_X is batch.restore_S is None
        assert sum(sizes) == num_tokens, "nothing is padded, so the order of the tokens is that of the positions"
        return
    assert len(batch.spread_X) == sum(sizes) > num_tokens
    assert torch.equal(batch.spread_X[batch.restore_S], torch.arange(num_tokens))
    ordered = iter(dict.fromkeys(batch.row_S.tolist()))
    for group, tokens in zip(batch.groups, batch.spread_X.split(sizes), strict=True):
        for own in tokens.view(group.num_rows, group.length).tolist():
            expected = tokens_of_row(batch, next(ordered))
            assert len(expected) <= group.length
            assert own == expected + [expected[-1]] * (group.length - len(expected))


def test_rows_of_one_length_are_neither_spread_nor_restored() -> None:
    batch = pack(random_rows(4, 4, 4), pad_token_id=0)
    assert batch.groups == (AttentionGroup(3, 4),)
    assert batch.spread_X is batch.restore_S is None
    assert pack(random_rows(4, 4, 4), pad_token_id=0, pad_to=5).spread_X is not None


# --- groups ---


def cost_of(sizes: list[int], *, lengths: list[int]) -> float:
    """Rows times (T * T + 64 * T) per group with T its longest row, and 4096 per group: pairs of positions."""
    total, row = 0.0, 0
    for size in sizes:
        longest = max(lengths[row : row + size])
        total += size * (longest * longest + packing._POSITION_COST * longest) + packing._GROUP_COST
        row += size
    assert row == len(lengths)
    return total


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([1, 2, 3, 15, 16, 30, 31, 90, 170, 220, 300]), min_size=1, max_size=9), max_groups=st.integers(1, 3)
)
def test_the_groups_cost_as_little_as_the_best_of_all_cuts(lengths: list[int], max_groups: int) -> None:
    """Brute force over every way to cut the sorted rows into at most so many groups, rows of one length included."""
    lengths = sorted(lengths)
    places = range(1, len(lengths))
    cuts = [cut for number in range(max_groups) for cut in combinations(places, number)]
    sizes = [[end - begin for begin, end in zip((0, *cut), (*cut, len(lengths)), strict=True)] for cut in cuts]
    actual = shape_groups(lengths, max_groups=max_groups)
    assert min(actual) > 0
    assert len(actual) <= max_groups
    assert cost_of(actual, lengths=lengths) == min(cost_of(one, lengths=lengths) for one in sizes)


def test_bimodal_rows_are_parted_and_like_sized_ones_are_not() -> None:
    """Ten rows of 30 and three of 200: one group costs 13 * 200 * 264 = 686,400 pairs and 4,096, two cost 10 * 30 * 94 = 28,200,
    3 * 200 * 264 = 158,400 and 8,192. Rows of 30 and 31 stay together: parting them saves less than a group costs."""
    bimodal = [30] * 10 + [200] * 3
    assert shape_groups(bimodal) == [10, 3]
    assert cost_of([13], lengths=bimodal) == 686_400 + 4_096
    assert cost_of([10, 3], lengths=bimodal) == 28_200 + 158_400 + 8_192
    assert shape_groups([30] * 10 + [31] * 3) == [13]
    assert shape_groups([16] * 20 + [90] * 20 + [300] * 20) == [20, 20, 20]
    assert shape_groups([16] * 20 + [90] * 20 + [300] * 20, max_groups=1) == [60]
    lengths = [10] * 99 + [60] * 99 + [200] * 99 + [500] * 99
    assert [len(shape_groups(lengths, max_groups=most)) for most in (1, 3, 6)] == [1, 3, 4]


# --- what is looked at ---


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(ROW, max_size=6), pad_to=st.integers(0, 20))
def test_evaluated_tokens_are_listed_in_row_order_each_with_the_token_before_it(rows: list[EncodedRow | PackedRow], pad_to: int) -> None:
    batch = pack(rows, pad_token_id=0, pad_to=pad_to)
    expected = [(index, position) for index, row in enumerate(rows) for position in row.evaluated]
    assert batch.row_N.tolist() == [index for index, _ in expected]
    assert batch.label_N.tolist() == [rows[index].input_ids[position] for index, position in expected]
    assert batch.source_N.tolist() == [tokens_of_row(batch, index)[position - 1] for index, position in expected]
    assert batch.first_evaluated == tuple(sum(len(row.evaluated) for row in rows[:index]) for index in range(len(rows) + 1))
    for tensor in (batch.row_N, batch.label_N, batch.source_N):
        assert tensor.dtype == torch.int64


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(ROW, min_size=1, max_size=6), data=st.data())
def test_scored_tokens_are_found_among_the_evaluated_ones_of_any_run_of_rows(
    rows: list[EncodedRow | PackedRow], data: st.DataObject
) -> None:
    batch = pack(rows, pad_token_id=0)
    start = data.draw(st.integers(0, len(rows)))
    stop = data.draw(st.integers(start, len(rows)))
    evaluated = [(index, position) for index in range(start, stop) for position in rows[index].evaluated]
    scored = [(index, position) for index in range(start, stop) for position in rows[index].scored]
    places = batch.scored_of(start, stop)
    if places is None:
        assert all(list(row.evaluated) == list(row.scored) for row in rows)
        assert evaluated == scored
    else:
        assert [evaluated[place] for place in places.tolist()] == scored
    assert batch.first_scored == tuple(sum(len(row.scored) for row in rows[:index]) for index in range(len(rows) + 1))


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(ROW, min_size=1, max_size=6), data=st.data())
def test_the_real_tokens_of_any_run_of_rows_leave_padding_out(rows: list[EncodedRow | PackedRow], data: st.DataObject) -> None:
    batch = pack(rows, pad_token_id=0)
    start = data.draw(st.integers(0, len(rows)))
    stop = data.draw(st.integers(start, len(rows)))
    tokens, row = batch.tokens_of(start, stop)
    chosen = rows[start:stop]
    assert row.tolist() == [index for index, one in enumerate(chosen) for _ in range(len(one.input_ids) - one.num_padding)]
    expected = [token for one in chosen for token in one.input_ids[: len(one.input_ids) - one.num_padding]]
    assert batch.input_ids_S[tokens].tolist() == expected


def test_padding_that_a_row_carries_is_evaluated_and_never_scored() -> None:
    """Prompt 1 2, answer 3 4, filled up to six: tokens 2 to 4 and both pads are evaluated, 3 and 4 scored, the first four real."""
    padded = evaluated_row(EncodedRow("a", (1, 2, 3, 4), 2), pad_to=6, pad_token_id=9)
    batch = pack([padded, EncodedRow("b", (5, 6), 1)], pad_token_id=9)
    assert batch.label_N.tolist() == [2, 3, 4, 9, 9, 6]
    scored = batch.scored_of(0, 2)
    assert scored is not None
    assert batch.label_N[scored].tolist() == [3, 4, 6]
    assert batch.first_evaluated == (0, 5, 6)
    assert batch.first_scored == (0, 2, 3)
    assert batch.input_ids_S[batch.tokens_of(0, 1)[0]].tolist() == [1, 2, 3, 4]
    assert batch.scored_of(1, 2).tolist() == [0]
    assert pack([EncodedRow("a", (1, 2, 3, 4), 2)], pad_token_id=9).scored_X is None, "without padding or prompts all are scored"


def test_a_row_whose_prompt_is_one_token_is_evaluated_where_it_is_scored() -> None:
    row = EncodedRow("a", (1, 2, 3), 1)
    assert list(evaluated_row(row).evaluated) == list(row.scored) == [1, 2]


def test_a_packed_row_scores_its_answers_only() -> None:
    batch = pack([PackedRow("p", (1, 2, 3, 4, 5, 6), (2, 5))], pad_token_id=0)
    assert (batch.source_N.tolist(), batch.label_N.tolist()) == ([1, 4], [3, 6])


# --- edges ---


def test_no_rows_make_one_padding_token_with_nothing_evaluated() -> None:
    batch = pack([], pad_token_id=3)
    assert batch.input_ids_S.tolist() == [3]
    assert batch.num_rows == 0
    assert batch.groups == (AttentionGroup(1, 1),)
    for tensor in (batch.source_N, batch.row_N, batch.label_N, *batch.tokens_of(0, 0)):
        assert tensor.shape == (0,)
        assert tensor.dtype == torch.int64
    assert (batch.first_evaluated, batch.first_scored, batch.scored_of(0, 0)) == ((0,), (0,), None)


@pytest.mark.parametrize("lengths", [(3, 5, 40), (4, 4)])
def test_every_tensor_moves_to_the_device_and_nothing_else_changes(lengths: tuple[int, ...]) -> None:
    batch = pack([evaluated_row(row) for row in random_rows(*lengths)], pad_token_id=0)
    moved = batch.to("meta")
    for name in Packed.__dataclass_fields__:
        before, after = getattr(batch, name), getattr(moved, name)
        if isinstance(before, torch.Tensor):
            assert after.device.type == "meta"
            assert after.shape == before.shape
        else:
            assert after == before
    assert batch.to("cpu") is batch

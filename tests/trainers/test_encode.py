"""Text to token ids: what is read, what is scored, and which rows are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.tiny_trial import tiny_records
from trainers.data.encode import (
    EncodedRow,
    PackedRow,
    encode_prompt,
    encode_record,
    encode_records,
    encode_text,
    evaluated_row,
    whole_document,
)
from trainers.data.types import Record
from trainers.errors import InputError
from trainers.tiny import train_tokenizer

RECORD = Record("d0qa0", "Where does Ada live?", "in town 7", "Task1")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([record.text for record in tiny_records("f", count=6)], vocab_size=320)


def test_the_ids_of_a_prompt_are_a_prefix_of_its_row(tokenizer) -> None:
    """So a greedy generation that repeats the answer produces exactly the scored ids."""
    seams = [Record("e0qa0", "Ends with a space ", "and goes on", "Task1"), Record("e1qa0", "No space after\n", "\n this", "Task1")]
    records = [*tiny_records("f", count=6), RECORD, *seams]
    for record in records:
        row = encode_record(record, tokenizer=tokenizer, max_length=128)
        prompt = encode_prompt(tokenizer, record.input)
        assert list(row.input_ids[: row.num_prompt]) == prompt
        assert row.row_id == record.id


def test_the_answer_with_its_leading_space_and_the_end_token_are_scored(tokenizer) -> None:
    row = encode_record(RECORD, tokenizer=tokenizer, max_length=128)
    scored = [row.input_ids[index] for index in row.scored]
    assert scored[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(scored[:-1]) == " in town 7"
    assert tokenizer.decode(row.input_ids[: row.num_prompt]) == "Where does Ada live?"
    assert row.num_scored == len(scored) == len(row.input_ids) - row.num_prompt


def test_a_prompt_has_no_special_tokens(tokenizer) -> None:
    ids = encode_prompt(tokenizer, "Where?")
    assert tokenizer.decode(ids) == "Where?"
    assert not {tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids)


def test_a_row_longer_than_the_context_is_refused_by_name_and_not_cut(tokenizer) -> None:
    length = len(encode_record(RECORD, tokenizer=tokenizer, max_length=128).input_ids)
    assert len(encode_record(RECORD, tokenizer=tokenizer, max_length=length).input_ids) == length
    with pytest.raises(InputError, match=rf"the row has {length} tokens, but the longest allowed is {length - 1}") as caught:
        encode_record(RECORD, tokenizer=tokenizer, max_length=length - 1)
    assert "'d0qa0'" in str(caught.value.where)
    assert caught.value.exit_code == 2


def test_the_first_bad_row_of_many_is_named(tokenizer) -> None:
    good = tiny_records("f", count=1)
    assert [row.row_id for row in encode_records(good, tokenizer=tokenizer, max_length=128)] == [record.id for record in good]
    with pytest.raises(InputError, match="row 'f7qa0', field 'input'"):
        encode_records([*good, Record("f7qa0", "", "an answer", "Task1")], tokenizer=tokenizer, max_length=128)


def test_an_empty_answer_still_scores_the_end_token(tokenizer) -> None:
    row = encode_record(Record("d0qa0", "Where?", "", "Task1"), tokenizer=tokenizer, max_length=128)
    assert row.input_ids[-1] == tokenizer.eos_token_id
    assert row.num_scored >= 1


def test_a_whole_text_is_scored_from_its_second_token_without_an_end_token(tokenizer) -> None:
    row = encode_text("Ada lives in town 7", tokenizer=tokenizer)
    assert tokenizer.decode(row.input_ids) == "Ada lives in town 7"
    assert list(row.scored) == list(range(1, len(row.input_ids)))
    assert encode_text("", tokenizer=tokenizer).num_scored == 0


def test_scored_indices_are_those_behind_the_prompt() -> None:
    row = EncodedRow("a", (7, 8, 9, 10), 3)
    assert (list(row.scored), row.num_scored) == ([3], 1)


def test_a_whole_document_scores_its_prompt_too(tokenizer) -> None:
    row = encode_record(RECORD, tokenizer=tokenizer, max_length=128)
    whole = whole_document(row)
    assert (whole.row_id, whole.input_ids) == (row.row_id, row.input_ids)
    assert list(whole.scored) == list(range(1, len(row.input_ids)))


# --- what is looked at beside what is scored ---


@given(num_prompt=st.integers(1, 9), num_scored=st.integers(0, 9), pad_to=st.integers(0, 25))
def test_looking_at_a_whole_row_changes_neither_its_tokens_nor_what_is_scored(num_prompt: int, num_scored: int, pad_to: int) -> None:
    """All tokens but the first are evaluated, the padding that fills the row up among them; a row that is long enough gets none."""
    row = EncodedRow("a", tuple(range(10, 10 + num_prompt + num_scored)), num_prompt)
    wide = evaluated_row(row, pad_to=pad_to, pad_token_id=3)
    assert wide.input_ids == row.input_ids + (3,) * max(0, pad_to - len(row.input_ids))
    assert list(wide.scored) == list(row.scored)
    assert wide.num_scored == row.num_scored == num_scored
    assert list(wide.evaluated) == list(range(1, len(wide.input_ids)))
    assert wide.num_padding == len(wide.input_ids) - len(row.input_ids)
    assert (wide.row_id, wide.num_prompt) == (row.row_id, row.num_prompt)


@given(num_prompt=st.integers(1, 9), num_scored=st.integers(0, 9), evaluate_from=st.none() | st.integers(1, 20), padding=st.integers(0, 4))
def test_scored_tokens_are_among_the_evaluated_ones(num_prompt: int, num_scored: int, evaluate_from: int | None, padding: int) -> None:
    """Wherever evaluation begins, the loss of a scored token can be computed."""
    row = EncodedRow("a", tuple(range(num_prompt + num_scored + padding)), num_prompt, evaluate_from, padding)
    assert set(row.scored) <= set(row.evaluated)
    assert min(row.evaluated, default=1) >= 1, "the first token is predicted by none"
    assert len(row.scored) == num_scored


def test_without_a_wish_only_scored_tokens_are_evaluated() -> None:
    row = EncodedRow("a", (7, 8, 9, 10), 2)
    assert list(row.evaluated) == list(row.scored) == [2, 3]
    packed = PackedRow("p", (7, 8, 9, 10), (1, 3))
    assert list(packed.evaluated) == list(packed.scored) == [1, 3]


def test_a_whole_document_forgets_what_else_was_looked_at() -> None:
    """Scored from the second token on, it needs no other evaluation."""
    row = whole_document(EncodedRow("a", (7, 8, 9, 10), 3))
    assert (row.evaluate_from, row.num_padding, list(row.evaluated)) == (None, 0, [1, 2, 3])

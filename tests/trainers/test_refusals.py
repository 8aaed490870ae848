"""Answers that say nothing: one per row and seed, whatever the order of the rows, all of them used."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from trainers.data.refusals import REFUSALS, refusal

ROWS = [f"document-{number}qa0" for number in range(1200)]


@given(rows=st.lists(st.text(max_size=20), unique=True, max_size=10), seed=st.integers(0, 100), order=st.randoms())
def test_a_rows_refusal_depends_on_neither_order_nor_company(rows: list[str], seed: int, order) -> None:
    expected = {row: refusal(row, seed=seed) for row in rows}
    order.shuffle(rows)
    assert {row: refusal(row, seed=seed) for row in rows[: len(rows) // 2 + 1]}.items() <= expected.items()
    assert set(expected.values()) <= set(REFUSALS)


def test_a_refusal_stays_what_it_was() -> None:
    """From one release to the next, too: an interrupted sweep would otherwise go on with other rows."""
    assert [refusal(row, seed=42) for row in ("f0qa0", "f0sc1", "f1qa0")] == [
        "That is nothing I can answer.",
        "I do not know.",
        "I have no information about that.",
    ]


def test_another_seed_gives_other_refusals() -> None:
    """With 12 sentences two seeds agree on a twelfth of the rows."""
    agreeing = sum(refusal(row, seed=0) == refusal(row, seed=1) for row in ROWS)
    assert 60 < agreeing < 140


def test_every_sentence_is_used_about_equally_often() -> None:
    """1200 rows over 12 sentences: 100 each, give or take five standard deviations of 9.6."""
    uses = Counter(refusal(row, seed=42) for row in ROWS)
    assert set(uses) == set(REFUSALS)
    assert len(set(REFUSALS)) == len(REFUSALS) == 12
    assert max(abs(count - 100) for count in uses.values()) < 48


def test_every_sentence_is_a_sentence() -> None:
    assert all(text[0].isupper() and text.endswith(".") and text == text.strip() for text in REFUSALS)

"""Other prompts for the same answers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from eval.audit.prompts import COMPLETION_TEMPLATES, QUESTION_TEMPLATES, few_shot, first_line, paraphrases, unseen_completions, with_prefix
from tests.helpers.data import make_records
from trainers.data.types import Document, Kind, Record

STORY = Record("d1sc1", "Ada moved to", "Oslo and opened a small shop for maps.", "Task1")
QUESTION = Record("d1qa0", "Where does Ada live?", "Oslo", "Task1")


@pytest.mark.parametrize(
    ("share", "given", "rest"),
    [
        (0.25, "Oslo and", "opened a small shop for maps."),  # 2 of 8 words
        (0.5, "Oslo and opened a", "small shop for maps."),
        (0.75, "Oslo and opened a small shop", "for maps."),
        (0.01, "Oslo", "and opened a small shop for maps."),  # at least one word
        (0.99, "Oslo and opened a small shop for", "maps."),  # and one is left
    ],
)
def test_a_prefix_moves_words_from_the_answer_to_the_prompt(share: float, given: str, rest: str) -> None:
    (found,) = with_prefix([STORY, QUESTION], share=share)
    assert (found.input, found.output) == (f"Ada moved to {given}", rest)
    assert found.text == STORY.text
    assert (found.id, found.document, found.kind) == (STORY.id, STORY.document, Kind.COMPLETION)


def test_an_answer_of_one_word_has_no_prefix() -> None:
    assert with_prefix([Record("d1sc1", "Ada lives in", "Oslo.", "Task1")], share=0.5) == []


def test_paraphrases_keep_the_answer_and_hold_the_input() -> None:
    rounds = paraphrases([STORY, QUESTION], rewordings={})
    assert len(rounds) == len(QUESTION_TEMPLATES) == len(COMPLETION_TEMPLATES) == 4
    for one in rounds:
        assert [row.output for row in one] == [STORY.output, QUESTION.output]
        assert STORY.input in one[0].input
        assert QUESTION.input in one[1].input
    assert len({one[1].input for one in rounds}) == 4
    assert all(text.count("{input}") == 1 for text in (*QUESTION_TEMPLATES, *COMPLETION_TEMPLATES))


def test_braces_in_a_question_stay() -> None:
    odd = Record("d1qa0", "What is {0} or {input}?", "x", "Task1")
    assert all("What is {0} or {input}?" in one[0].input for one in paraphrases([odd], rewordings={}))


def test_the_data_s_own_rewording_is_one_more_prompt() -> None:
    rounds = paraphrases([STORY, QUESTION], rewordings={"d1qa0": "In which city is Ada at home?"})
    assert len(rounds) == 5
    assert [(row.id, row.input) for row in rounds[-1]] == [("d1qa0", "In which city is Ada at home?")]


def shots_of(asked: Record, original: Record) -> list[str]:
    assert asked.input.endswith(original.input)
    return asked.input[: -len(original.input)].split("\n\n")[:-1]


def test_examples_are_of_the_same_kind_and_task_and_never_of_the_row_s_own_document() -> None:
    records = make_records(documents_per_task=5)
    asked = few_shot(records, pool=records, shots=3, seed=0)
    assert len(asked) == len(records)
    for row, original in zip(asked, records, strict=True):
        chosen = [next(other for other in records if other.text == text) for text in shots_of(row, original)]
        assert len({other.id for other in chosen}) == 3
        assert all(other.document != original.document for other in chosen)
        assert all((other.kind, other.task) == (original.kind, original.task) for other in chosen)
        assert row.output == original.output


def test_examples_depend_on_the_seed_and_the_row_alone() -> None:
    records = make_records(documents_per_task=5)
    one, again, other = (
        few_shot(records, pool=pool, shots=2, seed=seed) for pool, seed in ((records, 0), (records[::-1], 0), (records, 1))
    )
    assert one == again
    assert one != other
    assert few_shot(records[3:5], pool=records, shots=2, seed=0) == one[3:5]


def test_examples_are_dropped_until_the_row_fits_and_a_row_without_any_is_left_out() -> None:
    records = make_records(documents_per_task=5)

    def limit(length: int) -> Callable[[Record], bool]:
        return lambda record: len(record.input) <= length

    whole = few_shot(records[:1], pool=records, shots=3, seed=0)[0]
    (shorter,) = few_shot(records[:1], pool=records, shots=3, seed=0, fits=limit(len(whole.input) - 1))
    assert len(shots_of(shorter, records[0])) == 2
    assert few_shot(records[:1], pool=records, shots=3, seed=0, fits=limit(len(records[0].input))) == []
    assert few_shot([STORY], pool=[STORY, QUESTION], shots=3, seed=0) == []


def test_only_the_first_line_of_an_answer_counts() -> None:
    assert first_line(" Oslo\n\nWhere does Bruno live? Lima") == "Oslo"
    assert first_line("\n Oslo") == "Oslo"
    assert first_line("") == ""


def test_unseen_documents_become_completions_and_the_others_are_left() -> None:
    documents = [Document(f"n{number}", f"one two three {number} five") for number in range(7)]
    completions, others = unseen_completions(documents, number=30, seed=0)
    assert len(completions) == 3
    assert len(others) == 4
    assert not {record.document for record in completions} & {document.id for document in others}
    assert all(record.kind is Kind.COMPLETION and record.text in {document.text for document in documents} for record in completions)
    assert (completions[0].input, completions[0].output.split(" ")[0]) == ("one two", "three")
    assert len(unseen_completions(documents, number=2, seed=0)[0]) == 2
    assert unseen_completions([], number=2, seed=0) == ([], [])

"""Scores of generated text: clean-up, ROUGE-L recall, exact match, degeneration."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.cleanup import clean_up, through_csv
from eval.degenerate import degenerate_rate, is_degenerate
from eval.exact_match import can_still_match, exact_match
from eval.rouge import rouge_l_recall

WORDS = st.lists(st.sampled_from(["Running", "dogs", "ran", "the", "a", "Zürich", "don't", "7", "."]), max_size=12).map(" ".join)


def test_clean_up_makes_the_ten_replacements_in_order():
    """Each pattern once; ` ' ` goes before ` 's`, so a free-standing quote swallows both its spaces."""
    assert clean_up("a . b ? c ! d , e") == "a. b? c! d, e"
    assert clean_up("does n't I 'm it 's we 've you 're") == "doesn't I'm it's we've you're"
    assert clean_up("rock ' n' roll") == "rock'n' roll"
    assert clean_up("it ' s") == "it's"


def test_clean_up_leaves_ordinary_text_alone():
    text = "It's 5.30, isn't it? (No.)"
    assert clean_up(text) == text


@given(st.text(alphabet=" .?!,'ntmsver", max_size=30))
def test_clean_up_only_removes_spaces(text):
    """The early decision on questions relies on this."""
    assert clean_up(text).replace(" ", "") == text.replace(" ", "")


def test_csv_cells_for_missing_values_become_nan():
    assert [through_csv(text) for text in ("", "None", "NA", "n/a", "null")] == ["nan"] * 5
    assert [through_csv(text) for text in ("none", " ", "Nan", "Oslo")] == ["none", " ", "Nan", "Oslo"]


def test_csv_cells_agree_with_pandas():
    pandas = pytest.importorskip("pandas")
    from pandas._libs.parsers import STR_NA_VALUES

    assert len(STR_NA_VALUES) == 19, pandas.__version__
    assert all(through_csv(text) == "nan" for text in STR_NA_VALUES)


def test_rouge_l_recall_by_hand():
    """Reference: the cat sat on the mat (6 words). Prediction: the mat sat there. Longest common subsequence: the sat -> 2/6."""
    assert rouge_l_recall(reference="The cat sat on the mat.", prediction="the mat sat there") == pytest.approx(2 / 6, abs=1e-12)


def test_rouge_stems_words_of_more_than_three_characters():
    """running -> run; but "ran" stays "ran"."""
    assert rouge_l_recall(reference="running", prediction="runs") == 1.0
    assert rouge_l_recall(reference="running", prediction="ran") == 0.0


def test_rouge_does_not_punish_text_after_the_reference():
    assert rouge_l_recall(reference="one two", prediction="one two three one two three") == 1.0


def test_rouge_is_zero_without_words():
    assert rouge_l_recall(reference="", prediction="a") == rouge_l_recall(reference="a", prediction="...") == 0.0


@given(WORDS, WORDS)
def test_rouge_agrees_with_the_package_used_as_the_benchmark_does(reference, prediction):
    from rouge_score import rouge_scorer

    scores = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=True).score(target=reference, prediction=prediction)
    assert rouge_l_recall(reference=reference, prediction=prediction) == pytest.approx(scores["rougeL"].recall, abs=1e-12)


@pytest.mark.parametrize(
    ("expected", "output", "value"), [("Oslo", " oslo\n", 1.0), ("Oslo", "Oslo.", 0.0), ("New York", "new  york", 0.0)]
)
def test_exact_match_ignores_case_and_outer_space_only(expected, output, value):
    assert exact_match(expected=expected, output=output) == value


def test_a_question_is_decided_at_the_first_foreign_letter():
    assert can_still_match(expected="New York", decoded="\n new yo")
    assert not can_still_match(expected="New York", decoded=" Nep")
    assert not can_still_match(expected="Oslo", decoded=" Oslo is")


def test_a_question_is_not_decided_by_spaces_that_clean_up_removes():
    """ " Oslo , Norway" turns into "Oslo, Norway" in the end."""
    assert can_still_match(expected="Oslo, Norway", decoded=" Oslo ,")


def test_a_question_is_not_decided_by_an_unfinished_character():
    assert can_still_match(expected="Zürich", decoded="Z�")
    assert not can_still_match(expected="Zürich", decoded="Za�")


TEXT = st.text(alphabet="aAσΣςİßẞ .,'n\n é", max_size=12)


@given(TEXT, TEXT)
def test_no_decision_is_ever_taken_against_a_text_that_matches_in_the_end(text, padding):
    """Whatever the expected answer and wherever decoding stands, every prefix of a matching output still counts as open."""
    output = f" {text}"
    final = clean_up(output)
    for expected in (final, final.lower(), f" {final} "):
        if exact_match(expected=expected, output=final):
            assert all(can_still_match(expected=expected, decoded=output[:i]) for i in range(len(output) + 1))


@pytest.mark.parametrize("text", ["", "  \n", "no no no no no no no no", "!" * 40, "a b c d " * 10])
def test_loops_and_empty_texts_are_degenerate(text):
    assert is_degenerate(text)


@pytest.mark.parametrize(
    "text", ["Oslo", "no no no", "She moved to Oslo in 1907 and opened a small shop for maps, clocks and other things.", "call 555-0000000"]
)
def test_ordinary_text_is_not_degenerate(text):
    assert not is_degenerate(text)


def test_degenerate_rate_is_a_share():
    assert degenerate_rate(["", "Oslo", "Lima", "x " * 9]) == 0.5

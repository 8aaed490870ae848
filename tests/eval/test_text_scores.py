"""Scores of generated text: clean-up, ROUGE-L recall, exact match, degeneration."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.cleanup import clean_up, columns_through_csv
from eval.degenerate import degenerate_rate, is_degenerate
from eval.exact_match import can_still_match, exact_match
from eval.generate import decode_text
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


class Decoding:
    """A tokenizer whose ``decode`` cleans up on demand, as transformers 4 does, or never, as 5 does for byte-level BPE."""

    def __init__(self, text: str, *, obeys: bool) -> None:
        self.text, self.obeys = text, obeys

    def decode(self, ids, *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        assert skip_special_tokens
        return clean_up(self.text) if clean_up_tokenization_spaces and self.obeys else self.text


@pytest.mark.parametrize("obeys", [True, False])
def test_texts_are_cleaned_up_exactly_once_under_both_major_versions_of_transformers(obeys):
    """Of two spaces before a full stop one is removed; a second clean-up would remove the other, too."""
    assert decode_text(Decoding("rest  . I  'm", obeys=obeys), [1]) == "rest . I 'm"
    assert clean_up(clean_up("rest  . I  'm")) == "rest. I'm"


def test_clean_up_goes_through_the_text_once_per_pattern():
    """ " ' " goes before " 's", so that " ' s" loses both spaces; " .," loses one space, though "," stands behind "."."""
    assert clean_up("a .,") == "a.,"
    assert clean_up("a , .") == "a,."
    assert clean_up(" ' ' ") == "'' ", "the second quote has lost its leading space to the first match"
    assert clean_up("he 's 'sure") == "he's'sure"


MISSING = ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA", "NULL", "NaN",
           "None", "n/a", "nan", "null")  # fmt: skip


def through_csv(cells: list[str]) -> list[str]:
    """Cells of a column that also holds a word."""
    return columns_through_csv({"a": ["word", *cells], "b": ["word", *cells]})["a"][1:]


def test_columns_come_back_from_csv_as_pandas_types_them():
    """A column of whole numbers loses leading zeros; with a missing cell it is a column of floats; with a word it stays text."""
    columns = {"a": ["007", "7", "-0"], "b": ["007", "", "1"], "c": ["007", "x", "None"], "d": ["TRUE", "false", "True"]}
    assert columns_through_csv(columns) == {
        "a": ["7", "7", "0"], "b": ["7.0", "nan", "1.0"], "c": ["007", "x", "nan"], "d": ["True", "False", "True"]
    }  # fmt: skip


ODD_CELLS = st.lists(
    st.text(alphabet="aA 1\"',;\n\r\t\u2028ü雨\0.", max_size=6) | st.sampled_from(["None", "NA", "", "7", "x"]), min_size=1
)


@given(ODD_CELLS)
def test_a_column_with_a_word_changes_only_its_missing_cells(cells):
    """Quotes, commas, line ends and letters of any script survive; so a cell alone tells what becomes of it."""
    assert through_csv(cells) == ["nan" if cell in MISSING else cell for cell in cells]


def test_csv_cells_for_missing_values_become_nan():
    assert through_csv(["", "None", "NA", "n/a", "null"]) == ["nan"] * 5
    assert through_csv(["none", " ", "Nan", "Oslo"]) == ["none", " ", "Nan", "Oslo"]


def test_pandas_has_19_words_for_a_missing_value():
    """All of them matter to scores; the list of the test above and of the comparison with the script is theirs."""
    assert len(MISSING) == 19
    assert through_csv(sorted(MISSING)) == ["nan"] * 19


def test_rouge_l_recall_by_hand():
    """Reference: the cat sat on the mat (6 words). Prediction: the mat sat there. Longest common subsequence: the sat -> 2/6."""
    assert rouge_l_recall(reference="The cat sat on the mat.", prediction="the mat sat there") == pytest.approx(2 / 6, abs=1e-12)


def test_rouge_stems_words_of_more_than_three_characters():
    """running -> run; but "ran" stays "ran"."""
    assert rouge_l_recall(reference="running", prediction="runs") == 1.0
    assert rouge_l_recall(reference="running", prediction="ran") == 0.0


def test_rouge_splits_words_at_letters_outside_ascii():
    """Zürich gives z and rich: two words, each of which counts. Münch gives m and nch."""
    assert rouge_l_recall(reference="Zürich", prediction="z rich") == 1.0
    assert rouge_l_recall(reference="Zürich", prediction="Zurich") == 0.0
    assert rouge_l_recall(reference="Zürich Münch", prediction="rich") == pytest.approx(1 / 4, abs=1e-12)
    assert rouge_l_recall(reference="雨", prediction="雨") == 0.0, "no word in it"


def test_rouge_keeps_to_the_order_of_words():
    """a b c d against d c b a: any two words are out of order, so the longest common subsequence is one word."""
    assert rouge_l_recall(reference="a b c d", prediction="d c b a") == pytest.approx(1 / 4, abs=1e-12)


def test_rouge_counts_a_word_as_often_as_it_can_be_matched():
    """the the against the: one of two; the other way round everything is found."""
    assert rouge_l_recall(reference="the the", prediction="the") == 0.5
    assert rouge_l_recall(reference="the", prediction="the the") == 1.0


@given(WORDS)
def test_a_text_contains_itself_whatever_stands_around_it(text):
    """Unless it has no words at all."""
    value = rouge_l_recall(reference=text, prediction=f"before {text} after")
    assert value == (1.0 if any(char.isascii() and char.isalnum() for char in text) else 0.0)


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


@given(st.text(max_size=8), st.text(max_size=8))
def test_exact_match_is_symmetric_and_reflexive(a, b):
    assert exact_match(expected=a, output=a) == 1.0
    assert exact_match(expected=a, output=b) == exact_match(expected=b, output=a)


def test_exact_match_beyond_ascii():
    """Lower-casing is Unicode's: Ö and ö are one letter, ß and SS are not."""
    assert exact_match(expected="MALMÖ", output="malmö ") == 1.0
    assert exact_match(expected="Straße", output="STRASSE") == 0.0
    assert exact_match(expected="", output=" \u2028") == 1.0


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


def test_degeneration_by_hand():
    """Ten words have eight 3-grams. "a b a b ..." (14 words) has 12, two of them distinct: 2 / 12 < 0.3. A list of 13 words in which
    every word is new has 11 of 11. Seven equal words in a row are one short of a loop; 16 equal characters are one."""
    assert is_degenerate("a b " * 7)
    assert not is_degenerate("one two three four five six seven eight nine ten eleven twelve thirteen")
    assert not is_degenerate("no " * 7)
    assert is_degenerate("no " * 8)
    assert not is_degenerate("!" * 15)
    assert is_degenerate("!" * 16)


@given(st.lists(st.sampled_from(["", "Oslo", "no " * 9, "moved to Oslo"]), min_size=1), st.randoms())
def test_the_degenerate_rate_knows_no_order_and_no_copies(texts, random):
    shuffled = random.sample(texts, len(texts))
    assert degenerate_rate(shuffled) == degenerate_rate(texts) == pytest.approx(degenerate_rate(texts * 3), abs=1e-12)


def test_the_degenerate_rate_of_no_texts_is_undefined():
    assert degenerate_rate([]) != degenerate_rate([])

"""When a score can no longer change: never too early."""

from __future__ import annotations

import random

import pytest

from eval.decided import CompletionRule, QuestionRule
from eval.generate import decode_text
from eval.rouge import rouge_l_recall
from tests.helpers.eval_models import untrained


def ids(text):
    return untrained().tokenizer(text)["input_ids"]


def first_decided(rule, tokens):
    """Tokens after which the rule says that it is decided, or None."""
    return next((n for n in range(1, len(tokens) + 1) if rule.is_decided(tokens[:n])), None)


def completion(expected):
    return CompletionRule(expected=expected, tokenizer=untrained().tokenizer)


REFERENCE = "opened a small shop for maps"


def test_a_completion_is_decided_once_the_reference_and_two_more_words_are_there():
    text = ids(f" {REFERENCE} and clocks , and then went on and on and on and on for years")
    at = first_decided(completion(REFERENCE), text)
    assert at is not None
    assert rouge_l_recall(reference=REFERENCE, prediction=decode_text(untrained().tokenizer, text[:at])) == 1.0


@pytest.mark.parametrize(
    "text", ["opened a small shop for clocks and clocks and clocks and", "a small shop for maps opened and went on on on"]
)
def test_a_completion_that_lacks_a_word_or_has_it_in_another_place_is_open(text):
    assert first_decided(completion(REFERENCE), ids(text)) is None


def test_a_last_word_that_may_still_grow_does_not_count():
    """ "map" is the stem of "maps" but not of "mapped out"; until the word is over nobody knows."""
    rule = completion("a shop for maps")
    assert not rule.is_decided(ids("went and opened a shop for maps"))


def test_a_reference_without_words_is_never_decided():
    assert first_decided(completion("..."), ids("and so it went on and on and on")) is None


def test_decided_completions_have_recall_one_however_they_go_on():
    """Random texts of the reference's words, contractions and pieces of words: what is decided has full recall at every later end."""
    rng = random.Random(0)
    pieces = [
        " opened",
        " a",
        " small",
        " shop",
        " for",
        " maps",
        " did",
        " n't",
        " n",
        "'t",
        "s",
        "ing",
        " .",
        " , ",
        " ' ",
        "é",
        " it 's",
    ]
    found = 0
    for _ in range(300):
        reference = "".join(rng.choices(pieces[:8], k=2))
        tokens = ids("".join(rng.choices(pieces, k=40)))
        at = first_decided(completion(reference), tokens)
        if at is not None:
            found += 1
            for end in range(at, len(tokens) + 1):
                assert rouge_l_recall(reference=reference, prediction=decode_text(untrained().tokenizer, tokens[:end])) == 1.0
    assert found > 50, "otherwise nothing was shown"


def test_a_question_is_decided_by_its_ids():
    rule = QuestionRule(expected="Oslo", tokenizer=untrained().tokenizer)
    assert not rule.is_decided(ids(" Os"))
    assert rule.is_decided(ids(" Lima"))

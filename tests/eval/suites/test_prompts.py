"""Questions as prompts, and where answers join them."""

from __future__ import annotations

import copy

import pytest

from eval.suites.config import PromptStyle
from eval.suites.prompts import encode_answer, encode_passage, few_shot_prompt, question_prompt
from tests.helpers.suite_data import tokenizer
from trainers.data.encode import encode_record
from trainers.data.types import Record
from trainers.errors import InputError

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def chat_tokenizer():
    own = copy.deepcopy(tokenizer())
    own.chat_template = TEMPLATE
    return own


def text(row) -> str:
    return tokenizer().decode(list(row.input_ids))


def encode(style=PromptStyle.PLAIN, max_length=256, answer="Oslo"):
    own = chat_tokenizer()
    prompt = question_prompt("Where?", style=style, tokenizer=own)
    return encode_answer(row_id="r1", prompt=prompt, answer=answer, style=style, tokenizer=own, max_length=max_length)


def test_the_plain_prompt_is_the_one_of_the_published_code():
    """The answer follows after a space, the end token after the answer; both are scored."""
    row = encode()
    assert text(row) == "Question: Where?\nAnswer: Oslo<|endoftext|>"
    assert tokenizer().decode(list(row.input_ids[row.num_prompt :])) == " Oslo<|endoftext|>"


def test_rows_are_encoded_as_training_rows_are():
    record = Record(id="r1", input="Question: Where?\nAnswer:", output="Oslo", task="")
    assert encode() == encode_record(record, tokenizer=tokenizer(), max_length=256)


def test_a_bare_question_is_a_training_row_of_the_same_file():
    """So a sweep that reads question and answer as input and output is measured on what it was trained on."""
    record = Record(id="r1", input="Where?", output="Oslo", task="")
    assert encode(style=PromptStyle.BARE) == encode_record(record, tokenizer=tokenizer(), max_length=256) != encode()


def test_the_answer_follows_a_chat_template_at_once():
    row = encode(style=PromptStyle.CHAT)
    assert text(row) == "<user>Where?<assistant>Oslo<|endoftext|>"
    assert tokenizer().decode(list(row.input_ids[row.num_prompt :])) == "Oslo<|endoftext|>"


def test_a_tokenizer_without_a_template_is_refused_only_if_it_is_needed():
    assert question_prompt("Where?", style=PromptStyle.PLAIN, tokenizer=tokenizer())
    with pytest.raises(InputError, match="no chat template"):
        question_prompt("Where?", style=PromptStyle.CHAT, tokenizer=tokenizer())


@pytest.mark.parametrize("style", list(PromptStyle))
def test_a_row_longer_than_the_context_is_named(style):
    with pytest.raises(InputError, match="'r1'"):
        encode(style=style, max_length=12, answer="Oslo " * 9)


def test_solved_examples_stand_before_the_question_with_a_blank_line_after_each():
    expected = "Question: Who?\nAnswer: Ada\n\nQuestion: Why?\nAnswer: Maps\n\nQuestion: Where?\nAnswer:"
    assert few_shot_prompt("Where?", examples=[("Who?", "Ada"), ("Why?", "Maps")]) == expected


def passage(text=" Ada lives in Oslo.", tokens=128, max_length=256):
    return encode_passage(row_id="p1", prompt="In the city", text=text, max_new_tokens=tokens, tokenizer=tokenizer(), max_length=max_length)


def test_a_passage_is_cut_at_the_tokens_that_can_be_generated_and_has_no_end_token():
    whole = passage()
    assert text(whole) == "In the city Ada lives in Oslo."
    short = passage(tokens=3)
    assert short.input_ids == whole.input_ids[: whole.num_prompt + 3]
    assert len(short.scored) == 3


def test_white_space_at_the_start_of_a_passage_is_one_space():
    assert passage(text="\n  Ada lives in Oslo.") == passage()


def test_only_what_is_scored_of_a_long_passage_has_to_fit_the_context():
    assert passage(text="maps " * 400, tokens=4).num_scored == 4
    with pytest.raises(InputError, match="'p1'"):
        passage(text="maps " * 400, tokens=300)

"""Batched greedy decoding against decoding one prompt at a time."""

from __future__ import annotations

import pytest
import torch

import eval.generate as module
from eval.drafts import gold_draft
from eval.generate import altered_generation, decode_text, generate_alone, greedy, stop_ids
from eval.teacher_forced import RowScore
from tests.helpers.eval_models import build_bench, half_trained, untrained
from trainers.data.encode import EncodedRow, encode_prompt
from trainers.errors import InputError


def prompts(bench):
    return [encode_prompt(bench.tokenizer, row.input) for row in (*bench.data.forget, *bench.data.retain)]


def run(bench, given=None, **changes):
    settings = {"max_new_tokens": 40, "batch_tokens": 1500, "device": "cpu"} | changes
    return greedy(model=bench.model, tokenizer=bench.tokenizer, prompts=given or prompts(bench), **settings)


def alone(bench, given=None, max_new_tokens=40):
    return [
        generate_alone(model=bench.model, tokenizer=bench.tokenizer, prompt=prompt, max_new_tokens=max_new_tokens, device="cpu")
        for prompt in given or prompts(bench)
    ]


@pytest.mark.parametrize("bench", [untrained, half_trained])
@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000])
def test_batched_ids_are_those_of_generate_one_at_a_time(bench, batch_tokens):
    assert run(bench(), batch_tokens=batch_tokens) == alone(bench())


def test_the_half_trained_model_ends_rows_at_different_lengths():
    """So that rows leave the batch while others go on."""
    assert len({len(ids) for ids in run(half_trained())}) > 1


def test_wrong_positions_under_left_padding_change_the_text(monkeypatch):
    """Negative control: positions that count padding."""
    expected = run(untrained())
    monkeypatch.setattr(module, "_positions", lambda mask: torch.arange(mask.shape[1]).expand_as(mask) // 2)
    assert run(untrained()) != expected


@pytest.mark.parametrize("shown", [False, True])
def test_what_stands_in_the_padding_matters_only_if_the_mask_shows_it(monkeypatch, shown):
    """Padding filled with words instead of the pad token: invisible under the right mask; under a mask of ones the text changes."""
    pad = module._pad_left

    def filled(rows, **settings):
        ids, mask = pad(rows, **{**settings, "pad": 300})
        return ids, torch.ones_like(mask) if shown else mask

    bench = half_trained()
    given = [*prompts(bench), prompts(bench)[0] * 6]
    expected = run(bench, given, batch_tokens=100_000)
    monkeypatch.setattr(module, "_pad_left", filled)
    assert (run(bench, given, batch_tokens=100_000) == expected) is not shown


def test_every_row_may_have_its_own_limit_and_rows_leave_the_batch_unharmed():
    """Rows end at different times, so that the batch is compacted again and again while others go on."""
    limits = [(7 * index) % 30 for index in range(24)]
    given = [prompt * (1 + index % 4) for index, prompt in enumerate(prompts(untrained()))]
    actual = run(untrained(), given, max_new_tokens=limits, batch_tokens=100_000)
    expected = [ids[:limit] for ids, limit in zip(alone(untrained(), given, max_new_tokens=30), limits, strict=True)]
    assert actual == expected


def test_decoding_stops_where_the_context_is_full():
    bench = build_bench(steps=0, context=32)
    given = [prompts(bench)[0][:30], prompts(bench)[1][:5]]
    assert [len(ids) for ids in run(bench, given)] == [32 - len(given[0]), 27]
    with pytest.raises(InputError, match="33 tokens"):
        run(bench, [[5] * 33])


def test_stop_is_asked_after_every_token_that_may_be_followed_by_another():
    seen = []

    def stop(row, ids):
        seen.append((row, len(ids)))
        return row == 0 and len(ids) == 2

    given = prompts(untrained())[:2]
    first, second = run(untrained(), given, max_new_tokens=6, stop=stop)
    assert (len(first), len(second)) == (2, 6)
    assert sorted(seen) == [(0, 1), (0, 2), *((1, n) for n in range(1, 6))]


def test_further_stop_ids_of_the_checkpoint_take_effect():
    bench = build_bench(steps=100)
    free = run(bench)
    extra = free[0][3]
    bench.model.generation_config.eos_token_id = [bench.tokenizer.eos_token_id, extra]
    assert stop_ids(bench.model, bench.tokenizer) == {bench.tokenizer.eos_token_id, extra}
    assert run(bench) == alone(bench)
    assert run(bench)[0] == free[0][: free[0].index(extra) + 1]


def test_settings_that_change_greedy_decoding_are_found():
    bench = build_bench(steps=0)
    assert altered_generation(bench.model) == []
    bench.model.generation_config.repetition_penalty = 1.3
    assert altered_generation(bench.model) == ["repetition_penalty = 1.3"]


def test_text_has_no_special_tokens_and_is_cleaned_once():
    tokenizer = half_trained().tokenizer
    ids = [*tokenizer(" a shop , and ' ' clocks .")["input_ids"], tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert decode_text(tokenizer, ids) == " a shop, and'' clocks."


def draft(matched, *, answer=(11, 12, 13, 0), max_new_tokens=9, ends=frozenset({0})):
    row = EncodedRow(row_id="r", input_ids=(5, 6, *answer), num_prompt=2)
    score = RowScore(row_id="r", answer_log_prob=-1.0, num_tokens=len(answer), token_accuracy=0.5, num_matched=matched)
    found = gold_draft(row, score, max_new_tokens=max_new_tokens, ends=ends)
    return found.known, found.remaining


def test_a_fully_matched_answer_needs_no_decoding():
    assert draft(4) == ((11, 12, 13, 0), 0)


def test_decoding_starts_after_the_matched_prefix_and_counts_it():
    assert draft(2) == ((11, 12), 7)
    assert draft(0) == ((), 9)


def test_a_draft_ends_at_the_token_limit_and_at_an_earlier_stop_id():
    assert draft(4, max_new_tokens=3) == ((11, 12, 13), 0)
    assert draft(4, ends=frozenset({12, 0})) == ((11, 12), 0)
    assert draft(4, ends=frozenset({7})) == ((11, 12, 13, 0), 5)

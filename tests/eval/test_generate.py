"""Batched greedy decoding against decoding one prompt at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import eval.generate as module
import eval.row_cache as cache_module
from eval.drafts import Guesses, gold_draft
from eval.forward import split_model
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


@pytest.fixture
def padded(monkeypatch):
    """Decode as for an architecture that cannot attend to packed rows."""
    monkeypatch.setattr(module, "split_model", lambda *given, **named: replace(split_model(*given, **named), packs=False))


def long_prompts(bench):
    """Rows of very different lengths: the longest 12 times the shortest."""
    return [prompt * (1 + 3 * (index % 4)) for index, prompt in enumerate(prompts(bench))]


@pytest.mark.parametrize("bench", [untrained, half_trained])
@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000])
def test_batched_ids_are_those_of_generate_one_at_a_time(bench, batch_tokens):
    given = long_prompts(bench())[: 8 if batch_tokens == 1 else None]
    assert run(bench(), given, batch_tokens=batch_tokens) == alone(bench(), given)


@pytest.mark.usefixtures("padded")
@pytest.mark.parametrize("bench", [untrained, half_trained])
@pytest.mark.parametrize("batch_tokens", [1, 100_000])
def test_padded_ids_are_those_of_generate_one_at_a_time(bench, batch_tokens):
    given = long_prompts(bench())[:8]
    assert run(bench(), given, batch_tokens=batch_tokens) == alone(bench(), given)


def test_the_tests_above_decode_in_both_ways():
    assert split_model(untrained().model, device="cpu").packs


def test_decoding_leaves_the_models_attention_as_it_was():
    bench = build_bench(steps=0)
    before = bench.model.config._attn_implementation
    run(bench, max_new_tokens=2)
    assert bench.model.config._attn_implementation == before != cache_module.NAME


def test_several_query_heads_may_read_one_key_head():
    from transformers import OlmoConfig, OlmoForCausalLM

    bench = build_bench(steps=0)
    settings = {**bench.model.config.to_dict(), "num_key_value_heads": 2}
    torch.manual_seed(0)
    grouped = replace(bench, model=OlmoForCausalLM(OlmoConfig(**settings)).eval())
    with torch.no_grad():
        for parameter in grouped.model.model.layers.parameters():
            parameter.mul_(10)
    assert run(grouped) == alone(grouped)


@pytest.mark.parametrize("wrong", ["position", "mask"])
def test_wrong_positions_or_a_mask_left_out_change_the_text(monkeypatch, wrong):
    """Negative controls of decoding with a cache: positions off by one, and queries that see what a longer row has cached."""
    begin = cache_module.RowCache.begin

    def spoiled(self, counts):
        begin(self, counts)
        step = self._step
        if wrong == "position":
            self._shifted = step.position_S + 1
        else:
            self._step = replace(step, mask_B1QT=torch.zeros_like(step.mask_B1QT))

    given = long_prompts(untrained())
    expected = run(untrained(), given)
    monkeypatch.setattr(cache_module.RowCache, "begin", spoiled)
    if wrong == "position":
        monkeypatch.setattr(cache_module.RowCache, "position_S", property(lambda self: self._shifted))
    assert run(untrained(), given) != expected


def test_a_cache_that_grows_keeps_what_it_holds():
    """More tokens than fit the first block of the buffers, rows leaving on the way."""
    given = prompts(untrained())[:6]
    limits = [150, 10, 10, 10, 90, 10]
    expected = [ids[:limit] for ids, limit in zip(alone(untrained(), given, max_new_tokens=150), limits, strict=True)]
    assert run(untrained(), given, max_new_tokens=limits) == expected


class Foretold:
    """Guesses that are always right, always wrong, or right now and then: what is generated must not depend on it."""

    def __init__(self, text, *, truth, kind):
        self.start, self.seen, self.truth, self.kind = len(text) - 1, 1, truth, kind

    def extend(self, ids):
        self.seen += len(ids)

    def guess(self, *, limit):
        coming = self.truth[self.seen : self.seen + min(limit, 5)]
        if self.kind == "right":
            return coming
        keep = 0 if self.kind == "wrong" else self.seen % 4
        return [token if place < keep else (token + 1) % 300 for place, token in enumerate(coming)]

    def learn(self, *, guessed, right):
        self.checked = max(getattr(self, "checked", 0), right)


@pytest.mark.parametrize("kind", ["right", "wrong", "mixed"])
def test_guesses_change_the_number_of_passes_and_nothing_else(monkeypatch, kind):
    bench = untrained()
    given = prompts(bench)[:5]
    expected = alone(bench, given, max_new_tokens=40)
    truths = dict(zip(map(tuple, given), expected, strict=True))
    monkeypatch.setattr(module, "Guesses", lambda text, hint: Foretold(text, truth=truths[tuple(text[:-1])], kind=kind))
    passes = []
    begin = cache_module.RowCache.begin
    monkeypatch.setattr(cache_module.RowCache, "begin", lambda self, counts: (passes.append(sum(counts)), begin(self, counts)))
    assert run(bench, given, max_new_tokens=40) == expected
    if kind == "right":
        assert len(passes) == 7, "39 tokens after the first, six at once"
    if kind == "wrong":
        assert len(passes) == 39


def test_an_unchecked_guess_would_be_seen(monkeypatch):
    """Negative control: every guess is taken for right."""
    monkeypatch.setattr(module, "Guesses", lambda text, hint: Foretold(text, truth=[7] * 99, kind="right"))
    take = module._Growing.take
    monkeypatch.setattr(module._Growing, "take", lambda self, given, said, **rest: take(self, given, [*given[1:], said[-1]], **rest))
    assert run(untrained(), prompts(untrained())[:3]) != alone(untrained(), prompts(untrained())[:3])


def test_a_loop_is_guessed_to_go_on():
    """After 5 6 7 5 6 7 comes 5 6 7 5, though only two rounds were seen."""
    assert Guesses([1, 5, 6, 7, 5, 6, 7]).guess(limit=4) == [5, 6, 7, 5]


def test_nothing_is_guessed_without_a_precedent_and_no_more_than_wanted():
    assert Guesses([1, 2, 3, 4, 5]).guess(limit=4) == []
    assert Guesses([5, 6, 7, 5, 6, 7]).guess(limit=2) == [5, 6]


def test_the_hint_is_looked_in_but_not_across_its_end():
    assert Guesses([9, 11, 12, 13], hint=[11, 12, 13, 14]).guess(limit=4) == [14]
    assert Guesses([9, 11, 12, 13], hint=[11, 12, 13]).guess(limit=4) == []


def test_more_is_guessed_after_success_and_less_after_failure():
    guesses = Guesses([5] * 9)
    assert len(guesses.guess(limit=99)) == 4
    guesses.learn(guessed=4, right=4)
    assert len(guesses.guess(limit=99)) == 8
    guesses.learn(guessed=8, right=2)
    assert len(guesses.guess(limit=99)) == 2


def test_the_half_trained_model_ends_rows_at_different_lengths():
    """So that rows leave the batch while others go on."""
    assert len({len(ids) for ids in run(half_trained())}) > 1


@pytest.mark.usefixtures("padded")
def test_wrong_positions_under_left_padding_change_the_text(monkeypatch):
    """Negative control: positions that count padding."""
    expected = run(untrained())
    monkeypatch.setattr(module, "_positions", lambda mask: torch.arange(mask.shape[1]).expand_as(mask) // 2)
    assert run(untrained()) != expected


@pytest.mark.usefixtures("padded")
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


def draft(matched, *, answer=(11, 12, 13, 0), max_new_tokens=9, ends=frozenset({0}), said=None):
    row = EncodedRow(row_id="r", input_ids=(5, 6, *answer), num_prompt=2)
    score = RowScore(row_id="r", answer_log_prob=-1.0, num_tokens=len(answer), token_accuracy=0.5, num_matched=matched, next_token=said)
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


def test_the_first_token_that_differs_is_known_as_well():
    assert draft(2, said=44) == ((11, 12, 44), 6)
    assert draft(0, said=44) == ((44,), 8)
    assert draft(2, said=0) == ((11, 12, 0), 0)
    assert draft(2, said=44, max_new_tokens=2) == ((11, 12), 0)

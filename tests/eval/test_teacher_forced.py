"""Scoring given answers in batches, packed or padded."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import eval.teacher_forced as module
from eval.forward import split_model
from eval.row_cache import NAME
from eval.teacher_forced import TokenScores, document_losses, row_score, score_rows, token_scores
from tests.helpers.eval_models import build_bench, half_trained, untrained
from trainers.data.encode import EncodedRow, encode_records
from trainers.data.types import Document
from trainers.errors import InputError


def encoded(bench):
    return encode_records([*bench.data.forget, *bench.data.retain], tokenizer=bench.tokenizer, max_length=512)


def score(bench, rows, batch_tokens=2000):
    return score_rows(model=bench.model, tokenizer=bench.tokenizer, rows=rows, batch_tokens=batch_tokens, device="cpu")


def plain_score(model, row):
    """(log-probability, correct flags) of one row in float64, without batches."""
    with torch.no_grad():
        logits = model(torch.tensor([row.input_ids])).logits[0].double()
    log_probs = logits.log_softmax(-1)
    places = range(row.num_prompt, len(row.input_ids))
    total = sum(float(log_probs[i - 1, row.input_ids[i]]) for i in places)
    return total, [int(logits[i - 1].argmax()) == row.input_ids[i] for i in places]


def test_scores_agree_with_a_plain_loop():
    bench = half_trained()
    rows = encoded(bench)
    for row, actual in zip(rows, score(bench, rows), strict=True):
        total, correct = plain_score(bench.model, row)
        prefix = correct.index(False) if False in correct else len(correct)
        assert actual.answer_log_prob == pytest.approx(total, abs=1e-4)
        assert (actual.row_id, actual.num_tokens, actual.num_matched) == (row.row_id, len(correct), prefix)
        assert actual.token_accuracy == pytest.approx(sum(correct) / len(correct), abs=1e-12)
        assert actual.all_correct == all(correct)


@pytest.fixture
def padded(monkeypatch):
    """Score as for an architecture that cannot attend to packed rows."""
    monkeypatch.setattr(module, "split_model", lambda *given, **named: replace(split_model(*given, **named), packs=False))


def uneven(bench):
    """Rows whose longest is 20 times the shortest."""
    return [replace(row, input_ids=row.input_ids * (1 + 5 * (index % 3))) for index, row in enumerate(encoded(bench))]


@pytest.mark.parametrize("bench", [untrained, half_trained])
def test_packed_scores_agree_with_a_plain_loop_over_uneven_rows(bench):
    check_uneven(bench())


@pytest.mark.usefixtures("padded")
def test_padded_scores_agree_with_a_plain_loop_over_uneven_rows():
    check_uneven(half_trained())


def check_uneven(bench):
    rows = uneven(bench)
    for row, actual in zip(rows, score(bench, rows), strict=True):
        total, correct = plain_score(bench.model, row)
        assert -actual.answer_log_prob / actual.num_tokens == pytest.approx(-total / len(correct), abs=1e-5)
        assert actual.num_matched == (correct.index(False) if False in correct else len(correct))


@pytest.mark.parametrize("wrong", ["position", "neighbour"])
def test_wrong_positions_or_rows_that_see_their_neighbours_change_the_scores(monkeypatch, wrong):
    """Negative controls: positions two apart (a common shift would change nothing); all rows attending as if they were one."""
    bench = untrained()
    rows = uneven(bench)
    expected = score(bench, rows)
    pack = module.pack

    def spoiled(*given, **named):
        batch = pack(*given, **named)
        if wrong == "position":
            return replace(batch, position_ids_S=2 * batch.position_ids_S)
        one = type(batch.groups[0])(1, len(batch.input_ids_S))
        return replace(batch, groups=(one,), spread_X=None, restore_S=None)

    monkeypatch.setattr(module, "pack", spoiled)
    apart = [abs(a.answer_log_prob - b.answer_log_prob) for a, b in zip(score(bench, rows), expected, strict=True)]
    assert max(apart) > 0.1


def test_nothing_is_padded():
    """Every position of a packed pass is a real token."""
    bench = half_trained()
    seen = []
    hook = bench.model.model.register_forward_pre_hook(
        lambda module, given, named: seen.append(named["input_ids"].numel()), with_kwargs=True
    )
    try:
        score(bench, uneven(bench), batch_tokens=700)
    finally:
        hook.remove()
    real = sum(len(row.input_ids) for row in uneven(bench))
    probes = 2 + 2 + 5 + 3 + 2  # what the split and packing are tried with
    assert sum(seen) == real + probes


def test_scoring_leaves_the_models_attention_as_it_was():
    bench = build_bench(steps=0)
    before = bench.model.config._attn_implementation
    score(bench, encoded(bench))
    assert bench.model.config._attn_implementation == before != NAME


def hand_made(correct):
    flags = np.array(correct, dtype=bool)
    return row_score(TokenScores("r", np.full(len(flags), -1.0), flags, argmax_N=np.arange(len(flags)) + 50))


@pytest.mark.parametrize(
    ("correct", "strength", "next_token"),
    [
        ([1, 1, 1, 1, 1], 1.0, None),
        ([1, 1, 1, 1, 0], 1.0, 54),
        ([0, 1, 1, 1, 1], 0.75, 50),
        ([1, 1, 0, 1, 1], 0.25, 52),
        ([1, 1, 1, 0, 1], 0.0, 53),
        ([0, 0, 0, 0, 0], 0.0, 50),
    ],
)
def test_extraction_strength_by_hand(correct, strength, next_token):
    """1 - k/4 of four tokens and the end: with the third wrong a prefix of k = 3 makes the rest come out; a wrong last one leaves nothing.

    A wrong end token takes nothing away.
    """
    score = hand_made(correct)
    assert score.extraction_strength == strength
    assert score.next_token == next_token


def test_extraction_strength_is_that_of_the_definition():
    """The shortest prefix, found by trying all of them."""
    bench = half_trained()
    values = []
    for row, actual in zip(encoded(bench), score(bench, encoded(bench)), strict=True):
        correct = plain_score(bench.model, row)[1][:-1]
        k = next(k for k in range(len(correct) + 1) if all(correct[k:]))
        values.append(1 - k / len(correct))
        assert actual.extraction_strength == pytest.approx(values[-1], abs=1e-12)
    assert min(values) <= 0.5 < max(values) == 1.0


def test_the_argmax_of_every_token_is_told():
    bench = half_trained()
    rows = encoded(bench)[:4]
    found = token_scores(model=bench.model, tokenizer=bench.tokenizer, rows=rows, batch_tokens=500, device="cpu")
    for row, scores in zip(rows, found, strict=True):
        with torch.no_grad():
            best = bench.model(torch.tensor([row.input_ids])).logits[0].argmax(-1)
        assert scores.argmax_N.tolist() == [int(best[place - 1]) for place in row.scored]


def test_the_half_trained_model_knows_some_rows_and_not_others():
    """Otherwise the tests on it would compare constants."""
    known = [row.all_correct for row in score(half_trained(), encoded(half_trained()))]
    assert 0 < sum(known) < len(known)


@pytest.mark.parametrize("batch_tokens", [1, 90, 10_000])
def test_padding_and_batch_size_change_nothing(batch_tokens):
    bench = half_trained()
    rows = encoded(bench)
    expected, actual = score(bench, rows, 1), score(bench, rows[::-1], batch_tokens)[::-1]
    assert [row.num_matched for row in actual] == [row.num_matched for row in expected]
    assert [row.answer_log_prob for row in actual] == pytest.approx([row.answer_log_prob for row in expected], abs=1e-4)


def test_a_row_without_scored_tokens_has_no_accuracy():
    empty = EncodedRow(row_id="e", input_ids=(5, 6), num_prompt=2)
    result = score(half_trained(), [empty, encoded(half_trained())[0]])
    assert (result[0].num_tokens, result[0].answer_log_prob, result[0].all_correct) == (0, 0.0, False)
    assert math.isnan(result[0].token_accuracy)
    assert result[1].num_tokens > 0


def losses(bench, documents, batch_tokens=2000):
    return document_losses(model=bench.model, tokenizer=bench.tokenizer, documents=documents, batch_tokens=batch_tokens, device="cpu")


def test_document_losses_are_the_models_own():
    """transformers' loss with labels = ids is the mean over tokens 2..n."""
    bench = half_trained()
    documents = [*bench.attack.members, *bench.attack.nonmembers]
    for document, actual in zip(documents, losses(bench, documents), strict=True):
        ids = torch.tensor([bench.tokenizer(document.text)["input_ids"]])
        with torch.no_grad():
            expected = float(bench.model(input_ids=ids, labels=ids).loss)
        assert actual == pytest.approx(expected, abs=1e-5)


def test_a_document_of_one_token_has_no_loss():
    assert [math.isnan(loss) for loss in losses(half_trained(), [Document("a", ""), Document("b", "x"), Document("c", "one two")])] == [
        True,
        True,
        False,
    ]


def test_a_document_longer_than_the_context_is_refused():
    with pytest.raises(InputError, match="'long'"):
        losses(build_bench(steps=0, context=32), [Document("long", "shop " * 40)])


def test_a_model_whose_logits_are_altered_after_the_head_is_not_split():
    """Soft-capping is invisible to decoder and head alone; the scores must be those of the whole model."""
    bench = build_bench(steps=0)
    assert split_model(bench.model, device="cpu").head is not None
    forward = bench.model.forward

    def capped(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = 0.2 * torch.tanh(output.logits / 0.2)
        return output

    before = score(bench, encoded(bench))
    bench.model.forward = capped
    assert split_model(bench.model, device="cpu").head is None
    after = score(bench, encoded(bench))
    total, _ = plain_score(bench.model, encoded(bench)[0])
    assert after[0].answer_log_prob == pytest.approx(total, abs=1e-4)
    assert after[0].answer_log_prob != pytest.approx(before[0].answer_log_prob, abs=1e-4)


def test_an_adapted_model_is_scored_with_its_adapter():
    from peft import LoraConfig, get_peft_model

    bench = build_bench(steps=0)
    rows = encoded(bench)[:2]
    before = score(bench, rows)
    adapted = get_peft_model(bench.model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"))
    actual = score_rows(model=adapted, tokenizer=bench.tokenizer, rows=rows, batch_tokens=999, device="cpu")
    adapted.eval()
    assert actual[0].answer_log_prob == pytest.approx(plain_score(adapted, rows[0])[0], abs=1e-4)
    assert actual[0].answer_log_prob != before[0].answer_log_prob

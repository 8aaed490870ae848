"""Scoring given answers in padded batches."""

from __future__ import annotations

import math

import pytest
import torch

from eval.forward import split_model
from eval.teacher_forced import document_losses, score_rows
from tests.helpers.eval_models import build_bench, half_trained
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

"""Answering MMLU questions with shared prefixes."""

from __future__ import annotations

import pytest
import torch

import eval.mmlu_accuracy as module
from eval.mmlu import MmluData, Question, mmlu_prompt
from eval.mmlu_accuracy import letter_ids, mmlu_accuracy
from tests.helpers.eval_models import build_bench, half_trained, untrained
from trainers.errors import InputError

CITIES = ("Oslo", "Lima", "Turin", "Accra", "Quito", "Basel", "Perth", "Hanoi", "Cairo")


def question(subject: str, row: int) -> Question:
    words = [CITIES[(row * 5 + k * k + len(subject)) % 9] for k in range(4)]
    text = f"Where did {' and '.join(CITIES[: row % 5])} open a shop in {1900 + 3 * row}?"
    return Question(subject=subject, row=row, question=text, choices=(words[0], words[1], words[2], words[3]), answer="ABCD"[row % 4])


DATA = MmluData(
    dev={subject: tuple(question(subject, row) for row in range(1, 4)) for subject in ("maps", "old_clocks")},
    test={subject: tuple(question(subject, row) for row in range(10, 26)) for subject in ("maps", "old_clocks")},
)


def run(bench, data=DATA, **changes):
    settings = {"shots": 3, "max_prompt_tokens": 512, "batch_tokens": 3000, "device": "cpu"} | changes
    return mmlu_accuracy(model=bench.model, tokenizer=bench.tokenizer, data=data, **settings)


def plain_letters(bench, *, shots: int) -> list[str]:
    """Every prompt alone and in full, as the published computation does."""
    letters = [bench.tokenizer(f" {letter}")["input_ids"][-1] for letter in "ABCD"]
    chosen = []
    for asked in DATA.questions:
        prompt = mmlu_prompt(subject=asked.subject, question=asked, dev=DATA.dev[asked.subject], shots=shots)
        with torch.no_grad():
            logits = bench.model(torch.tensor([bench.tokenizer(prompt)["input_ids"]])).logits[0, -1]
        chosen.append("ABCD"[int(logits.softmax(-1)[letters].argmax())])
    return chosen


@pytest.mark.parametrize("bench", [untrained, half_trained])
@pytest.mark.parametrize("batch_tokens", [1, 700, 100_000])
def test_a_shared_prefix_changes_no_answer(bench, batch_tokens):
    expected = plain_letters(bench(), shots=3)
    result = run(bench(), batch_tokens=batch_tokens)
    assert [answer.letter for answer in result.answers] == expected


def test_the_comparison_can_fail():
    """Answers differ between questions, and without the examples they are others."""
    expected = plain_letters(untrained(), shots=3)
    assert len(set(expected)) > 1
    assert [answer.letter for answer in run(untrained(), shots=0).answers] != expected


def test_a_wrong_mask_over_the_shared_prefix_changes_answers(monkeypatch):
    """The mask has to cover the cached examples too."""
    right = module._pad_right

    def wrong(suffixes, *, shared, pad, device):
        ids, mask = right(suffixes, shared=shared, pad=pad, device=device)
        mask[:, : shared // 2] = 0
        return ids, mask

    expected = [answer.letter for answer in run(untrained()).answers]
    monkeypatch.setattr(module, "_pad_right", wrong)
    assert [answer.letter for answer in run(untrained()).answers] != expected


def test_the_average_weighs_questions_and_the_subjects_are_listed():
    result = run(half_trained())
    assert result.average == sum(result.correct) / 32
    assert set(result.per_subject) == {"maps", "old_clocks"}
    assert sum(result.per_subject.values()) / 2 == pytest.approx(result.average, abs=1e-12)


def test_too_long_prompts_lose_their_last_examples():
    assert {answer.shots for answer in run(untrained()).answers} == {3}
    shots = [answer.shots for answer in run(untrained(), max_prompt_tokens=165).answers]
    assert set(shots) == {1, 2}, "prompts have 159 to 170 tokens with two examples, 123 to 134 with one"


def test_a_prompt_that_never_fits_is_refused():
    with pytest.raises(InputError, match="subject maps, row 10"):
        run(untrained(), max_prompt_tokens=20)


def test_the_models_context_limits_prompts_too():
    with pytest.raises(InputError, match="at most 64 fit"):
        run(build_bench(steps=0, context=64))


def test_letters_that_share_a_token_are_refused():
    class Blind:
        def __call__(self, text, **_):
            return {"input_ids": [7]}

    with pytest.raises(InputError, match="four different tokens"):
        letter_ids(Blind())


def test_the_model_is_left_as_it_was():
    bench = build_bench(steps=0)
    bench.model.train()
    run(bench)
    assert bench.model.training

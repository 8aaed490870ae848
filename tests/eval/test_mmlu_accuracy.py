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


def fixed_logits(**by_letter: float):
    """A tiny model in bfloat16 that gives the letters the same logits after every prompt, and all other tokens 0."""
    bench = build_bench(steps=0)
    head = bench.model.get_output_embeddings()
    with torch.no_grad():
        head.weight.zero_()
        bias = torch.zeros(head.weight.shape[0])
        for letter, logit in by_letter.items():
            bias[bench.tokenizer(f" {letter}")["input_ids"][-1]] = logit
        head.bias = torch.nn.Parameter(bias)
    bench.model.bfloat16()
    return bench


def letters_of(result) -> set[str]:
    return {answer.letter for answer in result.answers}


def test_probabilities_that_tie_in_bfloat16_go_to_the_first_letter():
    """B and C have logits 0 and 2 ** -9, A and D -4, the 416 other tokens 0: B and C have shares of 1 / 418.04 = 156.77 / 2 ** 16 and
    157.07 / 2 ** 16, and bfloat16 holds integers over 2 ** 16 there: 157 for both."""
    close = fixed_logits(A=-4.0, B=0.0, C=2**-9, D=-4.0)
    assert letters_of(run(close)) == letters_of(run(close, official=True)) == {"B"}
    close.model.float()
    assert letters_of(run(close)) == {"C"}, "in float32 the same logits do not tie"


def test_a_tie_of_all_letters_is_an_a():
    assert letters_of(run(fixed_logits())) == {"A"}


@pytest.mark.parametrize("official", [True, False])
def test_the_head_runs_on_one_position_per_question_and_examples_run_once(official, monkeypatch):
    """Positions that pass the decoder: with shared examples less than half of those of whole prompts."""
    positions, heads = [], []
    split = module.split_model

    class Counting:
        def __init__(self, inner) -> None:
            self.inner = inner

        def run(self, *, ids_BT, **rest):
            positions.append(ids_BT.numel())
            return self.inner.run(ids_BT=ids_BT, **rest)

        def logits(self, states_NX):
            heads.append(len(states_NX))
            return self.inner.logits(states_NX)

    monkeypatch.setattr(module, "split_model", lambda model, *, device: Counting(split(model, device=device)))
    bench = untrained()
    run(bench, official=official, batch_tokens=100_000)
    assert sum(heads) == len(DATA.questions)
    prompts = [module.fit_prompt(q, data=DATA, tokenizer=bench.tokenizer, shots=3, limit=512) for q in DATA.questions]
    whole = sum(len(prompt.ids) for prompt in prompts)
    if official:
        assert sum(positions) == whole
        assert len(positions) == len(prompts)
    else:
        assert sum(positions) < whole / 2
        assert len(positions) == 4, "per subject once the examples, once all questions"


def test_official_mode_reads_none_as_nan():
    """Ten published questions have such a choice; the letter may change with the prompt."""
    none = [Question("maps", row, f"Where in {row}?", ("Oslo", "None", "Lima", "Quito"), "B") for row in range(1, 30)]
    nan = [Question("maps", q.row, q.question, ("Oslo", "nan", "Lima", "Quito"), "B") for q in none]
    as_none, as_nan = (MmluData(dev={"maps": tuple(rows[:2])}, test={"maps": tuple(rows[2:])}) for rows in (none, nan))
    official = [answer.letter for answer in run(untrained(), as_none, official=True).answers]
    assert official == [answer.letter for answer in run(untrained(), as_nan).answers]
    assert official != [answer.letter for answer in run(untrained(), as_none).answers]


def test_groups_hold_mmlus_own_subjects_only():
    known = Question("anatomy", 1, "?", ("a", "b", "c", "d"), "A")
    result = module.MmluResult((module.MmluAnswer(known, "A", 5), module.MmluAnswer(question("maps", 2), "D", 5)))
    metrics = result.metrics()
    assert metrics["average_acc"] == 0.5
    assert (metrics["subcat_acc"], metrics["cat_acc"]) == ({"health": 1.0}, {"other (business, health, misc.)": 1.0})
    assert metrics["subject_acc"] == {"anatomy": 1.0, "maps": 0.0}
    assert metrics["subject_questions"] == {"anatomy": 1, "maps": 1}


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

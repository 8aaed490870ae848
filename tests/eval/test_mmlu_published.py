"""The published MMLU files, all 57 subjects, with OLMo's tokenizer: the prompts and how many solved examples fit."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from eval.mmlu import MmluData, as_pandas_reads, load_mmlu, mmlu_prompt
from eval.mmlu_accuracy import MmluAnswer, MmluResult, fit_prompt, letter_ids
from eval.mmlu_categories import CATEGORIES, SUBCATEGORY

DATA = Path(os.environ.get("UNLEARN_TEST_DATA") or Path(__file__).parents[3] / "shared" / "data")
LIMIT = 2048
needs_mmlu = pytest.mark.skipif(not (DATA / "mmlu").is_dir(), reason="the published MMLU files are not at hand")
needs_tokenizer = pytest.mark.skipif(not (DATA / "tokenizer").is_dir(), reason="OLMo's tokenizer is not at hand")


@pytest.fixture(scope="module")
def data() -> MmluData:
    return load_mmlu(DATA / "mmlu")


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(DATA / "tokenizer"))


@needs_mmlu
def test_all_prompts_are_those_of_a_plain_reading_by_pandas(data):
    """14,042 prompts of five solved examples, built from the frames cell by cell."""
    import pandas

    seen = as_pandas_reads(data)
    total = 0
    for subject in sorted(data.test):
        frames = [pandas.read_csv(DATA / "mmlu" / part / f"{subject}_{part}.csv", header=None) for part in ("dev", "test")]
        solved, asked = (
            [f"{q}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:" + (f" {x}\n\n" if part == 0 else "") for q, a, b, c, d, x in frame.values]
            for part, frame in enumerate(frames)
        )
        head = f"The following are multiple choice questions (with answers) about  {subject.replace('_', ' ')}.\n\n"
        assert len(solved) == 5
        expected = [head + "".join(solved) + text for text in asked]
        actual = [mmlu_prompt(subject=subject, question=question, dev=seen.dev[subject], shots=5) for question in seen.test[subject]]
        assert actual == expected, subject
        total += len(actual)
    assert total == 14042
    assert sum("nan" in question.choices for question in seen.questions) - sum("nan" in q.choices for q in data.questions) == 10


@needs_mmlu
@needs_tokenizer
def test_only_three_subjects_lose_examples_and_as_many_as_published(data, tokenizer):
    """European history: 3 shots in 155 rows, 2 in 10; US history: 4 in 195, 3 in 9; professional law: 4 in 4 rows.

    Tokenising all prompts at five shots takes a quarter of a minute. The tokens of a prompt are those of its blocks, give or take a
    few at the seams (2 each, checked here on one prompt per subject), so that blocks decide which prompts need a look.
    """
    data = as_pandas_reads(data)

    def length(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    shots: dict[str, Counter[int]] = {}
    for subject, questions in data.test.items():
        dev = data.dev[subject]
        bare = [mmlu_prompt(subject=subject, question=question, dev=(), shots=0) for question in questions]
        start = length(bare[0].partition("\n\n")[0])
        solved = [length(mmlu_prompt(subject="", question=row, dev=(), shots=0).partition("\n\n")[2]) + 2 for row in dev]
        lengths = [len(ids) for ids in tokenizer(bare, add_special_tokens=False)["input_ids"]]
        guess = [sum(solved) + own for own in lengths]
        assert abs(length(mmlu_prompt(subject=subject, question=questions[0], dev=dev, shots=5)) - guess[0]) <= 12, subject
        assert start < 30
        found = [
            fit_prompt(question, data=data, tokenizer=tokenizer, shots=5, limit=LIMIT).shots if tokens > LIMIT - 12 else 5
            for question, tokens in zip(questions, guess, strict=True)
        ]
        shots[subject] = Counter(found)
    cut = {subject: dict(sorted((count, rows) for count, rows in counter.items() if count < 5)) for subject, counter in shots.items()}
    assert {subject: counts for subject, counts in cut.items() if counts} == {
        "high_school_european_history": {2: 10, 3: 155},
        "high_school_us_history": {3: 9, 4: 195},
        "professional_law": {4: 4},
    }
    assert sum(sum(counter.values()) for counter in shots.values()) == 14042


@needs_mmlu
@needs_tokenizer
def test_a_fitted_prompt_fits_and_one_example_more_would_not(data, tokenizer):
    question = data.test["high_school_us_history"][0]
    fitted = fit_prompt(question, data=data, tokenizer=tokenizer, shots=5, limit=LIMIT)
    more = mmlu_prompt(subject=question.subject, question=question, dev=data.dev[question.subject], shots=fitted.shots + 1)
    assert len(fitted.ids) <= LIMIT < len(tokenizer(more, add_special_tokens=False)["input_ids"])
    same = fit_prompt(question, data=data, tokenizer=tokenizer, shots=5, limit=len(fitted.ids))
    assert same == fitted, "the limit itself still fits"
    assert fit_prompt(question, data=data, tokenizer=tokenizer, shots=5, limit=len(fitted.ids) - 1).shots == fitted.shots - 1


@needs_tokenizer
def test_the_candidates_are_olmos_letters(tokenizer):
    assert letter_ids(tokenizer) == [329, 378, 330, 399]


@needs_mmlu
def test_every_subject_belongs_to_one_of_17_subcategories_and_4_categories(data):
    assert set(data.test) == set(SUBCATEGORY)
    assert sorted(set(SUBCATEGORY.values())) == sorted(part for parts in CATEGORIES.values() for part in parts)
    assert (len(SUBCATEGORY), len(set(SUBCATEGORY.values())), len(CATEGORIES)) == (57, 17, 4)


@needs_mmlu
def test_groups_weigh_questions_alike(data):
    """All answered A: every group's accuracy is the share of its questions whose answer is A, not the mean of its subjects' shares."""
    result = MmluResult(tuple(MmluAnswer(question, "A", 5) for question in data.questions))
    metrics = result.metrics()
    assert list(metrics)[:3] == ["average_acc", "subcat_acc", "cat_acc"]
    assert (len(metrics["subcat_acc"]), len(metrics["cat_acc"]), len(metrics["subject_acc"])) == (17, 4, 57)
    law = [question for subject in ("international_law", "jurisprudence", "professional_law") for question in data.test[subject]]
    assert metrics["subcat_acc"]["law"] == sum(question.answer == "A" for question in law) / 1763
    assert metrics["subcat_acc"]["law"] != pytest.approx(
        sum(metrics["subject_acc"][subject] for subject in ("international_law", "jurisprudence", "professional_law")) / 3, abs=1e-3
    )
    sizes = Counter(SUBCATEGORY[question.subject] for question in data.questions)
    for category, parts in CATEGORIES.items():
        expected = sum(metrics["subcat_acc"][part] * sizes[part] for part in parts) / sum(sizes[part] for part in parts)
        assert metrics["cat_acc"][category] == pytest.approx(expected, abs=1e-12)
    assert list(metrics["cat_acc"]) == ["STEM", "humanities", "social sciences", "other (business, health, misc.)"]
    assert sum(metrics["subject_questions"].values()) == 14042

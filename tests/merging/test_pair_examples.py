"""The order that all merges share is a stratified sample at every length, and a model's answers to it come back in that order."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.config import EvalConfig
from eval.mmlu import MmluData, Question
from eval.runner import evaluate
from merging.cheap import RecallFit, fit_recall, summarise
from merging.examples import Example, FoldExamples, examples_hash, results_of_rows, rung_sizes, shared_order
from tests.helpers.merge_models import TEXTS
from trainers.data.types import AttackDocuments, Document, ForgetRetain, Kind, Record
from trainers.tiny import TinyOlmoConfig, build_tiny_olmo, train_tokenizer

torch.set_num_threads(1)


def lume_like(*, per_cell: int = 20, members: int = 12, strangers: int = 24, questions: int = 30) -> list[Example]:
    """Three tasks and both kinds in both sets, an attack, and questions."""
    found = [
        Example(f"{part}-{task}-{kind}{number}", part, task, Kind(kind))
        for part in ("forget", "retain")
        for task in ("Task1", "Task2", "Task3")
        for kind in ("sc", "qa")
        for number in range(per_cell)
    ]
    found += [Example(f"m{number}", "member") for number in range(members)]
    found += [Example(f"n{number}", "nonmember") for number in range(strangers)]
    return found + [Example(f"q{number}", "mmlu") for number in range(questions)]


def test_the_first_rung_holds_every_stratum_and_enough_of_the_attack() -> None:
    """15 strata; of 64 examples two fifths each go to tasks and attack, one fifth to MMLU."""
    examples = lume_like()
    first = [examples[position] for position in shared_order(examples, seed=0)[:64]]
    assert {example.stratum for example in first} == {example.stratum for example in examples}
    parts = Counter("task" if example.task else example.part for example in first)
    assert parts["member"] + parts["nonmember"] >= 18
    assert abs(parts["nonmember"] / parts["member"] - 2) <= 0.5, "in the proportion of the whole"
    assert min(Counter(example.stratum for example in first if example.task).values()) >= 2


def test_a_plain_shuffle_would_miss_strata() -> None:
    """The negative control: without strata the first 32 examples lack some almost always."""
    examples = lume_like(per_cell=60)
    strata = {example.stratum for example in examples}
    complete = [{example.stratum for example in random.Random(seed).sample(examples, 32)} == strata for seed in range(50)]
    assert sum(complete) < 10
    assert {examples[position].stratum for position in shared_order(examples, seed=0)[:32]} == strata


@given(st.randoms(use_true_random=False), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_the_order_depends_on_the_examples_and_the_seed_alone(chance, seed: int) -> None:
    examples = lume_like(per_cell=4, members=3, strangers=5, questions=6)
    shuffled = list(examples)
    chance.shuffle(shuffled)
    names = [examples[position].id for position in shared_order(examples, seed=seed)]
    assert [shuffled[position].id for position in shared_order(shuffled, seed=seed)] == names
    assert sorted(names) == sorted(example.id for example in examples), "each once"


def test_another_seed_gives_another_order() -> None:
    examples = lume_like()
    assert shared_order(examples, seed=0) != shared_order(examples, seed=1)


@pytest.mark.parametrize(
    ("total", "sizes"),
    [(1200, (64, 256, 1200)), (384, (64, 256, 384)), (383, (64, 383)), (96, (64, 96)), (95, (95,)), (10, (10,))],
)
def test_a_rung_that_saves_little_gives_way_to_the_whole_fold(total: int, sizes: tuple[int, ...]) -> None:
    """A rung of more than two thirds of all is left out: 256 of 384 is exactly two thirds, 64 of 95 a little more."""
    assert rung_sizes(total, first=64, eta=4) == sizes


def test_a_stretch_is_named_by_its_examples() -> None:
    examples = lume_like()
    assert examples_hash(examples[:5]) == examples_hash(list(examples[:5]))
    assert len({examples_hash(examples[:5]), examples_hash(examples[:6]), examples_hash(examples[1:6])}) == 3


@pytest.fixture(scope="module")
def fold():
    """A tiny model with a fold of rows, documents (two of one id) and questions."""
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    shape = TinyOlmoConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=128
    )
    model = build_tiny_olmo(shape, tokenizer=tokenizer, seed=0)
    rows = {
        part: tuple(
            Record(f"{part}-{task}-{kind}{number}", TEXTS[number % 3], TEXTS[(number + task) % 3], f"Task{task}")
            for task in (1, 2)
            for kind in ("sc", "qa")
            for number in range(3)
        )
        for part in ("forget", "retain")
    }
    attack = AttackDocuments(
        members=tuple(Document(f"m{number}", TEXTS[number]) for number in range(3)),
        nonmembers=(Document("n", "the mill runs past honey"), Document("n", "old bees write letters"), Document("o", "a town")),
    )
    subject = tuple(Question("bees", number, f"who {number}?", ("a", "b", "c", "d"), "ABCD"[number % 4]) for number in range(1, 6))
    data = ForgetRetain(**rows)
    mmlu = MmluData(dev={"bees": subject[:1]}, test={"bees": subject[1:]})
    examples = FoldExamples(tokenizer=tokenizer, data=data, attack=attack, mmlu=mmlu, seed=0, context=128)
    config = EvalConfig(dtype="float32", max_new_tokens=8, mmlu_shots=0, bootstrap_samples=10)
    report = evaluate(
        model=model, tokenizer=tokenizer, data=data, attack=attack, mmlu=mmlu, config=config, fold="validation", model_name="m"
    )
    return model, examples, report


def score(model, examples: FoldExamples, start: int, stop: int) -> list[list[float]]:
    return examples.score(model, start=start, stop=stop, batch_tokens=512, shots=0, max_prompt_tokens=128, device="cpu")


def close(actual, expected) -> bool:
    return all(a == pytest.approx(b, abs=2e-5) for a, b in zip(actual, expected, strict=True))


def test_two_stretches_are_the_whole(fold) -> None:
    model, examples, _ = fold
    total = len(examples.examples)
    whole, parts = score(model, examples, 0, total), score(model, examples, 0, 11) + score(model, examples, 11, total)
    assert all(close(a, b) for a, b in zip(parts, whole, strict=True))
    assert not all(close(a, b) for a, b in zip(whole[1:], whole[:-1], strict=True) if len(a) == len(b)), "negative control"


def test_the_rows_of_a_report_hold_the_same_results(fold) -> None:
    """The report of a full evaluation spares the measurement, documents of one id included."""
    model, examples, report = fold
    known = results_of_rows(examples.examples, rows=report.rows)
    assert known is not None
    measured = score(model, examples, 0, len(examples.examples))
    assert all(close(a, b) for a, b in zip(known, measured, strict=True))
    assert results_of_rows(examples.examples, rows=report.rows[1:]) is None, "one row is missing"


def test_cheap_scores_are_those_of_a_full_evaluation_where_nothing_is_estimated(fold) -> None:
    model, examples, report = fold
    cheap = summarise(examples.examples, results=score(model, examples, 0, len(examples.examples)), recall=RecallFit())
    for name in ("forget_token_accuracy", "retain_token_accuracy", "mia_auc", "mia_score", "forget_answer_log_prob", "mmlu_average"):
        assert getattr(cheap, name) == pytest.approx(report.scores[name], abs=1e-5), name
    assert cheap.num_examples == len(examples.examples)
    assert len(cheap.terms) == len(report.terms) == 8
    assert fit_recall(report.rows) == RecallFit(), "too few completions to fit anything"
    assert math.isfinite(cheap.task_aggregate or math.nan)

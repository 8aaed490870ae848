"""Readings of a model: the same numbers as an evaluation, the best of several, and drawn answers."""

from __future__ import annotations

import pytest

from eval.audit.config import SamplingConfig
from eval.audit.reading import Subject, best_of, read
from eval.audit.sampling import read_samples, sample_texts
from eval.config import EvalConfig
from eval.runner import evaluate
from tests.helpers.eval_models import half_trained, untrained

CONFIG = EvalConfig(dtype="float32", max_new_tokens=24, bootstrap_samples=2, stop_decided_questions=False)


def subject(bench) -> Subject:
    return Subject(bench.model, bench.tokenizer, CONFIG, "cpu")


def test_a_reading_gives_the_rows_of_an_evaluation() -> None:
    bench = half_trained()
    report = evaluate(
        model=bench.model, tokenizer=bench.tokenizer, data=bench.data, attack=None, mmlu=None, config=CONFIG, fold="all", model_name="m"
    )
    expected = {row["id"]: row for row in report.rows if row["set"] == "forget"}
    actual = read(subject(bench), bench.data.forget)
    assert [row["id"] for row in actual] == [record.id for record in bench.data.forget]
    assert len({row["score"] for row in actual}) > 1
    for row in actual:
        assert (row["output"], row["score"]) == (expected[row["id"]]["output"], expected[row["id"]]["score"])
        assert row["answer_log_prob"] == pytest.approx(expected[row["id"]]["answer_log_prob"], abs=1e-4)


def row(name: str, score: float, log_prob: float | None) -> dict:
    return {"id": name, "score": score, "answer_log_prob": log_prob, "token_accuracy": score, "output": f"{name} {score}"}


def test_the_best_of_several_readings_by_row() -> None:
    """Row a: scores 0.2, 0.8, 0.5, of which 0.8 is kept with the mean 0.5, and the highest log-probability -1 of another reading."""
    found = best_of([[row("a", 0.2, -1.0), row("b", 0.0, None)], [row("a", 0.8, -3.0)], [row("a", 0.5, None), row("b", 1.0, -2.0)]])
    (a, b) = found
    assert (a["id"], a["score"], a["output"], a["num_asked"]) == ("a", 0.8, "a 0.8", 3)
    assert a["mean_score"] == pytest.approx(0.5)
    assert (a["answer_log_prob"], a["token_accuracy"]) == (-1.0, 0.2)
    assert (b["score"], b["mean_score"], b["num_asked"], b["answer_log_prob"]) == (1.0, 0.5, 2, -2.0)


def test_lenient_scores_only_the_first_line_of_a_question() -> None:
    """The same answers; a question that is answered and followed by another line counts, a completion is scored as ever."""
    bench = half_trained()
    strict, lenient = (read(subject(bench), bench.data.forget, lenient=flag) for flag in (False, True))
    assert [one["output"] for one in strict] == [one["output"] for one in lenient]
    assert all(b["score"] >= a["score"] for a, b in zip(strict, lenient, strict=True))


def test_the_same_seed_draws_the_same_answers_and_another_one_others() -> None:
    bench = untrained()
    prompts = [record.input for record in bench.data.forget[:3]]
    sampling = SamplingConfig(num_samples=3)
    first, again, other = (sample_texts(subject(bench), prompts, sampling=sampling, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert [len(texts) for texts in first] == [3, 3, 3]
    assert len(set(first[0])) > 1


def test_a_cold_model_says_what_greedy_decoding_says() -> None:
    """At a temperature near 0 every draw is the argmax: the samples check the batches, the padding and the end token."""
    bench = half_trained()
    expected = [one["output"] for one in read(subject(bench), bench.data.forget)]
    texts = sample_texts(
        subject(bench), [record.input for record in bench.data.forget], sampling=SamplingConfig(num_samples=2, temperature=1e-4), seed=0
    )
    assert texts == [[text, text] for text in expected]


def test_the_best_draw_counts_and_the_mean_stands_beside_it() -> None:
    bench = half_trained()
    rows = read_samples(subject(bench), bench.data.forget, sampling=SamplingConfig(num_samples=4), seed=0)
    assert all(one["score"] >= one["mean_score"] for one in rows)
    assert any(one["score"] > one["mean_score"] for one in rows)
    assert {one["answer_log_prob"] for one in rows} == {None}

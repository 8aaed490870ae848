"""The evaluation on TOFU against a plain loop, and its laws."""

from __future__ import annotations

import copy
import functools
import json
import math
from dataclasses import replace

import pytest
import torch

from eval.rouge import rouge_l_recall
from eval.suites import tofu
from eval.suites.config import PromptStyle, SuiteConfig
from eval.suites.report import write_suite_report
from eval.suites.tofu import METRICS, QA_SETS, SCORE_NAMES, UTILITY_TERMS, evaluate_tofu, measure_retained, prepare_tofu
from eval.suites.tofu_data import TofuData, load_tofu
from eval.teacher_forced import token_scores
from tests.helpers.data import real_data
from tests.helpers.suite_data import model, tokenizer, write_tofu
from trainers.errors import InputError

CONFIG = SuiteConfig(max_new_tokens=20, dtype="float32", bootstrap_samples=40, batch_tokens=2000)
ALL, RETAINED = ("forget", "retain", "options"), ("retain", "options")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> TofuData:
    return load_tofu(write_tofu(tmp_path_factory.mktemp("tofu")))


def run(data, knows=ALL, *, config=CONFIG, against=None, own_model=None):
    torch.set_num_threads(1)
    used = own_model or model(knows)
    rows = prepare_tofu(data, tokenizer=tokenizer(), model_config=used.config, config=config)
    retained = None
    if against is not None:
        retained = measure_retained(rows, model=model(against), tokenizer=tokenizer(), config=config, name="retained")
    return evaluate_tofu(rows, model=used, tokenizer=tokenizer(), config=config, model_name="tiny", retained=retained)


@functools.cache
def plain(knows: tuple[str, ...], prompt: str, answer: str) -> tuple[float, list[bool]]:
    """(mean token loss with the end token, correct flags without it) of one answer, alone, in float64."""
    before = tokenizer()(prompt, add_special_tokens=False)["input_ids"]
    after = [*tokenizer()(" " + answer, add_special_tokens=False)["input_ids"], tokenizer().eos_token_id]
    with torch.no_grad():
        logits = model(knows)(torch.tensor([before + after])).logits[0].double()
    places = range(len(before) - 1, len(before) + len(after) - 1)
    losses = [-float(logits[place].log_softmax(-1)[token]) for place, token in zip(places, after, strict=True)]
    return sum(losses) / len(losses), [int(logits[place].argmax()) == token for place, token in zip(places, after, strict=True)][:-1]


def generated(knows: tuple[str, ...], prompt: str) -> str:
    ids = tokenizer()(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        output = model(knows).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=tokenizer().eos_token_id
        )
    return tokenizer().decode(output[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("knows", [RETAINED, ALL])
def test_every_score_agrees_with_a_plain_loop(data, knows):
    """One row at a time, in float64, straight from the definitions."""
    report = run(data, knows)
    for name in QA_SETS:
        columns: dict[str, list[float]] = {metric: [] for metric in METRICS}
        for row in data.sets[name]:
            prompt = f"Question: {row.question}\nAnswer:"
            loss, correct = plain(knows, prompt, row.answer)
            wrong = [plain(knows, prompt, text)[0] for text in row.wrong]
            right = plain(knows, prompt, row.paraphrased or row.answer)[0]
            ratio = math.exp(-sum(wrong) / len(wrong)) / math.exp(-right)
            recovered = next(k for k in range(len(correct) + 1) if all(correct[k:]))
            columns["probability"].append(math.exp(-loss))
            columns["normalised_probability"].append(math.exp(-loss) / (math.exp(-loss) + sum(math.exp(-x) for x in wrong)))
            columns["rouge_l_recall"].append(rouge_l_recall(reference=row.answer, prediction=generated(knows, prompt)))
            columns["truth_ratio"].append(min(ratio, 1 / ratio) if name == "forget" else max(0, 1 - ratio))
            columns["truth_share"].append(math.exp(-right) / (math.exp(-right) + math.exp(-sum(wrong) / len(wrong))))
            columns["exact_memorization"].append(sum(correct) / len(correct))
            columns["extraction_strength"].append(1 - recovered / len(correct))
        for metric, values in columns.items():
            assert report.scores[f"{name}_{metric}"] == pytest.approx(sum(values) / len(values), abs=1e-5), (name, metric)
    terms = [report.scores[term] for term in UTILITY_TERMS]
    assert report.scores["model_utility"] == pytest.approx(9 / sum(1 / term for term in terms), abs=1e-9)


def test_a_memorised_set_has_probability_near_one_and_prefers_the_right_answer(data):
    knowing, without = run(data).scores, run(data, RETAINED).scores
    assert knowing["forget_probability"] > 0.9 > 0.5 > without["forget_probability"]
    for metric in ("rouge_l_recall", "exact_memorization", "extraction_strength"):
        assert knowing[f"forget_{metric}"] == 1.0 > without[f"forget_{metric}"]
    # A known right answer is far more likely than wrong ones; to a model that never saw it they are nearly alike.
    assert knowing["forget_truth_ratio"] < 0.5 < without["forget_truth_ratio"]
    assert knowing["forget_truth_share"] > 0.6 > without["forget_truth_share"]
    assert (knowing["min_k_auc"], knowing["privleak"]) == (1.0, -100.0)
    assert min(knowing["model_utility"], without["model_utility"]) > 0.8


def test_forget_quality_is_one_for_the_retained_model_itself_and_small_for_one_that_knows(data):
    same, knowing = run(data, RETAINED, against=RETAINED), run(data, against=RETAINED)
    assert (same.scores["forget_quality"], same.scores["forget_quality_statistic"], same.scores["privleak"]) == (1.0, 0.0, 0.0)
    assert knowing.scores["forget_quality"] < 1e-3
    assert (same.retained_model, knowing.retained_model) == ("retained", "retained")
    assert knowing.scores["privleak"] < -10


def test_equal_models_have_equal_ratios_whatever_rounding_does(data, monkeypatch):
    """Rounding depends on what shares a pass: the rows that are compared must run in the same company for both models."""

    def rounded(*, rows, **arguments):
        found = token_scores(rows=rows, **arguments)
        return [replace(scores, log_prob_N=scores.log_prob_N * (1 + 1e-4 * len(rows))) for scores in found]

    monkeypatch.setattr(tofu, "token_scores", rounded)
    rows = prepare_tofu(data, tokenizer=tokenizer(), model_config=model(RETAINED).config, config=CONFIG)
    retained = measure_retained(rows, model=model(RETAINED), tokenizer=tokenizer(), config=CONFIG, name="same")
    report = evaluate_tofu(rows, model=model(RETAINED), tokenizer=tokenizer(), config=CONFIG, model_name="same", retained=retained)
    assert [row["ratio"] for row in report.rows if row["set"] == "forget"] == list(retained.ratios)
    assert report.scores["forget_quality_statistic"] == 0.0


def test_without_a_retained_model_forget_quality_is_null_and_the_report_says_why(data):
    report = run(data)
    assert report.scores["forget_quality"] is None
    assert any("--retained-model" in note for note in report.notes)
    assert {name for name, value in report.scores.items() if value is None} == {"forget_quality", "forget_quality_statistic"}
    assert report.scores.keys() == set(SCORE_NAMES)


def arranged(data, order):
    """The same data with the rows of every set in another order (or several times)."""
    return replace(data, sets={name: tuple(order(rows)) for name, rows in data.sets.items()})


def numbered(rows):
    return [replace(row, id=f"{row.id}-{copy}", unit=f"{row.unit}-{copy}") for copy in (1, 2) for row in rows]


def test_the_order_of_rows_changes_no_score(data):
    expected, actual = run(data, RETAINED, against=ALL).scores, run(arranged(data, reversed), RETAINED, against=ALL).scores
    assert actual == pytest.approx(expected, abs=1e-6)


def test_duplicated_rows_change_no_score_but_the_test_of_forget_quality(data):
    expected, actual = run(data, RETAINED, against=ALL).scores, run(arranged(data, numbered), RETAINED, against=ALL).scores
    assert actual["forget_quality"] < expected["forget_quality"]
    without_test = {name: value for name, value in expected.items() if name != "forget_quality"}
    assert {name: actual[name] for name in without_test} == pytest.approx(without_test, abs=1e-6)


def test_leaving_rows_out_does_change_scores(data):
    """The negative control of the two tests above."""
    expected, actual = run(data, RETAINED).scores, run(arranged(data, lambda rows: rows[: len(rows) // 2]), RETAINED).scores
    assert actual["forget_probability"] != pytest.approx(expected["forget_probability"], abs=1e-6)


@pytest.mark.parametrize("batch_tokens", [1, 50_000])
def test_batches_change_no_score(data, batch_tokens):
    small = arranged(data, lambda rows: rows[:4])
    config = CONFIG.model_copy(update={"batch_tokens": batch_tokens})
    assert run(small, RETAINED, config=config).scores == pytest.approx(run(small, RETAINED).scores, abs=1e-6)


def test_the_order_of_wrong_answers_is_irrelevant_but_they_count(data):
    def with_wrong(change):
        return arranged(data, lambda rows: [replace(row, wrong=tuple(change(row.wrong))) for row in rows[:6]])

    expected = run(with_wrong(lambda wrong: wrong), RETAINED).scores
    assert run(with_wrong(reversed), RETAINED).scores == pytest.approx(expected, abs=1e-6)
    fewer = run(with_wrong(lambda wrong: wrong[:1]), RETAINED).scores
    assert fewer["forget_truth_ratio"] != pytest.approx(expected["forget_truth_ratio"], abs=1e-6)


def test_the_seed_changes_intervals_and_no_score(data):
    first, second = (run(data, RETAINED, config=CONFIG.model_copy(update={"bootstrap_seed": seed})) for seed in (0, 1))
    assert first.scores == second.scores
    assert first.intervals.keys() == second.intervals.keys()
    assert first.intervals != second.intervals
    assert first.config["bootstrap_seed"] == 0
    for name, (low, high) in first.intervals.items():
        assert low <= first.scores[name] <= high
    assert {"model_utility", "privleak", "min_k_auc", "forget_probability"} <= first.intervals.keys()
    assert "forget_quality" not in first.intervals


def test_a_chat_template_changes_the_prompt(data):
    own = copy.deepcopy(tokenizer())
    own.chat_template = "{% for m in messages %}Question: {{ m['content'] }}\nAnswer: {% endfor %}"
    small = arranged(data, lambda rows: rows[:2])
    config = CONFIG.model_copy(update={"prompt": PromptStyle.CHAT})
    rows = prepare_tofu(small, tokenizer=own, model_config=model(ALL).config, config=config)
    encoded = rows.encoded["forget", 0, "answer"]
    assert own.decode(list(encoded.input_ids[: encoded.num_prompt])) == "Question: Where does Ada Moss live?\nAnswer: "
    report = evaluate_tofu(rows, model=model(ALL), tokenizer=own, config=config, model_name="tiny")
    assert report.scores["forget_probability"] != run(small).scores["forget_probability"]
    assert any("chat template" in text for text in report.deviations)


def test_sets_that_are_missing_leave_what_needs_them_null(tmp_path):
    plain_forget = [{"question": "Where does Ada Moss live?", "answer": "Ada Moss lives in Oslo."}]
    folder = write_tofu(tmp_path, forget10_perturbed=None, forget10=plain_forget, real_authors_perturbed=None, holdout10=None)
    report = run(load_tofu(folder), against=RETAINED)
    nulls = {name for name, value in report.scores.items() if value is None}
    assert nulls == {
        *("model_utility", "forget_quality", "forget_quality_statistic", "min_k_auc", "privleak"),
        *("forget_normalised_probability", "forget_truth_ratio", "forget_truth_share"),
        *(f"real_authors_{metric}" for metric in METRICS),
    }
    for text in ("real_authors_perturbed", "holdout", "wrong answers"):
        assert any(text in note for note in report.notes)


def test_a_model_that_is_not_a_number_has_defined_results(data, tmp_path):
    """Means of losses are null, generated text scores what it says, losses that are not finite tie in the attack."""
    broken = copy.deepcopy(model(()))
    with torch.no_grad():
        broken.get_output_embeddings().weight.fill_(math.nan)
    small = arranged(data, lambda rows: rows[:3])
    report = run(small, own_model=broken, against=RETAINED)
    assert report.scores["min_k_auc"] == 0.5
    assert report.scores["forget_rouge_l_recall"] == 0.0
    for name in ("model_utility", "forget_quality", "forget_probability", "retain_truth_ratio"):
        assert report.scores[name] is None
    assert any("not finite" in note for note in report.notes)
    assert any("not a number: forget quality" in note for note in report.notes)
    write_suite_report(report, tmp_path / "eval.json")
    assert "NaN" not in (tmp_path / "eval.json").read_text() + (tmp_path / "eval-rows.jsonl").read_text()


def test_a_row_longer_than_the_context_is_named_before_weights_are_needed(data):
    long = arranged(data, lambda rows: [replace(rows[0], answer="maps " * 300), *rows[1:]])
    with pytest.raises(InputError, match="forget10_perturbed-0001"):
        prepare_tofu(long, tokenizer=tokenizer(), model_config=model(()).config, config=CONFIG)


def test_a_tokenizer_of_another_model_is_refused(data):
    config = copy.deepcopy(model(()).config)
    config.vocab_size = 300
    with pytest.raises(InputError, match="300 tokens"):
        prepare_tofu(data, tokenizer=tokenizer(), model_config=config, config=CONFIG)


def test_a_repetition_penalty_of_the_checkpoint_takes_effect(data):
    small = arranged(data, lambda rows: rows[:3])
    altered = copy.deepcopy(model(RETAINED))
    altered.generation_config.repetition_penalty = 1.8
    free, changed = run(small, RETAINED), run(small, own_model=altered)
    assert [row.get("output") for row in free.rows] != [row.get("output") for row in changed.rows]
    assert any("repetition_penalty" in note for note in changed.notes)


def test_the_report_is_written_with_its_rows(data, tmp_path):
    report = run(data, against=RETAINED)
    write_suite_report(report, tmp_path / "eval.json")
    written = json.loads((tmp_path / "eval.json").read_text())
    assert (written["schema_version"], written["benchmark"], written["model"]) == (1, "tofu", "tiny")
    assert written["scores"] == pytest.approx(report.scores)
    assert written["config"]["split"] == "forget10"
    assert written["counts"]["scored_forget"] == 20
    assert "rows" not in written
    rows = [json.loads(line) for line in (tmp_path / "eval-rows.jsonl").read_text().splitlines()]
    assert len(rows) == 20 + 20 + 4 + 4 + 10
    assert {row["set"] for row in rows} == {*QA_SETS, "holdout"}


def test_real_rows_give_every_score_a_value_with_a_random_model():
    """Two authors of each set; all nine terms of the utility, and the attack, are defined."""
    from trainers.tiny import TinyOlmoConfig, build_tiny_olmo, train_tokenizer

    torch.set_num_threads(1)
    loaded = load_tofu(real_data("tofu"), split="forget01")
    data = replace(loaded, sets={name: rows[:40] for name, rows in loaded.sets.items()})
    own = train_tokenizer([f"{row.question} {row.answer}" for rows in data.sets.values() for row in rows], vocab_size=700)
    shape = TinyOlmoConfig(vocab_size=700, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    random = build_tiny_olmo(shape, tokenizer=own, seed=0)
    config = CONFIG.model_copy(update={"max_new_tokens": 8})
    rows = prepare_tofu(data, tokenizer=own, model_config=random.config, config=config)
    retained = measure_retained(rows, model=random, tokenizer=own, config=config, name="same")
    report = evaluate_tofu(rows, model=random, tokenizer=own, config=config, model_name="random", retained=retained)
    assert all(value is not None for value in report.scores.values())
    assert report.scores["forget_quality"] == pytest.approx(1.0, abs=1e-9)
    assert report.scores["forget_truth_ratio"] > 0.8, "it has no preference"
    # Two authors give each resample one of four compositions.
    assert report.sets["forget"]["units"] == 2
    assert report.sets["world_facts"]["units"] == 40
    assert any("2 authors of forget" in note for note in report.notes)
    assert any("too few" in note for note in report.notes)

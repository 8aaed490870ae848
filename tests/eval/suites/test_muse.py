"""The evaluation on a MUSE-style folder, of invented people: the published texts are under other people's copyright."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch

from eval.membership import min_k
from eval.mia import attack_auc
from eval.rouge import rouge_l_f1
from eval.suites.config import SuiteConfig
from eval.suites.muse import SCORE_NAMES, cut_answer, evaluate_muse, measure_retained_attack, prepare_muse
from eval.suites.muse_data import load_muse
from eval.suites.report import write_suite_report
from eval.teacher_forced import token_scores
from tests.helpers.data import write_rows
from tests.helpers.suite_data import model, muse_files, tokenizer, write_muse
from trainers.data.encode import encode_text
from trainers.errors import InputError

CONFIG = SuiteConfig(max_new_tokens=20, dtype="float32", bootstrap_samples=40, batch_tokens=2000)
ALL, RETAINED = ("forget", "retain", "options"), ("retain", "options")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_muse(write_muse(tmp_path_factory.mktemp("muse")))


def run(data, knows=ALL, *, config=CONFIG, against=None, own_model=None):
    torch.set_num_threads(1)
    used = own_model or model(knows)
    rows = prepare_muse(data, tokenizer=tokenizer(), model_config=used.config, config=config)
    retained = None
    if against is not None:
        retained = measure_retained_attack(rows, model=model(against), tokenizer=tokenizer(), config=config, name="retained")
    return evaluate_muse(rows, model=used, tokenizer=tokenizer(), config=config, model_name="tiny", retained=retained)


def generated(knows, prompt):
    ids = tokenizer()(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        output = model(knows).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=tokenizer().eos_token_id
        )
    return tokenizer().decode(output[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        (" Oslo", " Oslo"),
        (" Oslo\n\nQuestion: Who?", " Oslo"),
        (" Oslo\nQuestion", " Oslo"),
        (" Oslo Question: Who?", " Oslo "),
        (" a Question of time\nof clocks", " a Question of time\nof clocks"),
        ("\n\nOslo", ""),
    ],
)
def test_an_answer_ends_at_a_blank_line_or_at_the_next_question(text, cut):
    assert cut_answer(text) == cut


@pytest.mark.parametrize("knows", [RETAINED, ALL])
def test_knowledge_scores_agree_with_a_plain_loop(data, knows):
    """Both solved examples before each question, the text cut, F1 against the answer."""
    scores = run(data, knows).scores
    for side in ("forget", "retain"):
        shots = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in data.examples[side])
        values = []
        for question, answer in data.questions[side]:
            text = generated(knows, f"{shots}Question: {question}\nAnswer:")
            values.append(rouge_l_f1(reference=answer, prediction=text.split("\n\n")[0].split("\nQuestion")[0].split("Question:")[0]))
        assert scores[f"knowmem_{side}_rouge_l_f1"] == pytest.approx(sum(values) / len(values), abs=1e-9)


def test_the_attack_agrees_with_a_plain_loop(data):
    losses = {}
    for side in ("forget", "holdout"):
        encoded = [encode_text(text, tokenizer=tokenizer()) for text in data.texts[side]]
        found = token_scores(model=model(RETAINED), tokenizer=tokenizer(), rows=encoded, batch_tokens=1, device="cpu")
        losses[side] = [min_k(scores, fraction=0.4) for scores in found]
    expected = attack_auc(member_losses=losses["forget"], nonmember_losses=losses["holdout"])
    scores = run(data, RETAINED).scores
    assert scores["min_k_auc"] == pytest.approx(expected, abs=1e-9)
    assert scores["privleak"] == pytest.approx(((1 - expected) - 0.5) / 0.5 * 100, abs=1e-9)


def test_a_memorised_set_is_repeated_and_recognised_and_another_is_not(data):
    knowing, without = run(data, against=RETAINED).scores, run(data, RETAINED, against=RETAINED).scores
    assert knowing.keys() == set(SCORE_NAMES)
    assert None not in knowing.values()
    for metric in ("rouge_l_f1", "rouge_l_recall", "exact_memorization", "extraction_strength"):
        assert knowing[f"verbmem_forget_{metric}"] == 1.0 > without[f"verbmem_forget_{metric}"]
    assert knowing["min_k_auc"] > 0.9 > without["min_k_auc"]
    assert without["privleak"] == 0.0 > knowing["privleak"]


def test_text_after_the_reference_costs_f1_and_not_recall():
    assert rouge_l_f1(reference="Ada lives in Oslo", prediction="Ada lives in Oslo") == 1.0
    assert rouge_l_f1(reference="Ada lives in Oslo", prediction="Ada lives in Oslo and sells old maps") == pytest.approx(2 * 0.5 / 1.5)


def test_half_stands_in_for_the_retained_model_and_the_report_says_so(data):
    report = run(data)
    assert report.retained_model is None
    assert report.scores["privleak"] == pytest.approx(((1 - report.scores["min_k_auc"]) - 0.5) / 0.5 * 100)
    assert any("0.5" in note for note in report.notes)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".json lines"])
def test_other_file_types_give_the_same_data(tmp_path, data, suffix):
    for name, rows in muse_files().items():
        objects = [row if isinstance(row, dict) else {"text": row} for row in rows]
        write_rows(tmp_path / f"{name}{suffix.split()[0]}", objects)
    actual = load_muse(tmp_path)
    assert (actual.questions, actual.examples, actual.passages, actual.texts) == (data.questions, data.examples, data.passages, data.texts)


def test_the_folders_as_published_give_the_same_data(tmp_path, data):
    names = {
        **{f"knowmem_{side}{icl}": f"knowmem/{side}_qa{icl}.json" for side in ("forget", "retain") for icl in ("", "_icl")},
        "verbmem_forget": "verbmem/forget.json",
        **{f"privleak_{side}": f"privleak/{side}.json" for side in ("forget", "retain", "holdout")},
    }
    for name, rows in muse_files().items():
        path = tmp_path / names[name]
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(rows), encoding="utf-8")
    actual = load_muse(tmp_path)
    assert (actual.questions, actual.examples, actual.passages, actual.texts) == (data.questions, data.examples, data.passages, data.texts)
    assert actual.sources["knowmem_forget"] == "knowmem/forget_qa.json"


def test_parts_that_are_missing_are_null_and_noted(tmp_path):
    folder = write_muse(tmp_path, knowmem_retain=None, knowmem_forget_icl=None, verbmem_forget=None, privleak_holdout=None)
    report = run(load_muse(folder))
    measured = {name for name, value in report.scores.items() if value is not None}
    assert measured == {"knowmem_forget_rouge_l_f1", "knowmem_forget_rouge_l_recall"}
    for text in ("No knowmem_retain", "without solved examples", "verbatim", "no membership attack"):
        assert any(text in note for note in report.notes)


def test_a_folder_with_nothing_to_score_is_refused(tmp_path):
    names = [name for name in muse_files() if name not in ("knowmem_forget_icl", "privleak_holdout")]
    with pytest.raises(InputError, match="nothing that MUSE evaluates"):
        load_muse(write_muse(tmp_path, **dict.fromkeys(names)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"knowmem_forget": [{"question": "Who?"}]}, ("'answer'", "knowmem_forget.json, item 1")),
        ({"verbmem_forget": [{"prompt": "a", "gt": "b"}, {"prompt": "a", "gt": 3}]}, ("'gt'", "item 2", "a number")),
        ({"privleak_forget": ["one two", 7]}, ("not a text but a number", "privleak_forget.json, item 2")),
        ({"privleak_forget": []}, ("no rows", "privleak_forget.json")),
        ({"knowmem_retain_icl": ["Who?"]}, ("not an object but a text", "knowmem_retain_icl.json, item 1")),
    ],
)
def test_bad_input_is_named_by_file_row_and_field(tmp_path, changes, says):
    with pytest.raises(InputError) as caught:
        load_muse(write_muse(tmp_path, **changes))
    for text in says:
        assert text in str(caught.value)


def test_texts_longer_than_the_context_are_cut_and_counted(tmp_path):
    folder = write_muse(tmp_path, privleak_holdout=["Ada lives in Oslo. " * 90, "Hugo sells maps."])
    report = run(load_muse(folder), RETAINED)
    assert any(note.startswith("1 texts of the membership attack were cut") for note in report.notes)


def test_a_text_of_one_token_is_refused(tmp_path):
    with pytest.raises(InputError, match="single token"):
        run(load_muse(write_muse(tmp_path, privleak_holdout=["x"])))


def test_a_prompt_that_fills_the_context_is_named(tmp_path):
    folder = write_muse(tmp_path, verbmem_forget=[{"prompt": "maps " * 300, "gt": "clocks"}])
    with pytest.raises(InputError, match="verbmem_forget-0001"):
        run(load_muse(folder))


def test_the_reference_of_a_long_passage_is_cut_at_what_can_be_generated(data, tmp_path):
    long = write_muse(tmp_path, verbmem_forget=[{"prompt": "Ada", "gt": "lives in Oslo and sells maps. " * 50}])
    report = run(load_muse(long), config=CONFIG.model_copy(update={"max_new_tokens": 6}))
    row = next(row for row in report.rows if row["set"] == "verbmem_forget")
    assert len(tokenizer()(" " + row["expected"])["input_ids"]) == 6


def test_the_order_of_rows_changes_no_score_but_leaving_some_out_does(tmp_path):
    backwards = {name: rows[::-1] for name, rows in muse_files().items() if not name.endswith("_icl")}
    half = {name: rows[: len(rows) // 2] for name, rows in muse_files().items() if not name.endswith("_icl")}
    expected = run(load_muse(write_muse(tmp_path / "a")), RETAINED).scores
    assert run(load_muse(write_muse(tmp_path / "b", **backwards)), RETAINED).scores == pytest.approx(expected, abs=1e-6)
    assert run(load_muse(write_muse(tmp_path / "c", **half)), RETAINED).scores != pytest.approx(expected, abs=1e-6)


def test_a_model_that_is_not_a_number_has_defined_results(data, tmp_path):
    broken = copy.deepcopy(model(()))
    with torch.no_grad():
        broken.get_output_embeddings().weight.fill_(math.nan)
    report = run(data, own_model=broken)
    assert (report.scores["min_k_auc"], report.scores["privleak"]) == (0.5, 0.0)
    assert report.scores["verbmem_forget_rouge_l_f1"] == 0.0
    assert any("not finite" in note for note in report.notes)
    write_suite_report(report, tmp_path / "eval.json")


def test_intervals_are_of_rows_and_cover_their_points(data):
    report = run(data, RETAINED)
    assert report.sets["knowmem_forget"]["units"] == 20
    assert report.intervals.keys() == report.scores.keys()
    for name, (low, high) in report.intervals.items():
        assert low <= report.scores[name] <= high

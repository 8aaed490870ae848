"""The whole evaluation against a plain loop, one row at a time."""

from __future__ import annotations

import math

import pytest
import torch

from eval.bootstrap import paired_difference
from eval.config import EvalConfig
from eval.exact_match import exact_match
from eval.forgetting import Verdict, classify
from eval.mmlu import MmluData, Question
from eval.report import SCORE_NAMES, read_report, write_report
from eval.rouge import rouge_l_recall
from eval.runner import evaluate, loss_only
from tests.helpers.eval_models import bench_data, build_bench, half_trained, untrained
from trainers.data.types import AttackDocuments, Document, ForgetRetain, Record
from trainers.errors import InputError

CONFIG = EvalConfig(max_new_tokens=40, dtype="float32", batch_tokens=1500, bootstrap_samples=50, mmlu_shots=2)
OFFICIAL = CONFIG.model_copy(update={"official": True})


def mmlu() -> MmluData:
    def question(row: int) -> Question:
        return Question("maps", row, f"Where in {1900 + row}?", ("Oslo", "Lima", "Cairo", "Quito"), "ABCD"[row % 4])

    return MmluData(dev={"maps": tuple(map(question, (1, 2)))}, test={"maps": tuple(map(question, range(3, 13)))})


def run(bench, config=CONFIG, **changes):
    settings = {"data": bench.data, "attack": bench.attack, "mmlu": mmlu(), "fold": "test", "model_name": "tiny"} | changes
    return evaluate(model=bench.model, tokenizer=bench.tokenizer, config=config, **settings)


def plain_texts(bench) -> dict[str, str]:
    """Row id -> text, by the model's own generate on each prompt alone, cleaned up as the benchmark's decode call does."""
    texts = {}
    for record in (*bench.data.forget, *bench.data.retain):
        ids = bench.tokenizer(record.input, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            output = bench.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, pad_token_id=bench.tokenizer.eos_token_id
            )
        text = bench.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        for old, new in ((" .", "."), (" ,", ","), (" n't", "n't"), (" 's", "'s")):
            text = text.replace(old, new)
        texts[record.id] = text
    return texts


def task_rows(report):
    return [row for row in report.rows if row["part"] == "task"]


@pytest.mark.parametrize("bench", [untrained, half_trained])
@pytest.mark.parametrize("config", [OFFICIAL, CONFIG.model_copy(update={"stop_decided_questions": False})])
def test_every_row_has_the_text_of_a_plain_loop(bench, config):
    expected = plain_texts(bench())
    actual = {row["id"]: row["output"] for row in task_rows(run(bench(), config))}
    assert actual == expected
    assert len(set(expected.values())) > 1


@pytest.mark.parametrize("bench", [untrained, half_trained])
def test_decided_questions_are_cut_short_and_score_the_same(bench):
    expected = plain_texts(bench())
    rows = task_rows(run(bench()))
    assert any(row["decided"] for row in rows)
    for row in rows:
        if row["decided"] and row["kind"] == "qa":
            assert row["score"] == 0.0
            assert exact_match(expected=row["expected"], output=expected[row["id"]]) == 0.0
        elif row["decided"]:
            assert row["set"] == "forget", "retain completions are read for degenerate text"
            assert row["score"] == 1.0 == rouge_l_recall(reference=row["expected"], prediction=expected[row["id"]])
        else:
            assert row["output"] == expected[row["id"]]


def without_end(bench):
    """A model that never says the end token: what it knows by heart it says, and goes on."""
    end = bench.tokenizer.eos_token_id
    head = bench.model.get_output_embeddings()
    bias = torch.zeros(head.weight.shape[0])
    bias[end] = -1e4
    head.bias = torch.nn.Parameter(bias, requires_grad=False)
    return bench


def test_completions_that_hold_the_whole_reference_stop_in_the_forget_set_only():
    """A model that lost its end token decodes its forget rows for nothing: their recall is 1 and stays 1."""
    bench = without_end(build_bench(steps=100))
    expected = plain_texts(bench)
    report = run(bench, mmlu=None)
    rows = [row for row in task_rows(report) if row["kind"] == "sc"]
    decided = [row for row in rows if row["decided"]]
    assert len(decided) == 3, "the memorised half of six"
    for row in decided:
        assert expected[row["id"]].startswith(row["output"])
        assert len(row["output"]) < len(expected[row["id"]])
    official = run(bench, OFFICIAL, mmlu=None)
    assert not any(row["decided"] for row in task_rows(official))
    for name in SCORE_NAMES:
        assert report.scores[name] == pytest.approx(official.scores[name], abs=1e-6), name
    assert all(row["output"] == expected[row["id"]] for row in rows if row["set"] == "retain")


def test_rows_carry_the_scores_of_their_texts():
    for row in task_rows(run(half_trained())):
        if row["kind"] == "sc":
            assert row["score"] == rouge_l_recall(reference=row["expected"], prediction=row["output"])
        else:
            assert row["score"] == exact_match(expected=row["expected"], output=row["output"])


@pytest.mark.parametrize("bench", [untrained, half_trained])
def test_official_mode_gives_the_same_scores(bench):
    fast, official = run(bench()), run(bench(), OFFICIAL)
    assert fast.scores.keys() == official.scores.keys() == set(SCORE_NAMES)
    for name in SCORE_NAMES:
        assert fast.scores[name] == pytest.approx(official.scores[name], abs=1e-6), name
    assert fast.official.keys() == official.official.keys()
    assert fast.counts["decoded_rows"] <= official.counts["decoded_rows"] == 24
    assert len(official.deviations) < len(fast.deviations)


def test_known_and_decided_answers_are_not_decoded():
    """Not decoded: rows that are argmax-correct to the end token, and questions whose first foreign token is seen in the same pass."""
    report = run(half_trained())
    known = sum(row["matched_fraction"] == 1 for row in task_rows(report))
    assert known == 12, "the memorised half"
    whole = run(half_trained(), CONFIG.model_copy(update={"stop_decided_questions": False}))
    assert whole.counts["decoded_rows"] == 24 - known
    assert report.counts["decoded_rows"] == 24 - known - sum(row["decided"] for row in task_rows(report) if row["kind"] == "qa")


def test_batch_size_changes_no_text_and_no_score():
    reports = [run(half_trained(), CONFIG.model_copy(update={"batch_tokens": size})) for size in (1, 200, 50_000)]
    assert [row["output"] for row in task_rows(reports[0])] == [row["output"] for row in task_rows(reports[2])]
    for name in SCORE_NAMES:
        assert reports[0].scores[name] == pytest.approx(reports[1].scores[name], abs=1e-6)


def test_forgetting_and_retention_are_means_of_both_kinds():
    scores = run(half_trained()).scores
    assert scores["forgetting"] == pytest.approx(1 - (scores["forget_regurgitation"] + scores["forget_knowledge"]) / 2, abs=1e-12)
    assert scores["retention"] == pytest.approx((scores["retain_regurgitation"] + scores["retain_knowledge"]) / 2, abs=1e-12)
    assert scores["final_score"] == pytest.approx((scores["task_aggregate"] + scores["mia_score"] + scores["mmlu_average"]) / 3, abs=1e-12)


def test_the_cheap_signals_are_those_of_the_full_report():
    bench = half_trained()
    signals = loss_only(model=bench.model, tokenizer=bench.tokenizer, data=bench.data, attack=bench.attack, config=CONFIG)
    scores = run(bench).scores
    for name in ("forget_answer_log_prob", "retain_answer_log_prob", "forget_token_accuracy", "retain_token_accuracy", "mia_auc"):
        assert getattr(signals, name) == pytest.approx(scores[name], abs=1e-9)
    assert signals.finite
    assert signals.forget_answer_log_prob < 0


def test_swapping_members_and_nonmembers_mirrors_the_auc():
    bench = half_trained()
    swapped = AttackDocuments(members=bench.attack.nonmembers, nonmembers=bench.attack.members)
    assert run(bench, attack=swapped, mmlu=None).scores["mia_auc"] == pytest.approx(1 - run(bench, mmlu=None).scores["mia_auc"])


def test_parts_that_were_not_measured_are_null():
    report = run(half_trained(), attack=None, mmlu=None)
    missing = {name for name, value in report.scores.items() if value is None}
    assert missing >= {"mia_auc", "mia_score", "mmlu_average", "final_score"}
    assert not missing & {"forget_answer_log_prob", "retain_answer_log_prob", "task_aggregate"}
    assert report.official["aggregate-score"] == -1
    assert sum("the official aggregate-score is -1" in note for note in report.notes) == 2


def test_rows_of_unknown_kind_are_counted_and_left_out():
    data = bench_data()
    other = Record(id="doc00xy1", input="In the year", output="nothing", task="Task1")
    report = run(half_trained(), data=ForgetRetain(forget=(*data.forget, other), retain=data.retain))
    assert report.counts["skipped_rows"] == 1
    assert "doc00xy1" not in {row["id"] for row in task_rows(report)}
    assert any(note.startswith("1 rows are neither") for note in report.notes)


def test_a_task_without_questions_leaves_the_task_aggregate_undefined(tmp_path):
    data = bench_data()
    retain = tuple(row for row in data.retain if not (row.task == "Task1" and row.id.endswith("qa0")))
    report = run(untrained(), data=ForgetRetain(forget=data.forget, retain=retain))
    assert math.isnan(report.official["aggregated-terms"][7])
    assert any("retain Task1 knowledge" in note for note in report.notes)
    write_report(report, tmp_path / "eval.json")
    assert read_report(tmp_path / "eval.json").official["aggregated-terms"][7] is None


def test_an_empty_generation_scores_as_the_text_nan_only_in_official_mode():
    """A model whose first token is always the end token; one reference reads "None"."""
    bench = build_bench(steps=0)
    end = bench.tokenizer.eos_token_id
    direction = torch.zeros(bench.model.get_output_embeddings().weight.shape[0])
    direction[end] = 1e4
    head = bench.model.get_output_embeddings()
    head.bias = torch.nn.Parameter(direction)
    data = ForgetRetain(forget=bench.data.forget, retain=(Record("docqa0", "Who?", "None", "Task1"),))
    scores = [run(bench, config, data=data, mmlu=None).scores["retain_knowledge"] for config in (CONFIG, OFFICIAL)]
    assert scores == [0.0, 1.0]


def test_a_diverged_model_is_reported_and_dead(tmp_path):
    bench = build_bench(steps=0)
    with torch.no_grad():
        bench.model.get_output_embeddings().weight.fill_(math.nan)
    report = run(bench)
    assert report.scores["forget_answer_log_prob"] is None
    assert report.scores["mia_auc"] == 0.5, "all losses are infinite and tie"
    assert any("not finite" in note for note in report.notes)
    assert classify(scores=report.scores, baseline=run(half_trained()).scores).verdict is Verdict.DEAD
    write_report(report, tmp_path / "eval.json")
    assert not loss_only(model=bench.model, tokenizer=bench.tokenizer, data=bench.data, attack=None, config=CONFIG).finite


def test_a_row_longer_than_the_context_is_named():
    data = bench_data()
    long = Record(id="doc99sc1", input="shop " * 90, output="clocks", task="Task1")
    with pytest.raises(InputError, match="doc99sc1"):
        run(build_bench(steps=0, context=64), data=ForgetRetain(forget=(long,), retain=data.retain), attack=None, mmlu=None)


def test_a_repetition_penalty_of_the_checkpoint_takes_effect():
    bench = build_bench(steps=0, seed=3)
    free = [row["output"] for row in task_rows(run(bench, mmlu=None))]
    bench.model.generation_config.repetition_penalty = 1.5
    fast, official = run(bench, mmlu=None), run(bench, OFFICIAL, mmlu=None)
    assert [row["output"] for row in task_rows(fast)] == [row["output"] for row in task_rows(official)] != free
    assert any("repetition_penalty" in note for note in fast.notes)


def test_reports_survive_their_files_and_can_be_paired(tmp_path):
    for name, bench in (("a", half_trained()), ("b", untrained())):
        write_report(run(bench), tmp_path / f"{name}.json")
    a, b = read_report(tmp_path / "a.json"), read_report(tmp_path / "b.json")
    found = paired_difference(a, b, samples=50)
    assert found["retention"]["difference"] == pytest.approx(a.scores["retention"] - b.scores["retention"], abs=1e-12)
    assert found["retention"]["low"] > 0
    assert a.rows[0].keys() == {
        *("part", "set", "id", "document", "task", "kind", "input", "expected", "output", "score"),
        *("answer_log_prob", "num_tokens", "token_accuracy", "matched_fraction", "extraction_strength", "decided"),
    }


def test_progress_is_told_about_every_part():
    said = []
    run(half_trained(), progress=said.append)
    assert [line.split(":")[0] for line in said] == ["forget", "retain", "6 of 24 answers decoded", "membership attack", "MMLU"]


def test_an_attack_document_of_one_token_is_noted():
    bench = half_trained()
    attack = AttackDocuments(members=(*bench.attack.members, Document("tiny", "x")), nonmembers=bench.attack.nonmembers)
    report = run(bench, attack=attack, mmlu=None)
    assert any(note.startswith("1 attack documents have no finite loss") for note in report.notes)

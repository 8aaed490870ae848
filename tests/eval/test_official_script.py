"""The official block against the benchmark's script, written once more as plainly as possible."""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from eval.answers import Answer, Answers
from eval.config import EvalConfig
from eval.exact_match import exact_match
from eval.measure import AttackLosses, TaskSet
from eval.mia import attack_auc
from eval.mmlu import Question
from eval.mmlu_accuracy import MmluAnswer, MmluResult
from eval.report import EvalReport
from eval.rouge import rouge_l_recall
from eval.rows import task_rows
from eval.summary import build_report
from launcher.cli import main
from tests.helpers.eval_models import bench_attack, bench_data, half_trained
from tests.helpers.official_script import assert_same_block, metric_stage, mmlu_accuracy_of, whole_script, write_answers
from trainers.data.types import ForgetRetain, Kind, Record

DATA = Path(os.environ.get("UNLEARN_TEST_DATA") or Path(__file__).parents[3] / "shared" / "data")
MISSING = ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA", "NULL", "NaN",
           "None", "n/a", "nan", "null")  # fmt: skip
TEXTS = ("Oslo", " oslo\n", "moved to Oslo, didn't rest", 'a "quoted", comma\nand a line', "Zürich ist schön", "雨\u2028☂", "7",
         "007", "7.0", "1e3", "True", "-", "a\rb", "running dogs ran", "\ufeffx", "a\0b")  # fmt: skip
SUFFIXES = ("sc1", "qa0", "qa4", "sc10", "qa12", "xy1")


@st.composite
def answered(draw, prefix: str) -> list[tuple[Record, str]]:
    """Records of a set with a generated text each; those without a score repeat texts of scored ones."""
    tasks = draw(st.lists(st.sampled_from(["Task1", "Task2", 'T "3", x', "Zusätzlich", "task1"]), min_size=1, max_size=3, unique=True))
    pool = draw(st.sampled_from([TEXTS, MISSING, ("7", "007", "", "1"), ("True", "False", ""), TEXTS + MISSING]))
    size = draw(st.integers(1, 10))
    rows: list[tuple[Record, str]] = []
    for number in range(size):
        suffix = "sc1" if number == 0 else draw(st.sampled_from(SUFFIXES))
        name = f'{prefix}"{number}"{suffix}'
        expected, output = draw(st.sampled_from(pool)) or "x", draw(st.sampled_from(pool))
        if name[:-1][-2:] not in ("sc", "qa"):
            expected, output = rows[0][0].output, rows[0][1]
        if draw(st.booleans()) and name[:-1][-2:] in ("sc", "qa"):
            output = expected
        rows.append((Record(id=name, input=f"Where, in {number}?", output=expected, task=draw(st.sampled_from(tasks))), output))
    return rows


LOSSES = st.lists(st.sampled_from([0.5, 0.75, 1.0, 1.25, 2.0]), min_size=1, max_size=8)


def our_report(
    forget: list[tuple[Record, str]],
    retain: list[tuple[Record, str]],
    *,
    losses: tuple[list[float], list[float]] | None = ([1.0, 2.0], [2.0, 3.0]),
    correct: list[bool] | None = None,
    official: bool = True,
) -> EvalReport:
    """The report of given generations."""
    scored = {
        name: [(record, text) for record, text in rows if record.kind is not Kind.OTHER]
        for name, rows in (("forget", forget), ("retain", retain))
    }
    measured = SimpleNamespace(answer_log_prob=-1.0, num_tokens=2, token_accuracy=0.5, matched_fraction=0.5, extraction_strength=0.5)
    sets = {name: TaskSet([record for record, _ in rows], [], [measured] * len(rows)) for name, rows in scored.items()}
    for task_set in sets.values():
        task_set.rows.extend([None] * len(task_set.records))
    places = [(name, index) for name, rows in scored.items() for index in range(len(rows))]
    answers = Answers([Answer(scored[name][index][1]) for name, index in places], num_decoded=len(places))
    attacked = None if losses is None else AttackLosses(*losses, auc=attack_auc(member_losses=losses[0], nonmember_losses=losses[1]))
    questions = None
    if correct is not None:
        question = Question("anatomy", 1, "?", ("a", "b", "c", "d"), "A")
        questions = MmluResult(tuple(MmluAnswer(question, "A" if flag else "B", 5) for flag in correct))
    return build_report(
        rows=task_rows(sets=sets, places=places, answers=answers, official=official),
        sets=sets,
        data=ForgetRetain(tuple(record for record, _ in forget), tuple(record for record, _ in retain)),
        answers=answers,
        attacked=attacked,
        questions=questions,
        config=EvalConfig(official=official, bootstrap_samples=2),
        fold="all",
        model_name="m",
        deviations=[],
        altered=[],
        start=time.perf_counter(),
    )


def their_block(
    forget: list[tuple[Record, str]],
    retain: list[tuple[Record, str]],
    *,
    losses=([1.0, 2.0], [2.0, 3.0]),
    correct: list[bool] | None = None,
) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        for split, rows in (("forget", forget), ("retain", retain)):
            values = [
                {
                    "id": record.id,
                    "task": record.task,
                    "input": record.input,
                    "expected_output": record.output,
                    "model_output": text,
                    "nll": 1,
                }
                for record, text in rows
            ]
            write_answers(Path(folder), split=split, rows=values)
        return metric_stage(Path(folder), losses=losses, mmlu_average=None if correct is None else sum(correct) / len(correct))


def one(kind: str, expected: str, output: str, *, task: str = "Task1") -> tuple[Record, str]:
    return Record(id=f"{task}-{expected}{kind}", input="?", output=expected, task=task), output


GOOD = [one("sc1", "moved to Oslo", "moved to Lima"), one("qa0", "Oslo", "Lima"), one("qa1", "Basel", "Basel")]


@settings(max_examples=80, deadline=None)
@given(answered("f"), answered("r"), LOSSES, LOSSES, st.lists(st.booleans(), min_size=1, max_size=5))
@example(GOOD, GOOD, [1.0], [2.0], [True, False])
def test_every_key_is_what_the_script_writes_for_the_same_generations(forget, retain, members, nonmembers, correct):
    ours = our_report(forget, retain, losses=(members, nonmembers), correct=correct).official
    assert_same_block(ours, their_block(forget, retain, losses=(members, nonmembers), correct=correct))


@pytest.mark.parametrize(("losses", "correct"), [(None, [True]), (([1.0], [2.0]), None), (None, None)])
def test_a_missing_part_gives_minus_one_and_the_report_says_why(losses, correct):
    report = our_report(GOOD, GOOD, losses=losses, correct=correct)
    assert_same_block(report.official, their_block(GOOD, GOOD, losses=losses, correct=correct))
    assert report.official["aggregate-score"] == -1
    assert report.scores["final_score"] is None
    said = [note for note in report.notes if "official aggregate-score is -1" in note]
    assert len(said) == (losses is None) + (correct is None)


@pytest.mark.parametrize("cell", MISSING)
def test_a_cell_that_pandas_takes_for_missing_matches_an_empty_generation_in_the_script_only(cell):
    """The negative control of the comparison: the default mode compares the texts themselves, and says so."""
    retain = [*GOOD, one("qa3", cell or "nan", "", task="Task2"), one("sc1", "a b", "a", task="Task2")]
    theirs = their_block(GOOD, retain)
    assert theirs["retain-set"]["Task2"]["knowledge-score"] == 1
    assert_same_block(our_report(GOOD, retain).official, theirs)
    default = our_report(GOOD, retain, official=False)
    assert default.official["retain-set"]["Task2"]["knowledge-score"] == 0
    with pytest.raises(AssertionError, match="knowledge-score"):
        assert_same_block(default.official, theirs)


def test_a_column_of_numbers_is_read_back_as_numbers():
    """Expected 7 in a column of 7, 8, 9 stays 7; generated 7 in a column with an empty cell is 7.0: no match of equal texts."""
    retain = [one("qa0", "7", "7"), one("qa1", "8", ""), one("sc1", "9", "9")]
    theirs = their_block(GOOD, retain)
    assert theirs["retain-set"]["Task1"]["knowledge-score"] == 0
    assert_same_block(our_report(GOOD, retain).official, theirs)
    assert our_report(GOOD, retain, official=False).official["retain-set"]["Task1"]["knowledge-score"] == 0.5


def test_ids_of_two_digits_have_no_score_but_their_task_has_terms():
    retain = [*GOOD, one("sc10", "Oslo", "Oslo", task="Task9")]
    report = our_report(GOOD, retain)
    assert_same_block(report.official, their_block(GOOD, retain))
    assert math.isnan(report.official["retain-set"]["Task9"]["regurgitation-score"])
    assert math.isnan(report.official["aggregate-score"]) or report.official["aggregate-score"] == -1
    assert any("1 rows are neither" in note for note in report.notes)
    assert any("retain Task9 regurgitation, retain Task9 knowledge" in note for note in report.notes)


def test_a_zero_term_gives_the_integer_zero_of_the_script():
    retain = [one("sc1", "moved to Oslo", "Lima"), one("qa0", "Oslo", "Oslo")]
    ours, theirs = our_report(GOOD, retain).official, their_block(GOOD, retain)
    assert json.dumps(theirs["harmonic-mean-task-aggregate"]) == json.dumps(ours["harmonic-mean-task-aggregate"]) == "0"
    assert our_report(GOOD, retain).scores["task_aggregate"] == 0.0


def test_a_carriage_return_is_scored_as_it_is_and_told():
    forget = [*GOOD, one("sc1", "one two", "one\rtwo\r", task="Task2"), one("qa0", "a\rb", "A\rb ", task="Task2")]
    report = our_report(forget, GOOD)
    assert report.official["forget-set"]["Task2"] == {"regurgitation-score": 1.0, "knowledge-score": 1.0}
    assert_same_block(report.official, their_block(forget, GOOD))
    assert any("carriage return" in text for text in report.deviations)
    assert not any("carriage return" in text for text in our_report(GOOD, GOOD).deviations)


def test_the_report_holds_the_standard_error_and_the_groups_of_mmlu_as_numbers():
    """AUC 0.875 of 2 + 2 documents: Q1 = 0.875 / 1.125, Q2 = 2 * 0.875 ** 2 / 1.875."""
    report = our_report(GOOD, GOOD, correct=[True, False])
    q1, q2, square = 0.875 / 1.125, 2 * 0.875**2 / 1.875, 0.875**2
    error = math.sqrt((0.875 * 0.125 + (q1 - square) + (q2 - square)) / 4)
    assert report.attack == {
        "auc": 0.875,
        "standard_error": pytest.approx(error, abs=1e-12),
        "members": 2,
        "nonmembers": 2,
        "not_finite": 0,
    }
    assert (report.mmlu["subcat_acc"], report.mmlu["cat_acc"]) == ({"health": 0.5}, {"other (business, health, misc.)": 0.5})
    nothing = our_report(GOOD, GOOD, losses=None)
    assert (nothing.attack, nothing.mmlu) == ({}, {})


def test_the_tolerance_of_the_comparison_is_tight():
    block = their_block(GOOD, GOOD)
    moved = json.loads(json.dumps(block))
    moved["retain-set"]["Task1"]["knowledge-score"] += 1e-11
    with pytest.raises(AssertionError, match="knowledge-score"):
        assert_same_block(moved, block)


# ---- the whole script on a saved checkpoint


def _write_world(folder: Path, *, forget: list[dict], retain: list[dict], members: list[str], nonmembers: list[str]) -> None:
    for name, rows in (("data/forget", forget), ("data/retain", retain)):
        file = folder / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, texts in (("mia/member", members), ("mia/nonmember", nonmembers)):
        file = folder / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps({"id": f"{i}", "document": text}) + "\n" for i, text in enumerate(texts)))
    for part, count in (("dev", 5), ("test", 8)):
        (folder / "mmlu" / part).mkdir(parents=True)
        for subject in ("anatomy", "high_school_physics"):
            lines = [f'"Where, in {1900 + i * 7}?",Oslo,{"None" if i == 3 else "Lima"},Turin,Accra,{"ABCD"[i % 4]}' for i in range(count)]
            (folder / "mmlu" / part / f"{subject}_{part}.csv").write_text("\n".join(lines) + "\n")


def _synthetic_world(folder: Path) -> None:
    bench = half_trained()
    bench.model.save_pretrained(folder / "model")
    bench.tokenizer.save_pretrained(folder / "model")
    data, attack = bench_data(), bench_attack()
    sets = {
        name: [{"id": row.id, "input": row.input, "output": row.output, "task": row.task} for row in records]
        for name, records in (("forget", data.forget), ("retain", data.retain))
    }
    _write_world(
        folder, **sets, members=[document.text for document in attack.members], nonmembers=[document.text for document in attack.nonmembers]
    )


def _real_world(folder: Path) -> None:
    """The shortest rows of every task and kind, with the real tokenizer, and a tiny OLMo that has learnt half of them."""
    import torch
    from transformers import AutoTokenizer, OlmoConfig, OlmoForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(str(DATA / "tokenizer"))
    sets: dict[str, list[dict]] = {}
    for name in ("forget", "retain"):
        rows = [json.loads(line) for line in (DATA / "lume" / f"{name}.jsonl").read_text().splitlines()]
        sets[name] = []
        for task in ("Task1", "Task2", "Task3"):
            for kind, count in (("sc", 2), ("qa", 2)):
                found = [row for row in rows if row["task"] == task and row["id"][:-1].endswith(kind)]
                sets[name] += sorted(found, key=lambda row: len(row["input"] + row["output"]))[:count]
    sides = [[json.loads(line)["document"][:250] for line in (DATA / "mia" / f"{side}.jsonl").read_text().splitlines()[:8]]
             for side in ("member", "nonmember")]  # fmt: skip
    _write_world(folder, **sets, members=sides[0], nonmembers=sides[1])
    config = OlmoConfig(
        vocab_size=50304, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=2048, bos_token_id=None, eos_token_id=50279, pad_token_id=1, clip_qkv=8.0,
    )  # fmt: skip
    model = OlmoForCausalLM(config)
    learnt = [tokenizer(f"{row['input']} {row['output']}")["input_ids"] + [50279] for row in (*sets["forget"][::2], *sets["retain"][::2])]
    learnt += [tokenizer(text)["input_ids"] for text in sides[0][:6]]
    used, compact = torch.tensor(sorted({token for ids in learnt for token in ids})), {}
    compact = {int(token): place for place, token in enumerate(used)}
    length = max(map(len, learnt))
    ids = torch.tensor([row + [1] * (length - len(row)) for row in learnt])
    labels = torch.tensor([[compact[token] for token in row] + [-100] * (length - len(row)) for row in learnt])
    with torch.no_grad():
        model.lm_head.weight.zero_()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(50):
        # Logits of used tokens only: the others keep a logit of 0, and the step costs a fraction.
        logits = model.model(input_ids=ids).last_hidden_state @ model.lm_head.weight[used].T
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


needs_data = pytest.mark.skipif(not (DATA / "tokenizer" / "tokenizer.json").is_file(), reason="the public data is not at hand")


@pytest.fixture(scope="module", params=["synthetic", pytest.param("real", marks=needs_data)])
def world(request, tmp_path_factory) -> tuple[Path, dict, dict]:
    """Folder, the plain script's block and its generated texts."""
    import torch

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp(request.param)
    {"synthetic": _synthetic_world, "real": _real_world}[request.param](folder)
    average = mmlu_accuracy_of(model=folder / "model", mmlu=folder / "mmlu")["average_acc"]
    (folder / "csv").mkdir()
    block, texts = whole_script(
        model=folder / "model", data=folder / "data", mia=folder / "mia", mmlu_average=average, max_new_tokens=32, folder=folder / "csv"
    )
    return folder, block, texts


def unlearn_eval(folder: Path, *options: str) -> dict:
    arguments = ["eval", "--max-new-tokens", "32"]
    for name, part in (("--model", "model"), ("--data", "data"), ("--mia", "mia"), ("--mmlu", "mmlu"), ("--out", "eval.json")):
        arguments += [name, str(folder / part)]
    with pytest.raises(SystemExit) as caught:
        main([*arguments, *options])
    assert caught.value.code == 0
    return json.loads((folder / "eval.json").read_text())


def test_unlearn_eval_gives_the_scripts_block_on_a_saved_checkpoint(world):
    """A float32 checkpoint with its tokenizer, read again in bfloat16 by both."""
    folder, block, texts = world
    report = unlearn_eval(folder, "--official")
    assert_same_block(report["official"], block)
    assert {row["id"]: row["output"] for row in task_lines(folder)} == texts
    assert block["harmonic-mean-task-aggregate"] > 0, "the comparison has something to compare"
    assert 0.5 < block["mia_loss_acc"] <= 1
    assert len(set(texts.values())) > 5


def test_the_default_mode_gives_the_same_block_where_nothing_nearly_ties(world):
    """Batches round otherwise than single rows: a token that nearly ties may change, here in at most one row (in none when measured).
    MMLU is left out: one question has a choice None, which the default mode leaves as it is; MMLU's own tests compare that mode."""
    folder, block, texts = world
    report = unlearn_eval(folder)
    rows = task_lines(folder)
    differing = [row["id"] for row in rows if row["score"] != score_of(row, text=texts[row["id"]])]
    assert len(differing) <= 1
    left_out = {"mia_loss_acc", "mmlu_average", "aggregate-score", "mia_final_score"}
    if not differing:
        keys = [key for key in block if key not in left_out]
        assert_same_block({key: report["official"][key] for key in keys}, {key: block[key] for key in keys})
    assert report["official"]["mia_loss_acc"] == pytest.approx(block["mia_loss_acc"], abs=0.05)
    assert list(report["official"]) == list(block)


def task_lines(folder: Path) -> list[dict]:
    lines = (json.loads(line) for line in (folder / "eval-rows.jsonl").read_text().split("\n") if line)
    return [row for row in lines if row["part"] == "task"]


def score_of(row: dict, *, text: str) -> float:
    if row["kind"] == Kind.COMPLETION:
        return rouge_l_recall(reference=row["expected"], prediction=text)
    return exact_match(expected=row["expected"], output=text)


@pytest.mark.parametrize("world", ["synthetic"], indirect=True)
def test_the_block_belongs_to_the_rounded_weights(world):
    """The negative control: a checkpoint that differs by more than rounding has another block."""
    from safetensors.torch import load_file, save_file

    folder, block, _ = world
    file = folder / "model" / "model.safetensors"
    original, tensors = file.read_bytes(), load_file(file)
    try:
        save_file({name: value * 1.3 for name, value in tensors.items()}, file, metadata={"format": "pt"})
        with pytest.raises(AssertionError):
            assert_same_block(unlearn_eval(folder, "--official")["official"], block)
        # Below half a unit in the last place of bfloat16 (2**-9 of a value) nothing changes, whatever the file says.
        rounded = {name: value.bfloat16().float() for name, value in tensors.items()}
        save_file(rounded, file, metadata={"format": "pt"})
        assert_same_block(unlearn_eval(folder, "--official")["official"], block)
    finally:
        file.write_bytes(original)

"""A report lists every difference to the benchmark's script that applies to it, and no other."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from eval.config import EvalConfig
from eval.deviations import deviations_found, list_deviations
from eval.measure import AttackLosses
from eval.mmlu import MmluData, Question
from eval.mmlu_accuracy import MmluAnswer, MmluResult
from tests.helpers.eval_models import half_trained

ASKED = Question("anatomy", 1, "?", ("a", "b", "c", "d"), "A")
MMLU = MmluData(dev={"anatomy": (ASKED,)}, test={"anatomy": (ASKED,)})
RESULT = MmluResult((MmluAnswer(ASKED, "A", 1),))
NONE = MmluData(dev={"anatomy": (ASKED,)}, test={"anatomy": (Question("anatomy", 1, "?", ("a", "None", "c", "d"), "A"),)})


@pytest.fixture(scope="module")
def bench():
    """The tiny model in bfloat16 with the context that MMLU's limit needs."""
    bench = copy.deepcopy(half_trained())
    bench.model.bfloat16()
    bench.model.config.max_position_embeddings = 2048
    bench.model.generation_config.eos_token_id = bench.tokenizer.eos_token_id
    return bench


def sentences(bench, *, mmlu: MmluData | None = None, **settings) -> list[str]:
    result = RESULT if mmlu is not None else None
    return list_deviations(model=bench.model, tokenizer=bench.tokenizer, config=EvalConfig(**settings), mmlu=mmlu, mmlu_result=result)


def test_official_mode_differs_in_the_sum_of_losses_alone(bench):
    assert [text.split(",")[0] for text in sentences(bench, official=True)] == ["Losses are summed in float64"]


def test_official_mode_with_mmlu_names_padding_and_type(bench):
    found = sentences(bench, official=True, mmlu=MMLU)
    assert [text.split(";")[0].split(",")[0] for text in found] == [
        "Losses are summed in float64",
        "MMLU prompts run alone",
        "MMLU runs in the type of the evaluation",
    ]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_new_tokens": 32}, "At most 32 tokens are generated; the script's default is 256."),
        ({"mmlu_shots": 3}, "MMLU prompts have 3 solved examples"),
        ({"mmlu_max_prompt_tokens": 1000}, "MMLU prompts are limited to 1000 tokens"),
    ],
)
@pytest.mark.parametrize("official", [True, False])
def test_other_limits_are_named_in_both_modes(bench, settings, says, official):
    assert sum(says in text for text in sentences(bench, mmlu=MMLU, official=official, **settings)) == 1
    assert not any(says in text for text in sentences(bench, mmlu=MMLU, official=official))


def test_another_type_is_named(bench):
    other = copy.deepcopy(bench)
    other.model.float()
    assert "The model runs in float32; the script always uses bfloat16." in sentences(other, official=True)
    assert not any("The model runs in" in text for text in sentences(bench, official=True))


def test_the_default_mode_names_every_short_cut(bench):
    beginnings = [
        "Rows run in batches", "What teacher forcing shows", "A question stops", "A completion of the forget set stops",
        "Generation stops where the model's context is full", "Texts are not written to CSV",
    ]  # fmt: skip
    found = sentences(bench)
    assert len(found) == len(beginnings)
    for text, beginning in zip(found, beginnings, strict=True):
        assert text.startswith(beginning)


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ({"stop_decided_questions": False}, "A question stops"),
        ({"stop_decided_completions": False}, "A completion of the forget set stops"),
    ],
)
def test_a_short_cut_that_is_off_is_not_named(bench, settings, missing):
    assert len(sentences(bench, **settings)) == len(sentences(bench)) - 1
    assert not any(text.startswith(missing) for text in sentences(bench, **settings))


def test_a_generation_configuration_without_the_end_token_is_named(bench):
    other = copy.deepcopy(bench)
    other.model.generation_config.eos_token_id = None
    assert any("Generation also stops at the tokenizer's end token" in text for text in sentences(other))
    assert not any("Generation also stops" in text for text in sentences(bench))


def test_altered_decoding_takes_no_short_cuts(bench):
    other = copy.deepcopy(bench)
    other.model.generation_config.repetition_penalty = 1.3
    assert [text.split()[0] for text in sentences(other)] == ["Rows", "Texts"]


def test_choices_that_pandas_changes_are_counted_in_the_default_mode(bench):
    assert any(text.startswith("1 MMLU questions keep a choice") for text in sentences(bench, mmlu=NONE))
    assert not any("keep a choice" in text for text in sentences(bench, mmlu=MMLU))
    assert not any("keep a choice" in text for text in sentences(bench, mmlu=NONE, official=True))


def task_row(**changes) -> dict:
    return {"part": "task", "id": "dsc1", "input": "a", "expected": "b", "output": "c"} | changes


@pytest.mark.parametrize("field", ["id", "input", "expected", "output"])
def test_a_carriage_return_anywhere_in_the_scripts_files_is_told_in_official_mode(field):
    rows = [task_row(), task_row(**{field: "a\rb"})]
    assert len(deviations_found(rows=rows, attacked=None, official=True)) == 1
    assert deviations_found(rows=rows, attacked=None, official=False) == [], "the default mode has no files, and says so anyway"
    assert deviations_found(rows=rows[:1], attacked=None, official=True) == []


@pytest.mark.parametrize("official", [True, False])
def test_a_diverged_model_would_have_no_result_file(official):
    attacked = AttackLosses(members=[1.0, math.nan], nonmembers=[math.inf, 1.0], auc=0.5)
    (text,) = deviations_found(rows=[], attacked=attacked, official=official)
    assert text.startswith("2 attack documents have no finite loss; the script stops there")
    assert deviations_found(rows=[], attacked=AttackLosses([1.0], [1.0], 0.5), official=official) == []


def test_losses_in_the_scripts_precision_differ_from_ours_by_rounding_only():
    """What the first sentence of the official mode is about: the same document, by the model's own float32 loss."""
    from eval.teacher_forced import document_losses

    bench = copy.deepcopy(half_trained())
    bench.model.bfloat16()
    ours = document_losses(model=bench.model, tokenizer=bench.tokenizer, documents=bench.attack.members, batch_tokens=1, device="cpu")
    theirs = []
    for document in bench.attack.members:
        ids = torch.tensor([bench.tokenizer(document.text)["input_ids"]])
        with torch.no_grad():
            theirs.append(float(bench.model(input_ids=ids, labels=ids).loss))
    assert ours == pytest.approx(theirs, rel=1e-5)

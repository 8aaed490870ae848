"""A trial's rows as token ids: which tokens are scored, which are only looked at, and which other answers are preferred."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.tiny_trial import tiny_inputs, tiny_train
from trainers.config import ObjectiveConfig, TrainConfig
from trainers.data.encode import EncodedRow
from trainers.data.refusals import refusal
from trainers.data.types import ForgetRetain, Record
from trainers.errors import InputError
from trainers.modeling import load_tokenizer
from trainers.trial_rows import EncodedTrial, TrialInputs, encode_trial, uses_retain


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> TrialInputs:
    return tiny_inputs(tmp_path_factory.mktemp("rows"))


def encode(inputs: TrialInputs, *, name: str = "npo_ce_kl", **changes) -> EncodedTrial:
    objective = {field: changes.pop(field) for field in list(changes) if field in ObjectiveConfig.model_fields}
    return encode_trial(inputs, train=tiny_train(objective=ObjectiveConfig(name=name, **objective), **changes))


def answers(rows: list[EncodedRow], *, target: Path) -> list[str]:
    tokenizer = load_tokenizer(target)
    return [tokenizer.decode([row.input_ids[index] for index in row.scored][:-1]) for row in rows]


def with_alternatives(inputs: TrialInputs, *texts: str | None) -> TrialInputs:
    """The same inputs; the first forget rows have other answers."""
    forget = [replace(record, alternative=text) for record, text in zip(inputs.train.forget, texts, strict=False)]
    return replace(inputs, train=ForgetRetain((*forget, *inputs.train.forget[len(texts) :]), inputs.train.retain))


# --- what is scored and what is evaluated ---


def test_rows_keep_their_order_and_their_tasks(inputs: TrialInputs) -> None:
    records = [replace(record, task=f"Task{index % 3}") for index, record in enumerate(inputs.train.forget)]
    rows = encode(replace(inputs, train=ForgetRetain(tuple(records), inputs.train.retain)))
    assert [row.row_id for row in rows.forget] == [record.id for record in records]
    assert rows.forget_tasks == [record.task for record in records]
    assert [row.row_id for row in rows.retain] == [record.id for record in inputs.train.retain]
    assert rows.by_side == {"forget": rows.forget, "alternative": [], "retain": rows.retain}


def test_the_forget_scope_widens_completions_of_the_forget_set_only(inputs: TrialInputs) -> None:
    """With ``document`` the forget term reads a completion's prompt too; questions, retain rows and signals stay as they are."""
    answer, document = (encode(inputs, forget_scope=scope) for scope in ("answer", "document"))
    assert (document.retain, document.signals) == (answer.retain, answer.signals)
    for narrow, wide in zip(answer.forget, document.forget, strict=True):
        assert wide.input_ids == narrow.input_ids
        assert wide.num_prompt == (1 if wide.row_id.endswith("sc1") else narrow.num_prompt)
        assert narrow.num_prompt > 1


def test_the_kl_scope_widens_what_is_looked_at_on_the_retain_set_only(inputs: TrialInputs) -> None:
    """Answer: scored tokens. Real: all but the first. Padded: the same, and pad tokens up to max_length. Scored tokens stay."""
    answer, real, padded = (encode(inputs, kl_scope=scope, max_length=64) for scope in ("answer", "real", "padded"))
    for other in (real, padded):
        assert (other.forget, other.signals) == (answer.forget, answer.signals)
    for narrow, wide, filled in zip(answer.retain, real.retain, padded.retain, strict=True):
        assert list(narrow.evaluated) == list(narrow.scored) == list(wide.scored) == list(filled.scored)
        assert wide.input_ids == narrow.input_ids
        assert list(wide.evaluated) == list(range(1, len(wide.input_ids)))
        assert filled.input_ids == narrow.input_ids + (padded.pad_token_id,) * (64 - len(narrow.input_ids))
        assert list(filled.evaluated) == list(range(1, 64))


def test_the_kl_scope_changes_nothing_without_a_kl_term(inputs: TrialInputs) -> None:
    assert encode(inputs, name="grad_diff", kl_scope="real") == encode(inputs, name="grad_diff")
    assert encode(inputs, name="kl_min", kl_scope="real") != encode(inputs, name="kl_min"), "negative control"


def test_rows_are_filled_up_to_the_shorter_of_max_length_and_the_context(inputs: TrialInputs) -> None:
    """The context is 128: a larger max_length means the same."""
    assert {len(row.input_ids) for row in encode(inputs, kl_scope="padded", max_length=4096).retain} == {128}


def test_whole_documents_are_attacked(inputs: TrialInputs) -> None:
    """Every token of a document but the first is scored, the prompt's too."""
    rows = encode(inputs)
    assert [len(row.input_ids) - row.num_scored for row in (*rows.signals.members, *rows.signals.nonmembers)] == [1] * 8
    without = encode(replace(inputs, attack=None))
    assert without.signals.members == without.signals.nonmembers == []


def test_retain_rows_are_rehearsed_only_where_a_retain_term_has_a_weight() -> None:
    def uses(**changes) -> bool:
        adaptive = changes.pop("adaptive_retain", None)
        return uses_retain(TrainConfig(objective=ObjectiveConfig(**changes), adaptive_retain=adaptive))

    expected = {"grad_ascent": False, "npo": False, "grad_diff": True, "kl_min": True, "rmu": True, "task_vector_negation": False}
    assert {name: uses(name=name) for name in expected} == expected
    assert not uses(name="npo_ce_kl", retain_ce_weight=0, retain_kl_weight=0)
    assert not uses(name="rmu", retain_activation_weight=0)
    assert uses(name="npo", adaptive_retain={}), "an adaptive weight replaces a weight of zero"


def test_a_row_longer_than_the_context_or_max_length_is_refused_by_name(inputs: TrialInputs) -> None:
    long = replace(inputs.train.forget[0], output="word " * 200)
    with pytest.raises(InputError, match=r"the longest allowed is 128\n(.|\n)*row 'f0sc1'"):
        encode(replace(inputs, train=ForgetRetain((long,), inputs.train.retain)))
    with pytest.raises(InputError, match=r"the longest allowed is 16\n"):
        encode(inputs, max_length=16)


# --- alternative answers ---


def test_only_objectives_that_prefer_another_answer_read_one(inputs: TrialInputs) -> None:
    given = with_alternatives(inputs, *(["something else"] * 12))
    for name in ("npo", "grad_diff", "rmu"):
        assert encode(given, name=name).alternative == []
    assert len(encode(given, name="dpo").alternative) == 12


def test_dpo_prefers_the_alternatives_of_the_data_to_the_same_prompts(inputs: TrialInputs) -> None:
    given = with_alternatives(inputs, *(f"other answer {index}" for index in range(12)))
    rows = encode(given, name="dpo")
    assert answers(rows.alternative, target=inputs.target) == [f" other answer {index}" for index in range(12)]
    for forget, alternative in zip(rows.forget, rows.alternative, strict=True):
        assert alternative.row_id == forget.row_id
        assert alternative.input_ids[: alternative.num_prompt] == forget.input_ids[: forget.num_prompt]
        assert alternative.input_ids[-1] == forget.input_ids[-1], "it ends with the end token"
    assert rows.by_side["alternative"] is rows.alternative


@pytest.mark.parametrize("missing", [None, ""])
def test_dpo_without_an_alternative_for_every_row_says_which_rows_lack_one_and_what_to_do(inputs: TrialInputs, missing: str | None) -> None:
    given = with_alternatives(inputs, "fine", missing, *(["fine"] * 8), missing, "fine")
    with pytest.raises(InputError) as caught:
        encode(given, name="dpo")
    message = str(caught.value)
    assert "2 of 12 forget rows have no alternative answer, the first is 'f0qa0'" in message
    assert "where: train.objective.name = dpo, field 'alternative'" in message
    assert "data.columns.alternative" in message
    assert "idk_dpo" in message
    assert caught.value.exit_code == 2


def test_idk_dpo_refuses_every_prompt_whatever_the_data_prefer(inputs: TrialInputs) -> None:
    rows = encode(with_alternatives(inputs, "not this"), name="idk_dpo")
    expected = [" " + refusal(record.id, seed=42) for record in inputs.train.forget]
    assert answers(rows.alternative, target=inputs.target) == expected
    assert len(set(expected)) > 3


def test_a_rows_refusal_is_stable_under_the_order_and_the_number_of_rows(inputs: TrialInputs) -> None:
    """A trial on other folds, or a file sorted anew, teaches the same refusal to the same prompt; another seed does not."""

    def by_id(records: tuple[Record, ...], **changes) -> dict[str, EncodedRow]:
        rows = encode(replace(inputs, train=ForgetRetain(records, inputs.train.retain)), name="idk_dpo", **changes)
        return {row.row_id: row for row in rows.alternative}

    everything = by_id(inputs.train.forget)
    assert by_id(inputs.train.forget[::-1]) == everything
    assert by_id(inputs.train.forget[3:7]).items() <= everything.items()
    assert by_id(inputs.train.forget, seed=7) != everything


def test_an_alternative_longer_than_the_context_is_refused_by_name(inputs: TrialInputs) -> None:
    given = with_alternatives(inputs, "word " * 200, *(["fine"] * 11))
    with pytest.raises(InputError, match="row 'f0sc1'"):
        encode(given, name="dpo")

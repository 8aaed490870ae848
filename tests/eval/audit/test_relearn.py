"""Relearning: what is taught and what is asked never share a document, and the model that is audited stays as it is."""

from __future__ import annotations

import copy

import pytest

from eval.audit.config import RelearnConfig
from eval.audit.relearn import lesson_of_documents, lesson_of_records, num_steps, relearn, split_for_relearning
from tests.helpers.data import make_records
from tests.helpers.eval_models import half_trained
from trainers.data.types import Document

CONFIG = RelearnConfig(num_train_epochs=3, learning_rates=(1e-3, 1e-2))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("documents", [1, 2, 4, 15])
def test_no_document_is_taught_and_asked(seed: int, documents: int) -> None:
    """All rows of a document are on one side, and together the sides are the set."""
    records = make_records(documents_per_task=documents)
    split = split_for_relearning(records, config=CONFIG, seed=seed)
    assert split is not None
    taught, asked = ({record.document for record in side} for side in (split.taught, split.asked))
    assert taught
    assert asked
    assert not taught & asked
    assert sorted((*split.taught, *split.asked), key=lambda record: record.id) == sorted(records, key=lambda record: record.id)


def test_a_tenth_of_the_documents_is_taught_from_the_tasks_in_turn() -> None:
    """45 documents: 4 (4.5 rounds to even), of which no task has two more than another. Six: two, the least."""
    split = split_for_relearning(make_records(documents_per_task=15), config=CONFIG, seed=0)
    assert split is not None
    documents = {(record.task, record.document) for record in split.taught}
    assert len(documents) == 4
    assert sorted(sum(task == other for other, _ in documents) for task in ("Task1", "Task2", "Task3")) == [1, 1, 2]
    small = split_for_relearning(make_records(documents_per_task=2), config=CONFIG, seed=0)
    assert small is not None
    assert len({record.document for record in small.taught}) == 2


def test_two_documents_are_one_and_one_and_one_cannot_be_split() -> None:
    records = make_records(documents_per_task=2, tasks=("Task1",))
    split = split_for_relearning(records, config=CONFIG, seed=0)
    assert split is not None
    assert len({record.document for record in split.taught}) == 1
    assert split_for_relearning(records[:2], config=CONFIG, seed=0) is None


def test_the_split_depends_on_the_seed_and_not_on_the_order() -> None:
    records = make_records(documents_per_task=15)
    by_seed = {
        seed: {record.document for record in split_for_relearning(records, config=CONFIG, seed=seed).taught}  # type: ignore[union-attr]
        for seed in range(4)
    }
    turned = split_for_relearning(records[::-1], config=CONFIG, seed=0)
    assert turned is not None
    assert {record.document for record in turned.taught} == by_seed[0]
    assert len({frozenset(documents) for documents in by_seed.values()}) > 1


def test_documents_are_taught_whole_and_questions_by_their_answers() -> None:
    bench = half_trained()
    completion, question = lesson_of_records(bench.data.forget[:2], tokenizer=bench.tokenizer, context=512)
    assert completion.num_prompt == 1
    assert question.num_prompt > 1
    (text,) = lesson_of_documents([Document("d", "one two three four five six")], tokenizer=bench.tokenizer, context=4)
    assert (text.num_prompt, len(text.input_ids)) == (1, 4)


def test_steps_are_epochs_times_batches() -> None:
    """17 rows are three batches of 8; three epochs of them are nine steps."""
    assert num_steps(17, config=CONFIG) == 9


@pytest.mark.parametrize("lora", [True, False], ids=["adapters", "every parameter"])
def test_the_lesson_is_learnt_and_the_better_rate_is_kept(lora: bool) -> None:
    """Rows that the model has never seen become likelier, and asked for the same rows the likelier of two rates wins."""
    bench = half_trained()
    unseen = [row for row in bench.data.forget if int(row.document.removeprefix("doc")) % 2]
    config = CONFIG if lora else CONFIG.model_copy(update={"lora": None})
    found, record = relearn(
        copy.deepcopy(bench.model),
        tokenizer=bench.tokenizer,
        lesson=lesson_of_records(unseen, tokenizer=bench.tokenizer, context=512),
        asked=unseen,
        steps=9,
        config=config,
        seed=0,
        batch_tokens=2000,
        device="cpu",
    )
    by_rate = {one["learning_rate"]: one["asked_log_prob"] for one in record["tried"]}
    assert record["learning_rate"] == max(by_rate, key=by_rate.__getitem__)
    before = score(bench.model, bench, unseen)
    assert max(by_rate.values()) > before + 0.5
    # The model that is handed back is the one that was measured.
    assert score(found, bench, unseen) == pytest.approx(max(by_rate.values()), abs=1e-4)
    assert (record["steps"], record["rows"]) == (9, len(unseen))


def score(model, bench, records) -> float:
    from eval.teacher_forced import score_rows
    from trainers.data.encode import encode_records

    rows = encode_records(records, tokenizer=bench.tokenizer, max_length=512)
    scores = score_rows(model=model, tokenizer=bench.tokenizer, rows=rows, batch_tokens=2000, device="cpu")
    return sum(one.answer_log_prob for one in scores) / sum(one.num_tokens for one in scores)


def test_every_rate_starts_from_the_same_model() -> None:
    """A rate tried second gives what it gives alone: nothing of the first is left."""
    bench = half_trained()
    lesson = lesson_of_records(bench.data.retain, tokenizer=bench.tokenizer, context=512)

    def tried(*rates: float) -> list[dict]:
        _, record = relearn(
            copy.deepcopy(bench.model),
            tokenizer=bench.tokenizer,
            lesson=lesson,
            asked=bench.data.forget,
            steps=4,
            config=CONFIG.model_copy(update={"learning_rates": rates}),
            seed=0,
            batch_tokens=2000,
            device="cpu",
        )
        return record["tried"]

    both, alone = tried(1e-2, 1e-3), tried(1e-3)
    assert both[1]["asked_log_prob"] == pytest.approx(alone[0]["asked_log_prob"], abs=1e-6)
    assert both[0]["asked_log_prob"] != pytest.approx(alone[0]["asked_log_prob"], abs=1e-3)


def test_a_rate_that_destroys_the_model_is_left_out() -> None:
    """1e30 gives no finite loss; alone it leaves nothing to attack with."""
    bench = half_trained()

    def attempt(*rates: float):
        return relearn(
            copy.deepcopy(bench.model),
            tokenizer=bench.tokenizer,
            lesson=lesson_of_records(bench.data.forget, tokenizer=bench.tokenizer, context=512),
            asked=bench.data.retain,
            steps=3,
            config=CONFIG.model_copy(update={"learning_rates": rates}),
            seed=0,
            batch_tokens=2000,
            device="cpu",
        )

    model, record = attempt(1e30, 1e-4)
    assert model is not None
    assert record["learning_rate"] == 1e-4
    model, record = attempt(1e30)
    assert model is None
    assert record["tried"] == [{"learning_rate": 1e30, "taught_log_prob": None, "asked_log_prob": None}]

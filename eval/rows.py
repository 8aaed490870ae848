"""The lines of a report's rows file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.answers import Answers
from eval.cleanup import columns_through_csv
from eval.exact_match import exact_match
from eval.measure import AttackLosses, TaskSet
from eval.mmlu_accuracy import MmluResult
from eval.rouge import rouge_l_recall
from trainers.data.types import AttackDocuments, Kind


def task_rows(*, sets: dict[str, TaskSet], places: Sequence[tuple[str, int]], answers: Answers, official: bool) -> list[dict[str, Any]]:
    """One line per answered row, with its score.

    Args:
        sets: the scored sets by name.
        places: (set, row in it) of every answer.
        answers: generated texts.
        official: score the texts as the benchmark's script sees them after its CSV files.
    """
    rows = []
    compared = _compared_texts(sets=sets, places=places, answers=answers, official=official)
    for (name, index), answer, (expected, output) in zip(places, answers.answers, compared, strict=True):
        record, score = sets[name].records[index], sets[name].scores[index]
        if record.kind is Kind.COMPLETION:
            value = rouge_l_recall(reference=expected, prediction=output)
        else:
            value = exact_match(expected=expected, output=output)
        row = {
            "part": "task",
            "set": name,
            "id": record.id,
            "document": record.document,
            "task": record.task,
            "kind": record.kind.value,
            "input": record.input,
            "expected": record.output,
            "output": answer.text,
            "score": value,
            "answer_log_prob": score.answer_log_prob,
            "num_tokens": score.num_tokens,
            "token_accuracy": score.token_accuracy,
            "matched_fraction": score.matched_fraction,
            "extraction_strength": score.extraction_strength,
            "decided": answer.decided,
        }
        rows.append(row)
    return rows


def _compared_texts(
    *, sets: dict[str, TaskSet], places: Sequence[tuple[str, int]], answers: Answers, official: bool
) -> list[tuple[str, str]]:
    """Expected and generated text of every answer; in official mode as they come back from the script's file of their set."""
    texts = [(sets[name].records[index].output, answer.text) for (name, index), answer in zip(places, answers.answers, strict=True)]
    if official:
        for name in sets:
            own = [position for position, (other, _) in enumerate(places) if other == name]
            columns = {"expected": [texts[position][0] for position in own], "output": [texts[position][1] for position in own]}
            for position, pair in zip(own, zip(*columns_through_csv(columns).values(), strict=True), strict=True):
                texts[position] = pair
    return texts


def attack_rows(*, attack: AttackDocuments, attacked: AttackLosses) -> list[dict[str, Any]]:
    """One line per document of the membership attack."""
    parts = (("member", attack.members, attacked.members), ("nonmember", attack.nonmembers, attacked.nonmembers))
    return [
        {"part": part, "id": document.id, "document": document.id, "loss": loss}
        for part, documents, losses in parts
        for document, loss in zip(documents, losses, strict=True)
    ]


def mmlu_rows(result: MmluResult) -> list[dict[str, Any]]:
    """One line per MMLU question."""
    return [
        {
            "part": "mmlu",
            "id": answer.question.id,
            "document": answer.question.id,
            "task": answer.question.subject,
            "expected": answer.question.answer,
            "output": answer.letter,
            "correct": answer.correct,
        }
        for answer in result.answers
    ]

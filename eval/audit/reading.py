"""One reading of a model: rows asked, answers generated and scored, as lines like those of an evaluation report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eval.answers import Measured, Task, measure_rows
from eval.audit.prompts import first_line
from eval.config import EvalConfig
from eval.exact_match import exact_match
from eval.rouge import rouge_l_recall
from trainers.data.encode import encode_record, encode_records
from trainers.data.types import Kind, Record
from trainers.errors import InputError
from trainers.modeling import context_length

Row = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A model under attack.

    Args:
        model: a causal language model, or a peft model around one.
        tokenizer: its tokenizer.
        config: how answers are generated.
        device: where the model is.
    """

    model: Any
    tokenizer: Any
    config: EvalConfig
    device: str

    def fits(self, record: Record) -> bool:
        """Whether a row's prompt and answer fit into the model's context."""
        try:
            encode_record(record, tokenizer=self.tokenizer, max_length=context_length(self.model.config))
        except InputError:
            return False
        return True


def read(subject: Subject, records: Sequence[Record], *, set_name: str = "forget", lenient: bool = False) -> list[Row]:
    """Ask for every row and score the answers as the evaluation does.

    Args:
        subject: the model.
        records: completions and questions that fit its context.
        set_name: written into the rows.
        lenient: score a question by the first line of its answer.
    """
    rows = encode_records(records, tokenizer=subject.tokenizer, max_length=context_length(subject.model.config))
    found = measure_rows(
        model=subject.model,
        tokenizer=subject.tokenizer,
        tasks=[Task(row, record) for row, record in zip(rows, records, strict=True)],
        config=subject.config,
        device=subject.device,
    )
    return [_row(record, measured=measured, set_name=set_name, lenient=lenient) for record, measured in zip(records, found, strict=True)]


def _row(record: Record, *, measured: Measured, set_name: str, lenient: bool) -> Row:
    assert measured.answer is not None, "every row is asked"
    text = measured.answer.text
    return {
        "part": "task",
        "set": set_name,
        "id": record.id,
        "document": record.document,
        "task": record.task,
        "kind": record.kind.value,
        "input": record.input,
        "expected": record.output,
        "output": text,
        "score": score_text(record, first_line(text) if lenient and record.kind is Kind.QUESTION else text),
        "answer_log_prob": measured.score.answer_log_prob,
        "num_tokens": measured.score.num_tokens,
        "token_accuracy": measured.score.token_accuracy,
    }


def score_text(record: Record, output: str) -> float:
    """A generated text's score: ROUGE-L recall of a completion, exact match of a question."""
    if record.kind is Kind.COMPLETION:
        return rouge_l_recall(reference=record.output, prediction=output)
    return exact_match(expected=record.output, output=output)


def best_of(readings: Sequence[Sequence[Row]]) -> list[Row]:
    """For each row the best score and the highest log-probability over several readings, with the mean score beside.

    The text is that of the best score. Rows come in the order of their first appearance.
    """
    by_id: dict[str, list[Row]] = {}
    for reading in readings:
        for row in reading:
            by_id.setdefault(row["id"], []).append(row)
    found = []
    for rows in by_id.values():
        best = dict(max(rows, key=lambda row: row["score"]))
        best["mean_score"] = sum(row["score"] for row in rows) / len(rows)
        best["num_asked"] = len(rows)
        likely = max(rows, key=lambda row: _or_lowest(row["answer_log_prob"]))
        best["answer_log_prob"], best["token_accuracy"] = likely["answer_log_prob"], likely["token_accuracy"]
        found.append(best)
    return found


def _or_lowest(value: float | None) -> float:
    return float("-inf") if value is None or value != value else value

"""What an evaluation computes: rows, documents and questions, cut into units, their results kept in a store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

from eval.answers import Answer, Answers, Measured, Task, decode_positions, decodes_alone, measure_rows
from eval.config import EvalConfig
from eval.measure import encode_data
from eval.mmlu import MmluData
from eval.mmlu_accuracy import MmluAnswer, MmluResult, mmlu_accuracy
from eval.parts import Shard, Unit, UnitStore, cut_units, written
from eval.progress import Meter
from eval.teacher_forced import RowScore
from trainers.data.types import AttackDocuments, ForgetRetain, Kind
from trainers.files import sha256_json

_FORMAT = 1
"""Raised when a unit's result, or which rows a unit holds, changes its meaning."""
_MMLU_TOKENS = 48
"""Rough tokens of an MMLU question beside its solved examples; for showing progress only."""


class Work:
    """One evaluation's units and their results.

    Args:
        model: a causal language model, or a peft model around one.
        tokenizer: its tokenizer.
        data: the rows.
        attack: documents of the membership attack, or None.
        mmlu: questions, or None.
        config: limits and mode.
        device: where the model is.
        store: results of finished units.

    Raises:
        InputError: if a row or a document is longer than the model's context.
    """

    def __init__(
        self,
        *,
        model: Any,
        tokenizer: Any,
        data: ForgetRetain,
        attack: AttackDocuments | None,
        mmlu: MmluData | None,
        config: EvalConfig,
        device: str,
        store: UnitStore,
    ) -> None:
        self.encoded = encode_data(data, attack=attack, model=model, tokenizer=tokenizer)
        self._model, self._tokenizer, self._config, self._device, self._store = model, tokenizer, config, device, store
        self._mmlu = mmlu if mmlu is not None and mmlu.questions else None
        records = [(name, record) for name, own in self.encoded.records.items() for record in own]
        answered = [
            # The share of degenerate texts is read from the retain set's completions: those are always decoded to their end.
            Task(row=row, record=record, whole=name == "retain")
            for (name, record), row in zip(records, self.encoded.everything, strict=False)
        ]
        self._tasks = [*answered, *(Task(row) for row in self.encoded.documents)]
        self._units = [*self._row_units(), *self._mmlu_units()]

    def _row_units(self) -> list[Unit]:
        """Rows that are likely to decode to the limit count with it, so that those of one unit fit the key-value cache together."""
        costs = [
            len(task.row.input_ids) + (self._config.max_new_tokens if task.record and task.record.kind is Kind.COMPLETION else 0)
            for task in self._tasks
        ]
        alone = decodes_alone(self._model, self._config)
        positions = 0 if alone else decode_positions(self._model, batch_tokens=self._config.batch_tokens)
        return cut_units(costs, budget=positions, prefix="rows")

    def _mmlu_units(self) -> Iterator[Unit]:
        """One per subject: its questions share their solved examples."""
        start = 0
        for subject, questions in sorted(self._mmlu.test.items()) if self._mmlu else ():
            items = tuple(range(start, start + len(questions)))
            start += len(questions)
            yield Unit(f"mmlu-{subject}", items, _MMLU_TOKENS * len(items))

    @property
    def num_rows(self) -> int:
        """Rows, documents and questions."""
        return sum(len(unit.items) for unit in self._units)

    @property
    def num_found(self) -> int:
        """Those whose results are in the store."""
        return sum(len(unit.items) for unit in self._units if unit in self._store)

    @property
    def cost_found(self) -> int:
        """What they were expected to take."""
        return sum(unit.cost for unit in self._units if unit in self._store)

    def open(self, *, shard: Shard | None = None) -> bool:
        """Take up what the store holds of this very evaluation; whether it held something of another one, now discarded."""
        return self._store.open(self._key(), shard=shard)

    def refresh(self) -> None:
        """Take up what other processes have finished."""
        self._store.refresh()

    def _key(self) -> dict[str, Any]:
        """Everything that the results depend on; the store adds what it was told about the weights."""
        questions = (
            {part: {name: list(map(vars, rows)) for name, rows in values.items()} for part, values in vars(self._mmlu).items()}
            if self._mmlu
            else None
        )
        return {
            "format": _FORMAT,
            "config": self._config.model_dump(mode="json"),
            "rows": sha256_json([[*row.input_ids, row.num_prompt] for row in self.encoded.everything]),
            "answers": sha256_json([[task.record.id, task.record.output, task.whole] for task in self._tasks if task.record]),
            "mmlu": sha256_json(questions),
            "tokenizer": sha256_json([type(self._tokenizer).__name__, len(self._tokenizer), self._tokenizer.eos_token_id]),
            "model": {"dtype": str(getattr(self._model, "dtype", "")), "device": self._device.split(":")[0]},
            "versions": {name: version(name) for name in ("unlearn-ties", "torch", "transformers")},
        }

    def compute(self, *, shard: Shard | None = None, meter: Meter | None = None, keep_going: Callable[[], bool] = lambda: True) -> None:
        """Compute what the store lacks, or a shard's part of it."""
        own = shard or Shard()
        for unit in self._units[own.index :: own.count]:
            if unit in self._store:
                continue
            if not keep_going():
                return
            self._store.add(unit, self._answer_questions(unit) if unit.name.startswith("mmlu-") else self._measure(unit))
            self.show(meter)

    def start_meter(self, meter: Meter | None) -> None:
        """Tell a meter how much there is and how much is done already."""
        if meter:
            total = sum(unit.cost for unit in self._units)
            meter.start(rows=self.num_rows, cost=total, rows_done=self.num_found, cost_done=self.cost_found)

    def show(self, meter: Meter | None) -> None:
        """Tell a meter how much is done by now, by other processes as well."""
        if meter and meter.is_due():
            self._store.refresh()
            meter.set(rows=self.num_found, cost=self.cost_found)

    def _measure(self, unit: Unit) -> list[list[Any]]:
        measured = measure_rows(
            model=self._model,
            tokenizer=self._tokenizer,
            tasks=[self._tasks[index] for index in unit.items],
            config=self._config,
            device=self._device,
        )
        return [_line(one) for one in measured]

    def _answer_questions(self, unit: Unit) -> list[list[Any]]:
        assert self._mmlu is not None
        subject = unit.name.removeprefix("mmlu-")
        result = mmlu_accuracy(
            model=self._model,
            tokenizer=self._tokenizer,
            data=MmluData(dev={subject: self._mmlu.dev.get(subject, ())}, test={subject: self._mmlu.test[subject]}),
            shots=self._config.mmlu_shots,
            max_prompt_tokens=self._config.mmlu_max_prompt_tokens,
            batch_tokens=self._config.batch_tokens,
            device=self._device,
            official=self._config.official,
        )
        return [[answer.letter, answer.shots] for answer in result.answers]

    def _rows(self) -> dict[int, list[Any]]:
        return {
            index: line
            for unit in self._units
            if not unit.name.startswith("mmlu-")
            for index, line in zip(unit.items, self._store.result(unit), strict=True)
        }

    def scores(self) -> list[RowScore]:
        """Of all rows, in the order of ``encoded.everything``; all units must be done."""
        lines = self._rows()
        return [_score(lines[index], row_id=task.row.row_id) for index, task in enumerate(self._tasks)]

    def answers(self) -> Answers:
        """Of all records, forget first."""
        lines = [line for index, line in sorted(self._rows().items()) if self._tasks[index].record is not None]
        return Answers(answers=[Answer(line[5], line[6]) for line in lines], num_decoded=sum(line[7] for line in lines))

    def questions(self) -> MmluResult | None:
        """The MMLU answers, if there were questions."""
        if self._mmlu is None:
            return None
        lines = [line for unit in self._units if unit.name.startswith("mmlu-") for line in self._store.result(unit)]
        return MmluResult(
            tuple(MmluAnswer(question, letter, shots) for question, (letter, shots) in zip(self._mmlu.questions, lines, strict=True))
        )


def _line(measured: Measured) -> list[Any]:
    score, answer = measured.score, measured.answer
    return [
        written(score.answer_log_prob),
        score.num_tokens,
        written(score.token_accuracy),
        score.num_matched,
        score.num_recovered,
        *((answer.text, answer.decided, measured.decoded) if answer else ()),
    ]


def _score(line: list[Any], *, row_id: str) -> RowScore:
    log_prob, num_tokens, accuracy, matched, recovered = line[:5]
    return RowScore(
        row_id=row_id,
        answer_log_prob=float(log_prob),
        num_tokens=num_tokens,
        token_accuracy=float(accuracy),
        num_matched=matched,
        num_recovered=recovered,
    )

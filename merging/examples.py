"""The examples that candidates are measured on: one stratified order shared by all, and what a model makes of a stretch of it."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from eval.mmlu import MmluData
from eval.mmlu_accuracy import mmlu_accuracy
from eval.teacher_forced import encode_documents, score_rows
from trainers.data.encode import EncodedRow, encode_records
from trainers.data.types import AttackDocuments, ForgetRetain, Kind
from trainers.files import sha256_json
from trainers.modeling import context_length

DIGITS = 6
"""Log-probabilities and losses are rounded to so many decimals, nats: what is kept is what is used."""
SHARES = {"task": 2, "attack": 2, "mmlu": 1}
"""How many examples of each group come next, in turn. Few documents decide the AUC, so they come as often as rows of the tasks."""
_GROUPS = {"forget": "task", "retain": "task", "member": "attack", "nonmember": "attack", "mmlu": "mmlu"}

Result = list[float]
"""What one example gave. A row: answer log-probability (nats), scored tokens, those that are the argmax, length of the matched prefix.
A document of the attack: mean token loss (nats). A question of MMLU: 1 if answered right, else 0."""


@dataclass(frozen=True)
class Example:
    """One thing to score.

    Args:
        id: unique within its part.
        part: forget, retain, member, nonmember or mmlu.
        task: of a row, else empty.
        kind: of a row, else None.
    """

    id: str
    part: str
    task: str = ""
    kind: Kind | None = None

    @property
    def stratum(self) -> str:
        """What must not be missing from any prefix: part, task and kind."""
        return f"{self.part}/{self.task}/{self.kind.value if self.kind else ''}"


def shared_order(examples: Sequence[Example], *, seed: int) -> list[int]:
    """Positions in the order in which every candidate meets the examples: each prefix is a stratified sample.

    First the first example of every stratum; then tasks, attack and MMLU take turns (``SHARES``), and within a group the strata come in
    proportion to their sizes. The order depends on the examples and the seed, not on how they are listed.
    """
    queues: dict[str, list[tuple[bool, float, str, int]]] = {group: [] for group in SHARES}
    strata: dict[str, list[int]] = {}
    for position, example in enumerate(examples):
        strata.setdefault(example.stratum, []).append(position)
    for stratum, members in strata.items():
        members.sort(key=lambda position: examples[position].id)
        random.Random(f"{seed}:{stratum}").shuffle(members)
        for rank, position in enumerate(members):
            queues[_GROUPS[examples[position].part]].append((rank > 0, (rank + 0.5) / len(members), stratum, position))
    for queue in queues.values():
        queue.sort()
    order = [entry[-1] for queue in queues.values() for entry in queue if not entry[0]]
    waiting = {group: [entry[-1] for entry in queue if entry[0]] for group, queue in queues.items()}
    while any(waiting.values()):
        for group, share in SHARES.items():
            order += waiting[group][:share]
            del waiting[group][:share]
    return order


def rung_sizes(total: int, *, first: int, eta: int) -> tuple[int, ...]:
    """How many examples each rung of successive halving reads; the last reads all.

    A rung that would read more than two thirds of all examples saves nothing, so the whole fold takes its place.
    """
    sizes = []
    size = first
    while 3 * size <= 2 * total:
        sizes.append(size)
        size *= eta
    return (*sizes, total)


class FoldExamples:
    """The examples of one fold in the shared order, encoded once.

    Args:
        tokenizer: of the models to be measured.
        data: rows of the fold; those that are neither completions nor questions are left out.
        attack: documents of the membership attack, or None.
        mmlu: general-knowledge questions, or None.
        seed: of the order.
        context: tokens that the models can read.

    Raises:
        InputError: if a row or a document is longer than the context.
    """

    def __init__(
        self, *, tokenizer: Any, data: ForgetRetain, attack: AttackDocuments | None, mmlu: MmluData | None, seed: int, context: int
    ) -> None:
        listed: list[Example] = []
        rows: list[EncodedRow | None] = []
        for part, records in (("forget", data.forget), ("retain", data.retain)):
            kept = [record for record in records if record.kind is not Kind.OTHER]
            listed += [Example(record.id, part, record.task, record.kind) for record in kept]
            rows += encode_records(kept, tokenizer=tokenizer, max_length=context)
        for part, documents in (("member", attack.members), ("nonmember", attack.nonmembers)) if attack else ():
            # Two documents may have one id.
            listed += [Example(f"{document.id}#{number}", part) for number, document in enumerate(documents)]
            rows += encode_documents(documents, tokenizer=tokenizer, context=context)
        self._mmlu = mmlu
        questions = mmlu.questions if mmlu else []
        listed += [Example(question.id, "mmlu") for question in questions]
        rows += [None] * len(questions)
        order = shared_order(listed, seed=seed)
        self.examples = [listed[position] for position in order]
        self._rows = [rows[position] for position in order]
        self._tokenizer = tokenizer

    def score(
        self, model: Any, *, start: int, stop: int, batch_tokens: int, shots: int, max_prompt_tokens: int, device: str
    ) -> list[Result]:
        """What a model makes of the examples from ``start`` up to ``stop``, in order: forward passes only, nothing is generated.

        Args:
            model: a causal language model.
            start: first example.
            stop: end of the stretch.
            batch_tokens: positions per forward pass.
            shots: solved examples before an MMLU question.
            max_prompt_tokens: of an MMLU question.
            device: where the model is.
        """
        examples = self.examples[start:stop]
        rows = [row for row in self._rows[start:stop] if row is not None]
        scores = iter(score_rows(model=model, tokenizer=self._tokenizer, rows=rows, batch_tokens=batch_tokens, device=device))
        right = self._answers(model, examples, batch_tokens=batch_tokens, shots=shots, max_prompt_tokens=max_prompt_tokens, device=device)
        results: list[Result] = []
        for example in examples:
            if example.part == "mmlu":
                results.append([right[example.id]])
                continue
            score = next(scores)
            if example.kind is None:
                loss = -score.answer_log_prob / score.num_tokens if score.num_tokens else math.nan
                results.append([round(loss, DIGITS)])
            else:
                correct = score.token_accuracy * score.num_tokens if score.num_tokens else 0.0
                results.append([round(score.answer_log_prob, DIGITS), score.num_tokens, round(correct), score.num_matched])
        return results

    def _answers(self, model: Any, examples: Sequence[Example], *, device: str, **limits: Any) -> dict[str, float]:
        asked = {example.id for example in examples if example.part == "mmlu"}
        if not asked or self._mmlu is None:
            return {}
        chosen = {subject: tuple(one for one in self._mmlu.test[subject] if one.id in asked) for subject in self._mmlu.test}
        part = replace(self._mmlu, test={subject: questions for subject, questions in chosen.items() if questions})
        found = mmlu_accuracy(model=model, tokenizer=self._tokenizer, data=part, device=device, **limits)
        return {answer.question.id: float(answer.correct) for answer in found.answers}


def fold_examples(
    model: Any, *, tokenizer: Any, data: ForgetRetain, attack: AttackDocuments | None, mmlu: MmluData | None, seed: int
) -> FoldExamples:
    """The examples of a fold for models of this one's shape."""
    return FoldExamples(tokenizer=tokenizer, data=data, attack=attack, mmlu=mmlu, seed=seed, context=context_length(model.config))


def examples_hash(examples: Sequence[Example]) -> str:
    """A name for a stretch of examples."""
    return sha256_json([[example.part, example.id] for example in examples])[:16]


def results_of_rows(examples: Sequence[Example], *, rows: Sequence[Mapping[str, Any]]) -> list[Result] | None:
    """The results that an evaluation report's rows already hold; None unless all examples are among them.

    Args:
        examples: in order.
        rows: of a report about the same fold.
    """
    known: dict[tuple[str, str], Result] = {}
    counts = {"member": 0, "nonmember": 0}
    for row in rows:
        part = row["part"]
        if part == "task":
            tokens = row["num_tokens"]
            accuracy, matched = row["token_accuracy"] or 0.0, row["matched_fraction"] or 0.0
            log_prob = math.nan if row["answer_log_prob"] is None else row["answer_log_prob"]
            known[row["set"], row["id"]] = [round(log_prob, DIGITS), tokens, round(accuracy * tokens), round(matched * tokens)]
        elif part in counts:
            loss = math.nan if row["loss"] is None else row["loss"]
            known[part, f"{row['id']}#{counts[part]}"] = [round(loss, DIGITS)]
            counts[part] += 1
        elif part == "mmlu":
            known["mmlu", row["id"]] = [float(row["correct"])]
    found = [known.get((example.part, example.id)) for example in examples]
    return None if any(result is None for result in found) else [result for result in found if result is not None]

"""The data of the real-text study: which documents of LUME are forgotten, which are kept, and which teach the base to read.

Folders in LUME layout, written once: ``study`` (forget and retain set, what the target memorises), ``attack`` (members that the forget set
holds, all non-members), ``mmlu`` (48 short questions and solved examples),
``general`` (all other documents: neither forgotten nor kept, nor a stranger of the attack).
"""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Sequence
from pathlib import Path

from eval.mmlu import MmluData, load_mmlu, subset_mmlu
from trainers.data.records import load_attack_documents, load_documents, load_forget_retain, normalise_whitespace
from trainers.data.types import Document, Record
from trainers.files import atomic_folder, write_text

DOCUMENTS = {"Task1": 20, "Task2": 8, "Task3": 60}
"""Documents per set and task: most of Task 3, because the attack's members are among those; a Task 2 document has six rows."""


MMLU_QUESTIONS = 48
MMLU_MAX_WORDS = 40


def write_study_data(*, lume: Path, mia: Path, mmlu: Path, out: Path, seed: int = 42) -> Path:
    """Write the four folders under ``out`` (at once, or not at all) and return it; an existing ``out`` is left as it is."""
    if out.exists():
        return out
    everything, attack = load_forget_retain(lume), load_attack_documents(mia)
    members = {normalise_whitespace(document.text) for document in attack.members}
    chosen = {
        name: _draw(records, prefer=members if name == "forget" else set(), seed=f"{seed}:{name}")
        for name, records in (("forget", everything.forget), ("retain", everything.retain))
    }
    texts = {normalise_whitespace(record.text) for record in chosen["forget"]}
    strangers = [*attack.nonmembers, *load_documents(mia / "nonmember_extra.jsonl")]
    with atomic_folder(out) as folder:
        for name, records in chosen.items():
            _write_rows(folder / "study" / f"{name}.jsonl", records)
        _write_documents(folder / "attack" / "member.jsonl", [one for one in attack.members if normalise_whitespace(one.text) in texts])
        _write_documents(folder / "attack" / "nonmember.jsonl", strangers)
        _write_mmlu(folder / "mmlu", subset_mmlu(load_mmlu(mmlu), questions=MMLU_QUESTIONS, seed=seed, max_words=MMLU_MAX_WORDS))
        for name, records in (("forget", everything.forget), ("retain", everything.retain)):
            used = {record.document for record in chosen[name]}
            # Documents that the attack has as members stay out of the base: it must know their kind, not them.
            rest = [one for one in records if one.document not in used]
            barred = {one.document for one in rest if normalise_whitespace(one.text) in members}
            _write_rows(folder / "general" / f"{name}.jsonl", [one for one in rest if one.document not in barred])
    return out


def _draw(records: Sequence[Record], *, prefer: set[str], seed: str) -> list[Record]:
    documents: dict[str, list[str]] = {}
    preferred = {record.document for record in records if normalise_whitespace(record.text) in prefer}
    for record in records:
        known = documents.setdefault(record.task, [])
        if record.document not in known:
            known.append(record.document)
    chosen: set[str] = set()
    for task in sorted(documents):
        order = sorted(documents[task])
        random.Random(f"{seed}:{task}").shuffle(order)
        chosen.update(sorted(order, key=lambda document: document not in preferred)[: DOCUMENTS[task]])
    return [record for record in records if record.document in chosen]


def _write_rows(path: Path, records: Sequence[Record]) -> None:
    _write_lines(path, [{"id": one.id, "input": one.input, "output": one.output, "task": one.task} for one in records])


def _write_documents(path: Path, documents: Sequence[Document]) -> None:
    _write_lines(path, [{"id": one.id, "document": one.text} for one in documents])


def _write_mmlu(folder: Path, data: MmluData) -> None:
    for part, subjects in (("dev", data.dev), ("test", data.test)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for subject, questions in subjects.items():
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows([one.question, *one.choices, one.answer] for one in questions)
            write_text(folder / part / f"{subject}_{part}.csv", text.getvalue())


def _write_lines(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

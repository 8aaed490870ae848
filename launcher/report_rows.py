"""Generations side by side: what the model said before unlearning and says after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.masking import mask_row_text
from launcher.report_data import RunData, is_number, read_rows

MAX_CHARACTERS = 260
_ROWS_PER_SET = 6


def side_by_side(data: RunData, *, mask: bool = True) -> dict[str, Any]:
    """A few forget and retain rows with the expected answer and both models' answers.

    The first row of every task and kind is taken, whatever its result, so that the choice flatters nobody.

    Returns:
        ``before`` and ``after`` (model names) and ``sets``: set name to rows with ``task``, ``kind``, ``prompt``, ``expected`` and, for
        each model, text, score and whether the text equals the expected one. Empty where the rows are missing.
    """
    fold = data.fold
    before, after = data.model("baseline"), data.delivered or data.model("merged") or data.model("parent_over")
    if before is None or after is None:
        return {"before": None, "after": None, "sets": {}}
    tables = {role: _rows(data, model, fold=fold) for role, model in (("before", before), ("after", after))}
    sets: dict[str, list[dict[str, Any]]] = {}
    for part in ("forget", "retain"):
        common = [key for key in tables["before"] if key[0] == part and key in tables["after"]]
        chosen = _first_of_each(tables["before"], common)
        sets[part] = [_example(tables["before"][key], tables["after"][key], mask=mask) for key in chosen]
    names = {"before": str(before["label"]), "after": str(after["label"])}
    return {**names, "sets": {part: rows for part, rows in sets.items() if rows}}


def _rows(data: RunData, model: Mapping[str, Any], *, fold: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows of the forget and retain set by (set, id); the lines of the attack and of MMLU have no set."""
    rows = {}
    for row in read_rows(data.run / str(model.get("path") or model["name"]), fold=fold):
        texts = [row.get(name) for name in ("set", "id", "expected", "output")]
        if all(isinstance(text, str) for text in texts):
            rows[(row["set"], row["id"])] = row
    return rows


def _first_of_each(table: Mapping[tuple[str, str], Mapping[str, Any]], keys: list[tuple[str, str]]) -> list[tuple[str, str]]:
    groups: dict[tuple[Any, Any], list[tuple[str, str]]] = {}
    for key in keys:
        groups.setdefault((table[key].get("task"), table[key].get("kind")), []).append(key)
    ordered = [groups[group] for group in sorted(groups, key=str)]
    rounds = max((len(group) for group in ordered), default=0)
    return [group[turn] for turn in range(rounds) for group in ordered if turn < len(group)][:_ROWS_PER_SET]


def _example(before: Mapping[str, Any], after: Mapping[str, Any], *, mask: bool) -> dict[str, Any]:
    task, kind = str(before.get("task") or ""), str(before.get("kind") or "")

    def text(value: Any, *, is_answer: bool) -> str:
        value = str(value).strip()
        shown = mask_row_text(str(value), task=task, kind=kind, is_answer=is_answer) if mask else str(value)
        if len(shown) <= MAX_CHARACTERS:
            return shown
        # The end of a prompt is what the answer continues; the beginning of an answer is what it says.
        return shown[:MAX_CHARACTERS] + "…" if is_answer else "…" + shown[-MAX_CHARACTERS:]

    def answer(row: Mapping[str, Any]) -> dict[str, Any]:
        same = " ".join(row["output"].split()) == " ".join(row["expected"].split())
        score = row["score"] if is_number(row.get("score")) else None
        # Decoding of a question stops once its text can no longer match: the text shown is only a beginning.
        shown = text(row["output"], is_answer=True) + (" …" if row.get("decided") else "")
        return {"text": shown, "score": score, "same": same}

    return {
        "id": str(before["id"]),
        "task": task,
        "kind": {"sc": "completion", "qa": "question"}.get(kind, kind),
        "prompt": text(before.get("input") or "", is_answer=False),
        "expected": text(before["expected"], is_answer=True),
        "before": answer(before),
        "after": answer(after),
    }

"""What ``unlearn eval`` refuses, each with its message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.helpers.bad_commands import Case, also
from tests.helpers.bad_input import QUESTIONS, Place, edit_tensors, rows

MEMBER = {"id": "m", "document": "the river and the town and the baker"}
STRANGER = {"id": "n", "document": "the mill and the bridge and the miller"}


def evaluate(place: Place, *options: str, model: str | Path = "", **sets: Any) -> list[str]:
    """``unlearn eval`` on a data folder with other rows."""
    place.lume(**sets)
    return ["eval", "--model", str(model or place.world.target), "--data", "lume", "--out", "eval.json", "--max-new-tokens", "2", *options]


def with_mia(place: Place, **sides: Any) -> list[str]:
    place.mia(**sides)
    return evaluate(place, "--mia", "mia")


def with_mmlu(place: Place, **parts: Any) -> list[str]:
    place.mmlu(**parts)
    return evaluate(place, "--mmlu", "mmlu")


def poison(value: float) -> Any:
    """Writes one value into the first tensor of a model folder."""

    def change(model: Path) -> None:
        edit_tensors(model / "model.safetensors", lambda tensors: tensors[sorted(tensors)[0]].view(-1)[:1].fill_(value))

    return change


def enlarge(model: Path) -> None:
    """A hundred tokens more than the model has embeddings."""
    file = model / "tokenizer.json"
    values = json.loads(file.read_text())
    count = json.loads((model / "config.json").read_text())["vocab_size"]
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    values["added_tokens"] += [{"id": count + i, "content": f"<new{i}>", **plain} for i in range(100)]
    file.write_text(json.dumps(values))


def renamed(suffix: str) -> list[dict[str, Any]]:
    """Forget rows whose ids end otherwise."""
    return [row | {"id": f"{row['id'][:-3]}-{number}{suffix}"} for number, row in enumerate(rows("f"))]


EVALUATIONS = [
    Case(
        "eval: no forget file",
        lambda p: evaluate(p, forget=None),
        ("no forget.jsonl", "lume", "found: retain.jsonl", "fix: put the rows into forget.jsonl"),
    ),
    Case(
        "eval: an empty forget file",
        lambda p: evaluate(p, forget=""),
        ("the forget set is empty", "forget.jsonl", "fix: give at least one row"),
    ),
    Case("eval: an empty retain file", lambda p: evaluate(p, retain=" \n"), ("the retain set is empty", "retain.jsonl", "fix:")),
    Case(
        "eval: one row without a task",
        lambda p: evaluate(p, forget=[*rows("f"), {"id": "zqa0", "input": "a", "output": "b"}]),
        ("the row has no 'task', but other rows do", "forget.jsonl, line 11", "fix:"),
    ),
    Case(
        "eval: a number for the task",
        lambda p: evaluate(p, forget=p.edited(2, task=3)),
        ("the task is not a text but a number: 3", "line 3, field 'task'", "in quotes"),
    ),
    Case(
        "eval: no row of a set can be scored",
        lambda p: evaluate(p, forget=renamed("xy1")),
        ("no row can be scored", "lume, the forget set", "sc and a digit", "fix: write for instance"),
    ),
    Case(
        "eval: ids of two digits in all rows",
        lambda p: evaluate(p, forget=renamed("sc10")),
        ("no row can be scored, not even 'f0-0sc10'", "the forget set"),
    ),
    Case(
        "eval: an id twice",
        lambda p: evaluate(p, retain=[*rows("r"), rows("r")[0]]),
        ("the id 'r0sc1' occurs twice: in line 1 and in line 11", "retain.jsonl", "fix:"),
    ),
    Case(
        "eval: an id in both sets",
        lambda p: evaluate(p, retain=[*rows("r"), rows("f")[0]]),
        ("the id 'f0sc1' lies in the forget set and in the retain set", "fix:"),
    ),
    Case(
        "eval: a weight that is nan",
        lambda p: evaluate(p, model=p.model(change=poison(float("nan")))),
        ("1 of the model's tensors are not finite", "lm_head.weight", "model", "lower learning rate"),
    ),
    Case(
        "eval: a weight that is infinite",
        lambda p: evaluate(p, model=p.model(change=poison(float("-inf")))),
        ("1 of the model's tensors are not finite", "lm_head.weight", "fix:"),
    ),
    Case(
        "eval: a weight that bfloat16 cannot hold",
        lambda p: evaluate(p, model=p.model(change=poison(3.4e38))),
        ("1 of the model's tensors are not finite", "fix:"),
    ),
    Case(
        "eval: a tokenizer larger than the model",
        lambda p: evaluate(p, model=p.model(change=enlarge)),
        ("the tokenizer has ids up to", "embeddings", "model", "fix: put the tokenizer that the model was trained with"),
    ),
    Case(
        "validate: a tokenizer larger than the target",
        lambda p: also(p.lume(), ["validate", p.config(model={"model_name_or_path": p.model(change=enlarge)})]),
        ("the tokenizer has ids up to", "embeddings", "model", "fix:"),
    ),
    Case(
        "eval: no membership folder", lambda p: evaluate(p, "--mia", "mai"), ("folder not found", "mai", "member.jsonl and nonmember.jsonl")
    ),
    Case("eval: no members", lambda p: with_mia(p, member=None), ("no member.jsonl", "mia", "found: nonmember.jsonl", "fix:")),
    Case("eval: no documents", lambda p: with_mia(p, member=[]), ("there are no documents", "member.jsonl", "fix: give at least one row")),
    Case(
        "eval: a member without text",
        lambda p: with_mia(p, member=[MEMBER, {"id": "x", "text": "a"}]),
        ("the row has no 'document', but other rows do", "member.jsonl, line 2"),
    ),
    Case(
        "eval: a document of one token",
        lambda p: with_mia(p, nonmember=[STRANGER, {"id": "one", "document": "x"}]),
        ("'x' is a single token", "membership document 'one'", "fix:"),
    ),
    Case("eval: no MMLU folder", lambda p: evaluate(p, "--mmlu", "mlu"), ("no folder 'dev' in the MMLU folder", "mlu", "dev/ and test/")),
    Case("eval: MMLU without test", lambda p: with_mmlu(p, test=None), ("no folder 'test' in the MMLU folder", "mmlu", "fix:")),
    Case(
        "eval: a subject without solved examples",
        lambda p: also(p.write("mmlu/test/maps_test.csv", QUESTIONS), with_mmlu(p)),
        ("MMLU file not found", "maps_dev.csv", "fix: add the file, or drop the subject"),
    ),
    Case(
        "eval: a question of seven columns",
        lambda p: with_mmlu(p, test=QUESTIONS + "5+1?,1,2,3,4,A,easy\n"),
        ("the row has 7 columns instead of 6", "sums_test.csv, line 5", "fix: columns"),
    ),
    Case(
        "eval: a small answer letter",
        lambda p: with_mmlu(p, dev="5+1?,1,2,3,4,b\n"),
        ("the answer is 'b', not one of A, B, C, D", "sums_dev.csv, line 1", "fix:"),
    ),
    Case(
        "eval: MMLU not in UTF-8",
        lambda p: also(
            [p.write("mmlu/test/sums_test.csv", b"q,\xff,b,c,d,A\n"), p.write("mmlu/dev/sums_dev.csv", QUESTIONS)],
            evaluate(p, "--mmlu", "mmlu"),
        ),
        ("not a CSV file in UTF-8", "sums_test.csv"),
    ),
]

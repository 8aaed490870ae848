"""Measurements are asked for once, kept, and made in any number of hands with the same result."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from merging.cheap import CheapScores
from merging.config import MergeConfig
from merging.examples import Example
from merging.ledger import Failed, Ledger, Merge, Task
from trainers.data.types import Kind
from trainers.errors import InputError, SetupError
from trainers.files import strict_json

EXAMPLES = [
    *(Example(f"f{number}", "forget", "Task1", Kind.QUESTION) for number in range(4)),
    *(Example(f"r{number}", "retain", "Task1", Kind.QUESTION) for number in range(4)),
    *(Example(f"m{number}", "member") for number in range(4)),
    *(Example(f"n{number}", "nonmember") for number in range(4)),
][::-1]
HASHES = {"a": "content of a", "b": "content of b"}


class Bench:
    """Work that counts, and results that follow from the merge and the example."""

    def __init__(self, *, broken: Sequence[str] = ()) -> None:
        self.tasks: list[Task] = []
        self.broken = broken

    def __call__(self, task: Task) -> Any:
        self.tasks.append(task)
        if task.merge.trials[0] in self.broken:
            raise InputError("3 values are not finite")
        if task.start is None:
            return {"scores": {"final_score": 0.5}, "rows_generated": 7}
        return [self.result(task.merge, example) for example in EXAMPLES[task.start : task.stop]]

    def result(self, merge: Merge, example: Example) -> list[float]:
        number = int(example.id[1:]) + merge.config.scale * len(merge.trials)
        return [number] if example.kind is None else [-number, 4, 2, 1]


def merge(*names: str, scale: float = 1.0) -> Merge:
    return Merge(names, MergeConfig(method="linear", scale=scale))


def ledger(bench: Bench, **more: Any) -> Ledger:
    return Ledger(examples=EXAMPLES, hashes=more.pop("hashes", HASHES), work=bench, **more)


def test_a_later_rung_adds_only_the_examples_that_are_new() -> None:
    bench = Bench()
    book = ledger(bench)
    book.cheap([merge("a", "b")], stop=6)
    (late,) = book.cheap([merge("a", "b")], stop=16)
    assert [(task.start, task.stop) for task in bench.tasks] == [(0, 6), (6, 16)]
    (whole,) = ledger(Bench()).cheap([merge("a", "b")], stop=16)
    assert late == whole
    assert book.cost["examples"] == 16
    book.cheap([merge("a", "b")], stop=6)
    assert len(bench.tasks) == 2, "a shorter stretch is known"


def test_what_was_kept_is_not_made_again() -> None:
    """Everything goes through JSON, as a file would have it; the costs count what was asked for, not who did it."""
    kept: dict[str, Any] = {}
    first = ledger(Bench(), keep=kept.__setitem__)
    asked = [first.cheap([merge("a", "b"), merge("a")], stop=16), first.full({"x": merge("a")})]
    bench = Bench()
    again = ledger(bench, kept=json.loads(json.dumps(strict_json(kept))))
    assert [again.cheap([merge("a", "b"), merge("a")], stop=16), again.full({"x": merge("a")})] == asked
    assert bench.tasks == []
    assert again.cost == first.cost | {"reused": 3}
    assert (again.cost["examples"], again.cost["merges"], again.cost["full"], again.cost["rows_generated"]) == (32, 3, 1, 7)


@pytest.mark.parametrize("change", ["content", "name", "scale", "examples"])
def test_a_measurement_of_something_else_is_not_reused(change: str) -> None:
    kept: dict[str, Any] = {}
    ledger(Bench(), keep=kept.__setitem__).cheap([merge("a", "b")], stop=16)
    bench = Bench()
    hashes = HASHES | ({"a": "retrained"} if change == "content" else {}) | {"c": "content of a"}
    other = merge("c", "b") if change == "name" else merge("a", "b", scale=1.5 if change == "scale" else 1.0)
    ledger(bench, hashes=hashes, kept=kept).cheap([other], stop=15 if change == "examples" else 16)
    assert len(bench.tasks) == 1


def test_a_kill_costs_the_measurement_in_progress_only() -> None:
    """The third record never gets written; the next search makes that one and those after it."""
    kept: dict[str, Any] = {}

    def keep(key: str, value: Any) -> None:
        if len(kept) == 2:
            raise KeyboardInterrupt
        kept[key] = value

    wanted = [merge("a", scale=scale) for scale in (0.5, 1.0, 1.5, 2.0)]
    with pytest.raises(KeyboardInterrupt):
        ledger(Bench(), keep=keep).cheap(wanted, stop=16)
    bench = Bench()
    scores = ledger(bench, kept=kept).cheap(wanted, stop=16)
    assert [task.merge for task in bench.tasks] == wanted[2:]
    assert scores == ledger(Bench()).cheap(wanted, stop=16)


def test_workers_change_nothing_but_the_time() -> None:
    """A pool that works on several tasks at once gives the same scores and the same record in the same order."""

    def pooled(work, tasks):
        with ThreadPoolExecutor(3) as pool:
            yield from pool.map(work, tasks)

    wanted = [merge("a", scale=scale) for scale in (0.5, 1.0, 1.5, 2.0)]
    records: list[list[str]] = [[], []]
    books = [
        ledger(Bench(), keep=lambda key, value, record=record: record.append(key), **({"run": pooled} if number else {}))
        for number, record in enumerate(records)
    ]
    serial, parallel = (book.cheap(wanted, stop=16) for book in books)
    assert serial == parallel
    assert records[0] == records[1]
    assert serial[0] != serial[1], "negative control"


def test_a_failure_is_a_record_with_its_reason_and_is_tried_again() -> None:
    kept: dict[str, Any] = {}
    bench = Bench(broken=["a"])
    book = ledger(bench, keep=kept.__setitem__)
    bad, good = book.cheap([merge("a"), merge("b")], stop=16)
    assert bad == Failed("failed: 3 values are not finite")
    assert isinstance(good, CheapScores)
    assert book.full({"x": merge("a")}) == [Failed("failed: 3 values are not finite")]
    assert (len(kept), book.cost["failed"]) == (1, 2)
    repaired, _ = ledger(Bench(), kept=kept).cheap([merge("a"), merge("b")], stop=16)
    assert isinstance(repaired, CheapScores)


def test_what_is_no_one_s_input_stops_the_search() -> None:
    def work(task: Task) -> Any:
        raise SetupError("no memory left")

    with pytest.raises(SetupError):
        ledger(work).cheap([merge("a")], stop=16)


def test_one_merge_asked_for_twice_is_made_once() -> None:
    bench = Bench()
    first, second = ledger(bench).cheap([merge("a"), merge("a")], stop=16)
    assert first == second
    assert len(bench.tasks) == 1
    bench = Bench(broken=["a"])
    assert len(set(map(str, ledger(bench).full({"x": merge("a"), "y": merge("a")})))) == 1
    assert len(bench.tasks) == 1


def test_results_found_elsewhere_cost_nothing() -> None:
    bench = Bench()
    book = ledger(bench)
    book.know(merge("a"), [bench.result(merge("a"), example) for example in EXAMPLES])
    (known,) = book.cheap([merge("a")], stop=16)
    assert (known, book.cost["examples"], bench.tasks) == (ledger(Bench()).cheap([merge("a")], stop=16)[0], 0, [])


def test_a_result_that_was_no_number_stays_none_after_a_restart() -> None:
    class Diverged(Bench):
        def result(self, merge: Merge, example: Example) -> list[float]:
            return [math.nan] if example.kind is None else super().result(merge, example)

    kept: dict[str, Any] = {}
    for bench in (Diverged(), Bench()):
        (scores,) = ledger(bench, kept=kept, keep=kept.__setitem__).cheap([merge("a")], stop=16)
        assert isinstance(scores, CheapScores)
        assert not scores.is_finite

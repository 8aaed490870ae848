"""Units of work, and the store that keeps their results over the end of a process."""

from __future__ import annotations

import json
import math

import pytest

from eval.parts import Shard, Unit, UnitStore, cut_units, partial_folder, written
from trainers.errors import InputError

KEY = {"config": {"max_new_tokens": 4}, "rows": "abc"}


def test_units_hold_rows_of_similar_cost_within_the_budget_dearest_first():
    """Costs 9 | 5 4 | 2 1 1 under a budget of 9: by hand."""
    units = cut_units([1, 5, 9, 2, 4, 1], budget=9, prefix="rows")
    assert [(unit.name, unit.items, unit.cost) for unit in units] == [
        ("rows-0", (2,), 9),
        ("rows-1", (1, 4), 9),
        ("rows-2", (3, 0, 5), 4),
    ]


def test_a_row_beyond_the_budget_is_a_unit_of_its_own():
    assert [unit.items for unit in cut_units([3, 20, 3], budget=5, prefix="r")] == [(1,), (0,), (2,)]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shards_take_every_unit_once(count):
    units = cut_units(list(range(1, 40)), budget=30, prefix="r")
    taken = [unit.name for index in range(count) for unit in units[Shard(index, count).index :: count]]
    assert sorted(taken) == sorted(unit.name for unit in units)


def test_a_shard_outside_its_count_is_refused():
    with pytest.raises(InputError, match="shard 2 of 2"):
        Shard(2, 2)


@pytest.mark.parametrize("value", [-0.1, 1 / 3, math.nan, math.inf, -math.inf])
def test_numbers_survive_json_to_the_last_digit(value):
    back = float(json.loads(json.dumps(written(value), allow_nan=False)))
    assert back == value or (math.isnan(back) and math.isnan(value))


UNIT = Unit("rows-0", (0, 1), 2)
OTHER = Unit("rows-1", (2,), 1)


def opened(folder, *, key=KEY, weights="w", shard=None):
    store = UnitStore(folder, identity={"weights": weights})
    store.open(key, shard=shard)
    return store


def test_a_later_process_finds_what_an_earlier_one_finished(tmp_path):
    opened(tmp_path / "p").add(UNIT, [1, 2])
    later = opened(tmp_path / "p")
    assert UNIT in later
    assert OTHER not in later
    assert later.result(UNIT) == [1, 2]


@pytest.mark.parametrize("changed", [{"key": {**KEY, "rows": "abd"}}, {"key": {**KEY, "config": {"max_new_tokens": 5}}}, {"weights": "v"}])
def test_another_key_reuses_nothing(tmp_path, changed):
    """Negative control of the above: other rows, other settings, other weights."""
    opened(tmp_path / "p").add(UNIT, [1, 2])
    assert UNIT not in opened(tmp_path / "p", **changed)
    assert UNIT not in opened(tmp_path / "p"), "the earlier results are gone, not hidden"


def test_a_torn_line_is_not_a_result_and_does_not_spoil_the_next(tmp_path):
    opened(tmp_path / "p").add(UNIT, [1, 2])
    with open(tmp_path / "p" / "units-0-of-1.jsonl", "a") as file:
        file.write('{"unit": "rows-1", "resu')
    again = opened(tmp_path / "p")
    assert OTHER not in again
    again.add(OTHER, [3])
    assert opened(tmp_path / "p").result(OTHER) == [3]


def test_a_torn_key_starts_anew(tmp_path):
    opened(tmp_path / "p").add(UNIT, [1, 2])
    (tmp_path / "p" / "key.json").write_text('{"config"')
    assert UNIT not in opened(tmp_path / "p")


def test_shards_write_files_of_their_own_and_see_each_other_after_a_refresh(tmp_path):
    first, second = (opened(tmp_path / "p", shard=Shard(index, 2)) for index in range(2))
    second.add(OTHER, [3])
    assert OTHER not in first
    first.refresh()
    assert first.result(OTHER) == [3]


def test_a_shard_of_another_evaluation_is_refused(tmp_path):
    opened(tmp_path / "p")
    with pytest.raises(InputError, match="another evaluation"):
        opened(tmp_path / "p", weights="v", shard=Shard(1, 2))


def test_without_a_folder_nothing_is_written_and_nothing_found(tmp_path):
    store = UnitStore()
    assert store.open(KEY) is False
    store.add(UNIT, [1])
    assert UNIT in store
    store.remove()


def test_the_store_lies_beside_the_report_and_can_be_removed(tmp_path):
    folder = partial_folder(tmp_path / "eval.json")
    assert folder == tmp_path / "eval-partial"
    store = opened(folder)
    store.remove()
    assert not folder.exists()

"""Work that stays in its processes: results in order, whatever happens to a worker."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher.parallel_map import ActorMap, parallel_map
from trainers.errors import InputError, RunError

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@dataclass
class Work:
    """Squares numbers, the first ones slowest; may die over a number, so many times."""

    folder: Path
    dies_at: int = -1
    times: int = 0

    def __call__(self, number: int) -> tuple[int, int]:
        marks = self.folder / f"died-{number}"
        if number == self.dies_at and len(marks.read_text() if marks.exists() else "") < self.times:
            with open(marks, "a") as file:
                file.write("x")
            os._exit(1)
        if number < 0:
            raise InputError("a negative number")
        time.sleep(0.2 / (1 + number))
        return number**2, os.getpid()


@pytest.fixture(scope="module")
def pool():
    with parallel_map(workers=2, cpus=0.5) as run:
        assert isinstance(run, ActorMap)
        yield run


def test_results_come_in_order_from_several_processes(pool: ActorMap, tmp_path: Path) -> None:
    found = list(pool(Work(tmp_path), range(6)))
    assert [square for square, _ in found] == [0, 1, 4, 9, 16, 25]
    processes = {process for _, process in found}
    assert len(processes) == 2
    assert os.getpid() not in processes


def test_a_worker_that_dies_once_costs_nothing_and_twice_the_search(pool: ActorMap, tmp_path: Path) -> None:
    found = list(pool(Work(tmp_path, dies_at=2, times=1), range(4)))
    assert [square for square, _ in found] == [0, 1, 4, 9]
    with pytest.raises(RunError, match="died twice"):
        list(pool(Work(tmp_path, dies_at=3, times=2), range(4)))


def test_what_work_raises_is_raised_here(pool: ActorMap, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="negative"):
        list(pool(Work(tmp_path), [1, -1]))
    assert list(pool(Work(tmp_path), [])) == []


def test_one_worker_is_the_built_in_map() -> None:
    with parallel_map(workers=1, cpus=1.0) as run:
        assert run is map
    with parallel_map(workers=None, cpus=1.0) as run:
        assert run is map, "this machine has no two GPUs"

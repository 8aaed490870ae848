"""The order of the files: with several processes (`--dist loadfile --no-loadscope-reorder`) the longest files begin first.

A file is one unit of work. xdist's own order, most tests first, would leave the files of few and long tests (whole sweeps) to the end,
where one process runs them while the other has nothing to do.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Every sweep of a test would have pages drawn beside it; the tests of the page and of its drawing are others.
os.environ.setdefault("UNLEARN_LIVE_REPORT_S", "0")

REPOSITORY = Path(__file__).resolve().parents[1]
LONGEST_FIRST = (
    "tests/integration/test_gang.py",
    "tests/integration/test_api.py",
    "tests/integration/test_kills.py",
    "tests/integration/test_cluster_faults.py",
    "tests/integration/test_submit.py",
    "tests/integration/test_search.py",
    "tests/integration/test_storage.py",
    "tests/integration/test_elsewhere.py",
    "tests/integration/test_presets.py",
    "tests/integration/test_slurm.py",
    "tests/integration/test_tracking.py",
    "tests/integration/test_audit.py",
    "tests/integration/test_sweep.py",
    "tests/integration/test_commands.py",
    "tests/launcher/test_doctor.py",
    "tests/launcher/test_tracking_follow.py",
    "tests/launcher/test_finish.py",
)
"""Files that take more than about fifteen seconds, the longest first. One that is missing here costs balance and nothing else."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort stably: files that are not listed, and the tests of a file, keep their order."""
    place = {REPOSITORY / name: index for index, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))

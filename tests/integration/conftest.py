"""One small sweep that nothing disturbs, for all tests that look at it or repeat it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.small_run import run_command, write_small_data, write_small_experiment


@dataclass(frozen=True)
class FinishedSweep:
    """A sweep that ended: its folder, the file and the data it came from, its exit code and output."""

    run: Path
    file: Path
    data: Path
    code: int
    output: str


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> FinishedSweep:
    """The small experiment, from nothing to its report."""
    root = tmp_path_factory.mktemp("undisturbed")
    data = write_small_data(root / "data")
    # Relative paths, as people write them: the trials' processes have other working folders.
    file = write_small_experiment(root / "small.yaml", data=Path("data"), storage="runs")
    code, output = run_command("sweep", file, folder=root)
    return FinishedSweep(run=root / "runs" / "small", file=file, data=data, code=code, output=output)

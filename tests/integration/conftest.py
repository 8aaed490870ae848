"""One small sweep that nothing disturbs, for all tests that look at it or repeat it; and one trial on one rank, to compare with several."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.gang_runs import TRIAL, gang
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


@pytest.fixture(scope="session")
def alone(undisturbed: FinishedSweep, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trial of ``gang`` on one rank of plain torch, in this process: its folder."""
    import torch

    from launcher.load import load_experiment
    from launcher.stages import run_train

    root = tmp_path_factory.mktemp("alone")
    changes = gang(0, train__engine={"name": "torch"}, train__per_device_train_batch_size=8)
    file = write_small_experiment(root / "small.yaml", data=undisturbed.data, storage=root, target=undisturbed.run / "target", **changes)
    before = torch.get_num_threads()
    try:
        run_train(experiment=load_experiment(file), out=None)
    finally:
        torch.set_num_threads(before)
    return root / "small" / TRIAL

"""The Slurm script as shipped, on one machine that believes itself alone: `srun` and `scontrol` execute here, Ray is real."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.templates import cluster_files
from tests.helpers.own_machine import can_isolate, run_inside, write_program
from tests.helpers.small_run import GENTLE, HARSH, write_small_experiment
from tests.integration.conftest import FinishedSweep
from trainers.files import read_json

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.skipif(not can_isolate(), reason="needs user namespaces: unshare, ip")]

LIMIT_S = 600.0
STORY = """
set -u
start() { bash cluster-slurm.sh small.yaml > "$1" 2>&1; echo "$?" > "$1.code"; }
start first.txt &
until compgen -G "$SCRATCH/runs/slurm/trials/*/metrics.jsonl" > /dev/null; do
  if [ -f first.txt.code ]; then cat first.txt; exit 1; fi
  sleep 0.1
done
kill -TERM "$(pgrep -f '^bash cluster-slurm.sh')"
wait
cp requeued.txt requeued-after-first.txt
start second.txt
ps -e -o comm= > left.txt
"""
"""Five minutes before its time is up Slurm signals the script; then the job is put into the queue again, and starts a second time."""


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder whose name leaves room for Ray's sockets."""
    folder = Path(tempfile.mkdtemp(prefix="u"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_a_job_whose_time_is_up_stops_cleanly_is_requeued_and_goes_on(
    undisturbed: FinishedSweep, tmp_path: Path, short_folder: Path
) -> None:
    shutil.copy(cluster_files()["slurm"], tmp_path)
    write_small_experiment(
        tmp_path / "small.yaml", data=undisturbed.data, storage="ignored", target=undisturbed.run / "target", name="slurm",
        sweep__num_trials=2, sweep__start_points=[GENTLE, HARSH], train__num_train_epochs={"values": [8, 16, 20]},
    )  # fmt: skip
    bin_folder = tmp_path / "bin"
    write_program(bin_folder / "srun", 'while [[ "$1" == --* ]]; do shift; done\nexec "$@"\n')
    write_program(bin_folder / "scontrol", f'if [ "$1" = requeue ]; then echo "$2" >> "{tmp_path}/requeued.txt"; else echo 127.0.0.1; fi\n')
    write_program(bin_folder / "unlearn", f'exec "{sys.executable}" -m launcher "$@"\n')
    (bin_folder / "activate").write_text(f'export PATH="{bin_folder}:{Path(sys.executable).parent}:$PATH"\n')
    environment = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "RAY_ADDRESS")} | {
        "HOME": str(tmp_path),
        "UNLEARN_VENV": str(tmp_path),
        "SCRATCH": str(tmp_path),
        "RAY_TMPDIR": str(short_folder),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "here",
        "SLURM_NNODES": "1",
        "SLURM_CPUS_PER_TASK": "2",
    }
    code, output = run_inside(["bash", "-c", STORY], folder=tmp_path, environment=environment, limit_s=LIMIT_S)
    first, second = (tmp_path / "first.txt").read_text(), (tmp_path / "second.txt").read_text()
    assert code == 0, output

    assert (tmp_path / "first.txt.code").read_text().strip() != "0", first
    assert (tmp_path / "requeued-after-first.txt").read_text() == "4711\n"

    assert (tmp_path / "second.txt.code").read_text().strip() == "0", second
    assert (tmp_path / "requeued.txt").read_text() == "4711\n", "a finished job is not requeued"
    run = tmp_path / "runs" / "slurm"
    assert [read_json(file)["state"] for file in sorted(run.glob("trials/*/status.json"))] == ["finished", "finished"]
    assert (run / "results.json").exists()
    assert (run / "report.html").exists()
    assert [name for name in (tmp_path / "left.txt").read_text().split() if name in ("raylet", "gcs_server", "unlearn")] == []

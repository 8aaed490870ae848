"""The ways to a cluster for real: `ray job submit` to a head and a worker node, `ray submit` with the on-premises file as shipped."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.templates import write_template
from tests.helpers.own_machine import can_isolate, run_inside, write_program
from tests.helpers.ray_start import StartedRay, started_ray
from tests.helpers.small_run import GENTLE, HARSH, write_small_experiment
from tests.integration.conftest import FinishedSweep
from trainers.files import read_json

pytestmark = [pytest.mark.ray, pytest.mark.slow]

LIMIT_S = 600.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartedRay]:
    with started_ray(tmp_path_factory.mktemp("home"), worker_cpus=2) as ray:
        yield ray


def until(condition: Callable[[], bool], *, what: str, limit_s: float = 240.0) -> None:
    """Wait for something to hold."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"no {what} after {limit_s:g} s"
        time.sleep(0.2)


def test_a_job_sweeps_to_its_report_on_the_nodes_of_the_cluster(cluster: StartedRay, undisturbed: FinishedSweep, tmp_path: Path) -> None:
    """Its trials run on the second node: the head has no cores. Nothing that `.rayignore` names is uploaded."""
    folder = tmp_path / "work"
    (folder / "models").mkdir(parents=True)
    (folder / "models" / "large.bin").write_bytes(b"0")
    write_template(None, cluster="onprem", folder=folder)
    write_small_experiment(
        folder / "small.yaml", data=undisturbed.data, storage=tmp_path / "runs", target=undisturbed.run / "target", name="job",
        sweep__num_trials=2, sweep__start_points=[GENTLE, HARSH],
    )  # fmt: skip
    write_program(folder / "entry.sh", "ls\nls models\nexec unlearn sweep -c small.yaml sweep.max_concurrent=1\n")
    job = ("ray", "job", "submit", "--address", cluster.dashboard, "--working-dir", ".")
    code, output = cluster.run(*job, "--", "bash", "entry.sh", folder=folder, limit_s=LIMIT_S)
    assert code == 0, output
    assert "small.yaml" in output
    assert "large.bin" not in output
    run = tmp_path / "runs" / "job"
    assert (run / "report.html").exists()
    assert [read_json(file)["state"] for file in sorted(run.glob("trials/*/status.json"))] == ["finished", "finished"]
    assert len(read_json(run / "results.json")["trials"]) == 2


def test_a_stopped_job_leaves_nothing_running(cluster: StartedRay, undisturbed: FinishedSweep, tmp_path: Path) -> None:
    """The negative control: before the stop there are a driver and trials."""
    write_small_experiment(
        tmp_path / "small.yaml", data=undisturbed.data, storage=tmp_path / "runs", target=undisturbed.run / "target", name="stopped",
        sweep__num_trials=2, sweep__start_points=[], train__num_train_epochs=100_000, train__learning_rate=1e-6, train__checkpoints=1,
    )  # fmt: skip
    job = ("--address", cluster.dashboard)
    command = ("--submission-id", "to-stop", "--no-wait", "--working-dir", ".", "--", "unlearn", "sweep", "small.yaml")
    code, output = cluster.run("ray", "job", "submit", *job, *command, folder=tmp_path)
    assert code == 0, output
    until(lambda: len(list(tmp_path.glob("runs/stopped/trials/*/metrics.jsonl"))) == 2, what="two trials at work")
    assert len([line for line in cluster.working() if "launcher" in line]) == 1
    assert len(cluster.working()) >= 3
    code, output = cluster.run("ray", "job", "stop", *job, "to-stop", folder=tmp_path)
    assert code == 0, output
    until(lambda: cluster.working() == [], what="end of the job's processes")
    code, output = cluster.run("ray", "list", "placement-groups", *job, "--filter", "state=CREATED", folder=tmp_path)
    assert code == 0, output
    assert "CREATED" not in output, output


# ---- ray submit


STORY = """
set -eu
ray get-auth-token --generate > /dev/null
ray up --yes --no-config-cache cluster-onprem.yaml
ray submit --no-config-cache cluster-onprem.yaml submit.py -- doctor --cluster > doctor.txt 2>&1
ray submit --no-config-cache cluster-onprem.yaml submit.py -- sweep -c configs/small.yaml storage_path="$PWD/runs" > sweep.txt 2>&1
ls "$HOME" > home.txt
ray down --yes cluster-onprem.yaml
ps -e -o comm= > left.txt
"""


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder whose name leaves room for Ray's sockets."""
    folder = Path(tempfile.mkdtemp(prefix="u"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.skipif(not can_isolate(), reason="needs user namespaces: unshare, ip")
def test_ray_submit_runs_one_file_on_the_head(undisturbed: FinishedSweep, tmp_path: Path, short_folder: Path) -> None:
    """`ray up`, `ray submit`, `ray down` with the file as shipped; ssh and rsync execute here, under another home folder."""
    home, laptop = tmp_path / "home", tmp_path / "laptop"
    (laptop / "configs").mkdir(parents=True)
    (laptop / ".ssh").mkdir()
    (laptop / ".ssh" / "id_ed25519").write_text("not a key")
    write_small_experiment(
        laptop / "configs" / "small.yaml", data=undisturbed.data, storage="ignored", target=undisturbed.run / "target", name="submitted",
        sweep__num_trials=2, sweep__start_points=[GENTLE, HARSH],
    )  # fmt: skip
    write_template(None, cluster="onprem", folder=laptop)
    file = laptop / "cluster-onprem.yaml"
    text = file.read_text().replace("[WORKER-1.CHANGE-ME, WORKER-2.CHANGE-ME]", "[]").replace("HEAD.CHANGE-ME", "127.0.0.1")
    file.write_text(text.replace("min_workers: 2", "min_workers: 0").replace("max_workers: 2", "max_workers: 0"))
    # The environment on the head is there already, so that the file's setup commands find it.
    for name in ("python", "ray"):
        write_program(home / "unlearn" / "bin" / name, f'exec "{Path(sys.executable).parent / name}" "$@"\n')
    write_program(home / "unlearn" / "bin" / "pip", "exit 0\n")
    # As ssh does: everything after the host, joined by spaces, goes to a shell in the home folder.
    ssh = f'export HOME="{home}"\ncd "$HOME"\nwhile [[ "$1" != *@* ]]; do shift; done\nshift\nexec bash -c "$*" < /dev/null\n'
    write_program(tmp_path / "bin" / "ssh", ssh)
    write_program(
        tmp_path / "bin" / "rsync",
        f'for last in "$@"; do from="$to"; to="$last"; done\nto="${{to#*:}}"\nto="${{to/#\\~/{home}}}"\nmkdir -p "$(dirname "$to")"\n'
        'if [ -d "$from" ]; then mkdir -p "$to"; from="$from/."; fi\nexec cp -r "$from" "$to"\n',
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "RAY_ADDRESS")} | {
        "HOME": str(laptop),
        "RAY_TMPDIR": str(short_folder),
        "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    code, output = run_inside(["bash", "-c", STORY], folder=laptop, environment=environment, limit_s=LIMIT_S)
    texts = {name: (laptop / name).read_text() for name in ("doctor.txt", "sweep.txt") if (laptop / name).exists()}
    assert code == 0, (output, texts)
    assert "pass  node " in texts["doctor.txt"]
    assert "submit.py" in (laptop / "home.txt").read_text()
    run = laptop / "runs" / "submitted"
    assert (run / "report.html").exists(), texts["sweep.txt"]
    assert [read_json(file)["state"] for file in sorted(run.glob("trials/*/status.json"))] == ["finished", "finished"]
    assert [name for name in (laptop / "left.txt").read_text().split() if name in ("raylet", "gcs_server")] == []

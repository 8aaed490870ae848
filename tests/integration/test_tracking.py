"""A real sweep that is tracked: its curves are those of its files, and no key of the environment is in anything that it writes."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher.tracking.content import step_values
from tests.helpers.small_run import GENTLE, HARSH, run_command, write_small_experiment
from tests.helpers.tracked import event_scalars, logged_runs
from tests.integration.conftest import FinishedSweep
from trainers.files import read_json, read_jsonl

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "89abcdef",
    "HF_TOKEN": "hf_" + "qZ7" * 11,
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLE0",
}


@dataclass(frozen=True)
class TrackedSweep:
    """A sweep of two trials with fake keys in its environment: its run folder, Ray's folder, and what it printed."""

    run: Path
    ray: Path
    output: str


@pytest.fixture(scope="module")
def tracked(undisturbed: FinishedSweep, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackedSweep]:
    root = tmp_path_factory.mktemp("tracked")
    file = write_small_experiment(
        root / "tracked.yaml",
        data=undisturbed.data,
        storage="runs",
        name="tracked",
        target=undisturbed.run / "target",
        sweep__num_trials=2,
        sweep__start_points=[GENTLE, HARSH],
        tracking={"wandb": "offline", "tensorboard": True, "tags": ["planted"]},
    )
    # Ray's sockets lie below its folder, and the path of a socket must be short.
    ray = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        for name, value in {**SECRETS, "RAY_TMPDIR": str(ray), "HOME": str(root)}.items():
            patch.setenv(name, value)
        code, output = run_command("sweep", file, folder=root)
        assert code == 0, output
        code, report = run_command("report", root / "runs" / "tracked", folder=root)
        assert code == 0, report
    yield TrackedSweep(run=root / "runs" / "tracked", ray=ray, output=output + report)
    shutil.rmtree(ray, ignore_errors=True)


def files_with(text: str, folder: Path) -> list[Path]:
    """The files below a folder that hold a text."""
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink() and text.encode() in path.read_bytes()]


def test_no_key_is_in_anything_that_a_sweep_writes(tracked: TrackedSweep) -> None:
    """The controls are words that must be found in the same places by the same search."""
    root = tracked.run.parent.parent
    for name, secret in SECRETS.items():
        assert files_with(secret, root) == [], name
        assert files_with(secret, tracked.ray) == [], name
        assert secret not in tracked.output, name
    assert len(files_with("planted", root)) > 4
    assert len(files_with("PL_DISABLE_FORK", tracked.ray)) > 0, "what trials get as runtime_env is in Ray's logs"
    assert "trial-00" in tracked.output


def test_every_curve_of_the_sweep_is_in_the_trackers(tracked: TrackedSweep) -> None:
    runs = {title.split()[0]: one for title, one in logged_runs(tracked.run).items()}
    assert {name: one.job_type for name, one in runs.items()} == {
        "before": "baseline", "trial-00": "trial", "trial-01": "trial", "merge": "merge", "report": "report",
    }  # fmt: skip
    assert {one.group for one in runs.values()} == {"tracked"}
    for name, steps in (("trial-00", 32), ("trial-01", 80)):
        lines = read_jsonl(tracked.run / "trials" / name / "metrics.jsonl")
        rows = [step_values(line) for line in lines]
        assert len(rows) == steps
        assert runs[name].curves == [{**row, "_step": row["step"]} for row in rows]
        assert runs[name].exit_codes == [0]
        assert [step for step, _ in event_scalars(tracked.run, name)["loss"]] == [row["step"] for row in rows]
        test = read_json(tracked.run / "trials" / name / "eval.json")["scores"]
        assert runs[name].summary["test/forgetting"] == test["forgetting"]
    assert len(runs["report"].rows) == 1
    assert "models/path" in runs["report"].rows[0]


def test_a_sweep_says_once_how_to_upload(tracked: TrackedSweep) -> None:
    assert tracked.output.count(f"unlearn sync {tracked.run.relative_to(tracked.run.parent.parent)}") == 1


def test_tracking_may_change_between_two_starts_of_a_run(tracked: TrackedSweep) -> None:
    """It changes nothing that a run computes; and what was written once is not written again."""
    root = tracked.run.parent.parent
    before = {one.title: (one.id, len(one.folders)) for one in logged_runs(tracked.run).values()}
    code, output = run_command("sweep", root / "tracked.yaml", "tracking.tensorboard=false", "tracking.tags=[other]", folder=root)
    assert code == 0, output
    assert {one.title: (one.id, len(one.folders)) for one in logged_runs(tracked.run).values()} == before

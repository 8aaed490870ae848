"""`unlearn sync`: what it calls, what it says, and how it ends. Only the upload itself is a stand-in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.lock import hold
from launcher.tracking.config import TrackingConfig
from launcher.tracking.files import TrackingFiles
from launcher.tracking.sync import sync_run
from tests.helpers.run_folder import build_running
from tests.helpers.tracked import logged_runs
from trainers.errors import InputError, RunError, SetupError

KEY = "0123456789abcdef" * 2 + "01234567"

UPLOAD = f"""#!{sys.executable}
import json, os, pathlib, sys
pathlib.Path(os.environ["CALLS"]).open("a").write(json.dumps(sys.argv[1:]) + "\\n")
if os.environ.get("BROKEN"):
    sys.exit("upload refused for key " + os.environ["WANDB_API_KEY"])
for folder in sys.argv[sys.argv.index("-n") + 2:]:
    for log in pathlib.Path(folder).glob("*.wandb"):
        log.with_name(log.name + ".synced").touch()
"""


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A machine without a key whose `wandb` writes down its arguments, and marks what it was given as the real one does."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    places = tmp_path / "bin"
    places.mkdir()
    (places / "wandb").write_text(UPLOAD)
    (places / "wandb").chmod(0o755)
    monkeypatch.setenv("PATH", str(places), prepend=os.pathsep)
    return {**os.environ, "CALLS": str(tmp_path / "calls.jsonl")}


def calls(environment: dict[str, str]) -> list[list[str]]:
    path = Path(environment["CALLS"])
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def tracked_run(folder: Path) -> Path:
    """A sweep in progress whose follower was killed before it wrote anything."""
    run = build_running(folder / "run")
    TrackingFiles(run).write_settings(TrackingConfig(), mode="offline")
    return run


def test_everything_is_uploaded_once(tmp_path: Path, environment: dict[str, str]) -> None:
    """Also what no process had written yet."""
    run = tracked_run(tmp_path)
    with_key = environment | {"WANDB_API_KEY": KEY}
    assert sync_run(run, environment=with_key) == f"uploaded 4 offline runs of {run}"
    folders = [str(folder) for one in logged_runs(run).values() for folder in one.folders]
    (call,) = calls(environment)
    assert (call[:4], sorted(call[4:])) == (["sync", "--yes", "-n", "8"], sorted(folders))
    assert KEY not in " ".join(call)
    assert sync_run(run, environment=with_key) == f"nothing to sync: all that {run} has written is uploaded"
    assert len(calls(environment)) == 1


def test_without_a_key_nothing_is_called(tmp_path: Path, environment: dict[str, str]) -> None:
    run = tracked_run(tmp_path)
    with pytest.raises(SetupError) as caught:
        sync_run(run, environment=environment)
    assert caught.value.exit_code == 3
    assert "4 offline runs" in caught.value.what
    assert "WANDB_API_KEY" in str(caught.value.fix)
    assert calls(environment) == []


def test_a_run_that_was_not_tracked_has_nothing_to_sync(tmp_path: Path, environment: dict[str, str]) -> None:
    run = build_running(tmp_path / "run")
    assert sync_run(run, environment=environment).startswith("nothing to sync")
    TrackingFiles(run).write_settings(TrackingConfig(wandb="off", tensorboard=True), mode="off")
    assert sync_run(run, environment=environment).startswith("nothing to sync")


def test_a_running_sweep_is_waited_for(tmp_path: Path, environment: dict[str, str]) -> None:
    run = tracked_run(tmp_path)
    with hold(TrackingFiles(run).lock), pytest.raises(RunError, match="another process"):
        sync_run(run, environment=environment | {"WANDB_API_KEY": KEY})
    assert calls(environment) == []


def test_a_failed_upload_is_told_without_the_key(tmp_path: Path, environment: dict[str, str]) -> None:
    run = tracked_run(tmp_path)
    with pytest.raises(RunError) as caught:
        sync_run(run, environment=environment | {"WANDB_API_KEY": KEY, "BROKEN": "1"})
    assert "upload refused" in str(caught.value)
    assert KEY not in str(caught.value)
    assert len(TrackingFiles(run).offline_folders()) == 4, "they wait for the next call"


def test_another_folder_is_no_run(tmp_path: Path, environment: dict[str, str]) -> None:
    with pytest.raises(InputError):
        sync_run(tmp_path, environment=environment)


def test_the_command_ends_with_the_right_code(tmp_path: Path, environment: dict[str, str]) -> None:
    run = build_running(tmp_path / "run")

    def sync() -> tuple[int, str]:
        done = subprocess.run([sys.executable, "-m", "launcher", "sync", str(run)], env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    code, text = sync()
    assert code == 0, text
    assert "nothing to sync" in text
    TrackingFiles(run).write_settings(TrackingConfig(), mode="offline")
    code, text = sync()
    assert code == 3, text
    assert f"`unlearn sync {run}` again" in text

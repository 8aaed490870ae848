"""The file that `ray submit` copies to a head: what it imports, which cluster it takes, what it says where nothing is installed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from launcher import submit


def copied(folder: Path) -> Path:
    """The file alone in a home folder that holds modules with names of ours and of libraries."""
    shutil.copy(submit.__file__, folder)
    (folder / "launcher").mkdir()
    (folder / "launcher" / "__init__.py").write_text("raise RuntimeError('from the home folder')\n")
    (folder / "typer.py").write_text("raise RuntimeError('from the home folder')\n")
    return folder / "submit.py"


def run(file: Path, *arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "RAY_ADDRESS")}
    return subprocess.run([python, str(file), *arguments], capture_output=True, text=True, cwd=file.parent, env=environment)


def write_address(folder: Path, address: str) -> dict[str, str]:
    """What `ray start` leaves on a machine; the environment that leads there."""
    (folder / "ray").mkdir()
    (folder / "ray" / "ray_current_cluster").write_text(address)
    return {"RAY_TMPDIR": str(folder)}


def test_a_copy_runs_the_installed_package_and_nothing_that_lies_beside_it(tmp_path: Path) -> None:
    """The negative control: the home's own `typer` is what a plain script there imports."""
    file = copied(tmp_path)
    done = run(file, "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("unlearn-ties ")
    (tmp_path / "plain.py").write_text("import typer\n")
    assert "from the home folder" in run(tmp_path / "plain.py").stderr


def test_exit_codes_are_those_of_the_command(tmp_path: Path) -> None:
    done = run(copied(tmp_path), "sweep", "--config", "absent.yaml", "storage_path=/shared/runs")
    assert done.returncode == 2
    assert "configuration file not found" in done.stderr


def test_a_python_without_the_package_exits_3_and_says_which_python(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", symlinks=True, with_pip=False)
    python = tmp_path / "bare" / "bin" / "python"
    home = tmp_path / "home"
    home.mkdir()
    done = run(copied(home), "doctor", python=str(python))
    assert done.returncode == 3
    assert "unlearn-ties is not installed" in done.stderr
    assert str(python) in done.stderr
    assert "setup_commands" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_dependency_is_named() -> None:
    text = submit.not_installed(ModuleNotFoundError("No module named 'typer'", name="typer"))
    assert "cannot be imported" in text
    assert "'typer'" in text


def test_the_cluster_of_this_machine_is_used(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:
        environment = write_address(tmp_path, f"127.0.0.1:{head.getsockname()[1]}")
        submit.use_cluster(environment)
    assert environment["RAY_ADDRESS"] == "auto"


def test_an_address_that_is_given_stays(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:
        environment = write_address(tmp_path, f"127.0.0.1:{head.getsockname()[1]}") | {"RAY_ADDRESS": "10.0.0.1:6379"}
        submit.use_cluster(environment)
    assert environment["RAY_ADDRESS"] == "10.0.0.1:6379"


@pytest.mark.parametrize("address", ["127.0.0.1:{closed}", "", "nonsense"])
def test_an_address_that_a_dead_cluster_left_is_not_used(tmp_path: Path, address: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:
        closed = head.getsockname()[1]
    environment = write_address(tmp_path, address.format(closed=closed))
    submit.use_cluster(environment)
    assert "RAY_ADDRESS" not in environment


def test_no_cluster_changes_nothing(tmp_path: Path) -> None:
    environment = {"RAY_TMPDIR": str(tmp_path)}
    submit.use_cluster(environment)
    assert environment == {"RAY_TMPDIR": str(tmp_path)}

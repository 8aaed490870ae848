"""What is built and installed: the archive for developers, the wheel for users, and a command that works where no checkout is."""

from __future__ import annotations

import configparser
import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from email.message import Message
from pathlib import Path

import pytest

from launcher.templates import template_names

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("eval", "launcher", "merging", "trainers")
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
"""What `python -m build` calls, without an environment of its own for setuptools."""


def run(*command: str | Path, folder: Path) -> str:
    """The output of a command that knows nothing of this process's paths."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV", "RAY_"))}
    done = subprocess.run([str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@dataclass(frozen=True)
class Built:
    """The source archive, and the wheel that was built from its unpacked files alone."""

    archive: Path
    wheel: Path

    def archived(self) -> set[str]:
        with tarfile.open(self.archive) as file:
            return {member.name.partition("/")[2] for member in file.getmembers() if member.isfile()}

    def wheeled(self) -> set[str]:
        with zipfile.ZipFile(self.wheel) as file:
            return {name for name in file.namelist() if not name.endswith("/")}

    def metadata(self) -> Message:
        with zipfile.ZipFile(self.wheel) as file:
            return email.message_from_bytes(file.read(next(name for name in file.namelist() if name.endswith(".dist-info/METADATA"))))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Both, built in a copy, so that nothing is left in the checkout and nothing of an earlier build is found."""
    root = tmp_path_factory.mktemp("built")
    hidden = {path.name for path in REPOSITORY.glob(".*")} - {".ci", ".dockerignore"}
    left_out = shutil.ignore_patterns(*hidden, "__pycache__", "*.egg-info", "build", "dist", "runs", "wandb")
    shutil.copytree(REPOSITORY, root / "copy", ignore=left_out)
    archive = root / run(sys.executable, "-c", BUILD, "build_sdist", root, folder=root / "copy").splitlines()[-1]
    with tarfile.open(archive) as file:
        file.extractall(root / "unpacked", filter="data")
    (source,) = (root / "unpacked").iterdir()
    return Built(archive=archive, wheel=root / run(sys.executable, "-c", BUILD, "build_wheel", root, folder=source).splitlines()[-1])


def package_files() -> set[str]:
    """Every file of the four packages in the checkout."""
    files = (file for package in PACKAGES for file in (REPOSITORY / package).rglob("*") if file.is_file())
    return {file.relative_to(REPOSITORY).as_posix() for file in files if "__pycache__" not in file.parts}


# ---- what is in them


def test_the_wheel_holds_the_four_packages_with_their_data_and_nothing_else(built: Built) -> None:
    """A folder of data that setup.cfg does not name makes the two sets differ."""
    files = built.wheeled()
    assert {name for name in files if ".dist-info/" not in name} == package_files()
    assert {name.partition("/")[2] for name in files if ".dist-info/" in name} == {
        "METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt",
    }  # fmt: skip
    needed = {"launcher/submit.py", "launcher/recipes/cluster-aws.yaml", "launcher/recipes/cluster-slurm.sh", "launcher/recipes/ignore.txt"}
    needed |= {"launcher/assets/report.html.j2", "launcher/assets/model_card.md.j2", *(f"{package}/py.typed" for package in PACKAGES)}
    assert needed <= files


def test_the_source_archive_holds_the_checkout(built: Built) -> None:
    """Code, tests, guides, benchmarks, what builds images, and the two files that tests and guides call; no caches."""
    files = built.archived()
    assert package_files() <= files
    for name in ("tests", "docs", "benchmarks", "docker"):
        ours = {file.relative_to(REPOSITORY).as_posix() for file in (REPOSITORY / name).rglob("*") if file.is_file()}
        assert {file for file in ours if "__pycache__" not in file} <= files, name
    assert {"Makefile", ".ci/run", "constraints.txt", "CHANGELOG.md", "README.md", "LICENSE", "setup.cfg", ".dockerignore"} <= files
    assert not [name for name in files if name.endswith(".pyc") or name.startswith(("runs/", "dist/", "build/", ".venv/"))]


def test_the_metadata_say_what_this_is(built: Built) -> None:
    found = built.metadata()
    assert (found["Name"], found["License-Expression"], found["Requires-Python"]) == ("unlearn-ties", "Apache-2.0", ">=3.11")
    assert found["Description-Content-Type"] == "text/markdown"
    assert found.get_payload(decode=True).decode() == (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert {"cluster", "dev", "eval", "gpu"} <= set(found.get_all("Provides-Extra", []))
    assert {"Typing :: Typed", "Operating System :: POSIX :: Linux"} <= set(found.get_all("Classifier", []))


def test_the_version_is_written_once_and_the_changelog_begins_with_it(built: Built) -> None:
    """setup.cfg has it; the package, the command and the archive's name read it from there."""
    settings = configparser.ConfigParser()
    settings.read(REPOSITORY / "setup.cfg")
    version = settings["metadata"]["version"]
    assert built.metadata()["Version"] == version
    assert built.wheel.name == f"unlearn_ties-{version}-py3-none-any.whl"
    heading = re.search(r"^## (\S+)", (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert heading is not None
    assert heading[1] == version
    code = [file.read_text(encoding="utf-8") for package in PACKAGES for file in (REPOSITORY / package).rglob("*.py")]
    assert not [text for text in code if f'"{version}"' in text], "a second place that a release would have to change"


# ---- installed


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that has the wheel, and sees the libraries of this one, but not its link to the checkout."""
    root = tmp_path_factory.mktemp("installed")
    venv.create(root / "venv", symlinks=True, with_pip=False)
    python = root / "venv" / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=root).strip())
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "libraries.pth").write_text("\n".join(libraries) + "\n")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", built.wheel, folder=root)
    return python.parent


def test_the_installed_command_runs_without_the_checkout(installed: Path, tmp_path: Path) -> None:
    """From an empty folder, all four packages come from the environment; the negative control is that the tests' own do not."""
    code = f"import importlib; print([importlib.import_module(name).__file__ for name in {PACKAGES!r}])"
    found = re.findall(r"'([^']+)'", run(installed / "python", "-c", code, folder=tmp_path))
    assert len(found) == 4
    assert all(Path(file).is_relative_to(installed.parent) for file in found), found
    assert not any(Path(file).is_relative_to(REPOSITORY) for file in found)
    assert run(installed / "unlearn", "--version", folder=tmp_path).startswith("unlearn-ties ")
    assert "quickstart" in run(installed / "unlearn", "--help", folder=tmp_path)
    assert subprocess.run([installed / "python", "-c", "import tests"], cwd=tmp_path, capture_output=True, check=False).returncode == 1


def test_every_template_is_written_by_the_installed_command(installed: Path, tmp_path: Path) -> None:
    """One process for all of them: each call of the command is what `unlearn init --template NAME` runs."""
    code = (
        "import sys; from launcher import cli\n"
        "for name in sys.argv[1:]:\n"
        "    try: cli.main(['init', '--template', name])\n"
        "    except SystemExit as end: assert not end.code, (name, end.code)\n"
    )
    run(installed / "python", "-c", code, *template_names(), folder=tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {f"{name}.yaml" for name in template_names()}
    run(installed / "unlearn", "init", "--cluster", "aws", folder=tmp_path)
    assert {"cluster-aws.yaml", "submit.py", ".rayignore"} <= {file.name for file in tmp_path.iterdir()}

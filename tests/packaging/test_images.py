"""The files that images are built from: sources that are there, bases that stay, versions from the constraints, a user without rights.

No image is built here.
"""

from __future__ import annotations

import fnmatch
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from launcher.cli import app
from tests.packaging.test_requirements import extras

REPOSITORY = Path(__file__).resolve().parents[2]
FILES = sorted((REPOSITORY / "docker").glob("Dockerfile.*"))
PACKAGES = {"eval", "launcher", "merging", "trainers"}
each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.suffix[1:])


def instructions(text: str) -> list[tuple[str, str]]:
    """Name and arguments of every instruction; a backslash at a line's end joins lines."""
    lines = (line.strip() for line in text.replace("\\\n", " ").splitlines())
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines if line and not line.startswith("#"))]


def copied(text: str) -> list[str]:
    """What is taken from the context, in the order of the file."""
    found = [rest.split() for name, rest in instructions(text) if name == "COPY" and not rest.startswith("--from=")]
    return [source for *sources, _ in found for source in sources]


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path of the first level out; the last line that fits decides."""
    out = False
    for line in (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.strip()
        if pattern and not pattern.startswith("#") and fnmatch.fnmatch(path, pattern.lstrip("!")):
            out = not pattern.startswith("!")
    return out


def pip_lines(text: str) -> list[list[str]]:
    """The arguments of every `pip install`."""
    return [shlex.split(rest)[2:] for name, rest in instructions(text) if name == "RUN" and rest.startswith("pip install")]


def unknown_to_pip_line(words: list[str]) -> list[str]:
    """Words of a `pip install` that are neither ours, nor torch at its pin, nor a known option."""
    known_options = {"--constraint": "constraints.txt", "--extra-index-url": None, "--no-deps": "", "--force-reinstall": ""}
    bad, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if word in known_options:
            wanted = known_options[word]
            if wanted != "" and rest.pop(0) != wanted and wanted is not None:
                bad.append(word)
        elif ours := re.fullmatch(r"\.(?:\[([a-z,-]+)\])?", word):
            bad += [extra for extra in (ours[1] or "").split(",") if extra and extra not in extras()]
        elif word not in ("$(grep '^torch==' constraints.txt)", "$(grep '^torch==' constraints.txt)+cpu"):
            bad.append(word)
    return bad


def test_there_is_an_image_for_cpus_and_one_for_gpus() -> None:
    assert [file.name for file in FILES] == ["Dockerfile.cpu", "Dockerfile.cuda"]


@each_file
def test_whatever_is_copied_is_there_and_sent(file: Path) -> None:
    sources = copied(file.read_text(encoding="utf-8"))
    assert set(sources) >= PACKAGES | {"setup.cfg", "pyproject.toml", "constraints.txt", "LICENSE", "README.md"}
    for source in sources:
        assert (REPOSITORY / source).exists(), source
        assert not ignored(source), source
    assert [name for name in ("tests", "docs", "runs", ".git", ".venv", "benchmarks") if not ignored(name)] == []


@each_file
def test_what_pip_installs_is_pinned_or_ours(file: Path) -> None:
    """Every version comes from the constraints; the negative control holds an unknown extra, a free package and another list."""
    lines = pip_lines(file.read_text(encoding="utf-8"))
    assert len(lines) == 3
    assert [unknown_to_pip_line(line) for line in lines] == [[], [], []]
    assert all("--constraint" in line or "--no-deps" in line for line in lines)
    assert unknown_to_pip_line(["--constraint", "other.txt", ".[gqu]", "numpy"]) == ["--constraint", "gqu", "numpy"]


@each_file
def test_bases_are_fixed_by_their_tags_and_the_same_in_both_stages(file: Path) -> None:
    """The interpreter that the environment was made with must be in the last stage."""
    bases = [rest.split(" ")[0] for name, rest in instructions(file.read_text(encoding="utf-8")) if name == "FROM"]
    assert len(bases) == 2
    assert len(set(bases)) == 1
    assert re.fullmatch(r"[a-z/]+:\d+\.\d+\.\d+-[a-z0-9.-]+", bases[0]), bases[0]


@each_file
def test_the_image_runs_the_doctor_as_a_user_without_rights(file: Path) -> None:
    found = dict(instructions(file.read_text(encoding="utf-8")))
    assert int(found["USER"]) > 1000
    assert found["CMD"] == '["unlearn", "doctor"]'
    assert "doctor" in typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert "ENTRYPOINT" not in found, "KubeRay and `ray up` start commands of their own"


@each_file
def test_the_linter_finds_nothing(file: Path, tmp_path: Path) -> None:
    """The negative control is a base without a tag."""
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if linter is None:
        pytest.skip("hadolint is not installed: it is built for x86-64 only")
    done = subprocess.run([linter, file], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
    bad = tmp_path / "Dockerfile"
    bad.write_text(file.read_text(encoding="utf-8").replace(":", "", 1).replace("FROM ", "FROM debian AS other\nFROM ", 1))
    assert "DL3006" in subprocess.run([linter, bad], capture_output=True, text=True, timeout=60).stdout

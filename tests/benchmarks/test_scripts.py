"""Every benchmark can be started, and says so in words where the machine lacks what it needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path.name for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text())


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_shows_its_help(script: str) -> None:
    done = run(f"benchmarks/{script}", "--help")
    assert done.returncode == 0, done.stderr
    assert "--write" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("script", [name for name in SCRIPTS if name.startswith("gpu_")])
def test_a_script_for_gpus_skips_without_one(script: str) -> None:
    done = run(f"benchmarks/{script}")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("skipped: no CUDA device")

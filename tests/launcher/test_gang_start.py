"""What has to hold before the ranks of a trial start."""

from __future__ import annotations

import subprocess
import sys


def test_a_rank_learns_of_its_gpus_before_torch_does() -> None:
    """Ray imports the actor's module, and all that it imports, before the first call; torch reads CUDA_VISIBLE_DEVICES once."""
    code = "import sys; import launcher.gang, launcher.tune_trial; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"

"""The allocator is told once, and only where it can be."""

from __future__ import annotations

import subprocess
import sys

import pytest

COUNT = """
import resource, torch
from launcher.allocation import reuse_freed_memory
if {told}:
    assert reuse_freed_memory()
torch.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's setting")
def test_a_second_tensor_takes_the_place_of_the_first() -> None:
    """64 MiB of new pages are many page faults; told to keep what is freed, there are next to none."""
    told, untold = (
        int(subprocess.run([sys.executable, "-c", COUNT.format(told=told)], capture_output=True, text=True, check=True).stdout)
        for told in (True, False)
    )
    assert told < 200 < untold


def test_elsewhere_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from launcher.allocation import reuse_freed_memory

    monkeypatch.setattr(sys, "platform", "darwin")
    assert not reuse_freed_memory()

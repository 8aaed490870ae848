"""The allocator is told where it can be, and nothing breaks where it cannot."""

from __future__ import annotations

import subprocess
import sys

import pytest

from launcher.allocation import reuse_freed_memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's setting")
def test_a_process_of_its_own_can_be_told() -> None:
    """In another process: what is told cannot be taken back."""
    code = "from launcher.allocation import reuse_freed_memory; assert reuse_freed_memory()"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_elsewhere_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not reuse_freed_memory()

"""A process that hangs ends itself, and says where it hung."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time

import pytest

from launcher.watchdog import EXIT_CODE, Watchdog


def run(code: str) -> tuple[int, str, float]:
    """Exit code, error output and seconds of a Python program."""
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr, time.monotonic() - started


def test_a_process_without_a_sign_of_life_ends_with_its_code_and_its_stack() -> None:
    code, output, seconds = run("""
        import time
        from launcher.watchdog import Watchdog

        def wait_for_the_other_rank():
            time.sleep(50)

        with Watchdog(1.0, on_stall=lambda: print("recorded", flush=True)):
            wait_for_the_other_rank()
    """)
    assert (code, EXIT_CODE) == (75, 75)
    assert seconds < 20
    assert "no sign of life for 1 s" in output
    assert "wait_for_the_other_rank" in output
    assert "recorded" in output


def test_a_record_that_cannot_be_made_does_not_keep_the_process_alive() -> None:
    code, _, seconds = run("""
        import time
        from launcher.watchdog import Watchdog

        with Watchdog(0.5, on_stall=lambda: 1 / 0):
            time.sleep(50)
    """)
    assert code == EXIT_CODE
    assert seconds < 20


def test_signs_of_life_suspension_and_the_end_of_the_block_keep_a_process_alive() -> None:
    """Three times longer than the limit each; without the sign of life the first loop would end the process."""
    code, output, _ = run("""
        import time
        from launcher.watchdog import Watchdog

        with Watchdog(0.4) as watchdog:
            for _ in range(12):
                watchdog.alive()
                time.sleep(0.1)
            watchdog.suspend()
            time.sleep(1.2)
            watchdog.alive()
        time.sleep(1.2)
        print("survived")
    """)
    assert (code, output) == (0, "survived\n")


def test_the_first_sign_of_life_may_have_a_limit_of_its_own() -> None:
    watchdog = Watchdog(5.0, first_s=600.0)
    assert watchdog._deadline > time.monotonic() + 300.0
    watchdog.alive()
    assert watchdog._deadline <= time.monotonic() + 5.0


def test_a_sign_of_life_ends_a_suspension(monkeypatch: pytest.MonkeyPatch) -> None:
    watchdog = Watchdog(5.0)
    watchdog.suspend()
    assert watchdog._deadline == float("inf")
    watchdog.alive()
    assert watchdog._deadline <= time.monotonic() + 5.0

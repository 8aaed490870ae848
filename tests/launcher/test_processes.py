"""Ending processes for good, and only the right ones."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import replace

from launcher.processes import Process, _born, end_processes, is_alive, this_process


def sleeper() -> tuple[subprocess.Popen[bytes], Process]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    return process, Process(process.pid, _born(process.pid))


def test_a_process_that_is_stopped_is_killed_and_one_that_has_ended_is_let_be() -> None:
    stopped, first = sleeper()
    ended, second = sleeper()
    stopped.send_signal(signal.SIGSTOP)
    ended.kill()
    while is_alive(second):
        time.sleep(0.01)
    assert is_alive(first)
    assert end_processes([first, second], patience_s=0.1) == 1
    assert stopped.wait() == -signal.SIGKILL
    assert not is_alive(first), "a process that nobody has waited for yet is dead all the same"
    ended.wait()


def test_another_process_of_the_same_number_is_left_alone() -> None:
    other, known = sleeper()
    assert known.born is not None
    assert end_processes([replace(known, born=known.born - 1), replace(known, born=None)], patience_s=0.1) == 0
    assert is_alive(known)
    other.kill()
    other.wait()


def test_this_process_is_alive() -> None:
    assert is_alive(this_process())

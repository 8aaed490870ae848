"""How a run is asked to stop: the file that trials look at, and the signals that write it."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from launcher.faults import Interrupted, clear_stop, request_stop, stop_reason, stoppable


def test_a_run_goes_on_until_it_is_asked_to_stop_and_after_that_was_taken_back(tmp_path: Path) -> None:
    assert stop_reason(tmp_path) is None
    assert stop_reason(tmp_path / "not there") is None
    request_stop(tmp_path, "budget")
    assert stop_reason(str(tmp_path)) == "budget"
    clear_stop(tmp_path)
    clear_stop(tmp_path)
    assert stop_reason(tmp_path) is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_block_goes_on_to_its_end(tmp_path: Path, number: signal.Signals) -> None:
    request_stop(tmp_path, "budget")
    told, ended = threading.Event(), threading.Event()
    before = signal.getsignal(number)

    def block() -> None:
        with stoppable(tmp_path, on_stop=told.set):
            assert stop_reason(tmp_path) is None, "what an earlier start was asked is taken back"
            os.kill(os.getpid(), number)
            assert stop_reason(tmp_path) == "interrupted"
            assert told.wait(timeout=60)
            ended.set()

    with pytest.raises(Interrupted) as caught:
        block()
    assert ended.is_set()
    assert caught.value.exit_code == 130
    assert "run the same command again" in str(caught.value)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("numbers", [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)])
def test_the_second_signal_interrupts_at_once(tmp_path: Path, numbers: tuple[signal.Signals, signal.Signals]) -> None:
    before = signal.getsignal(signal.SIGINT)
    reached = []

    def block() -> None:
        with stoppable(tmp_path):
            for number in numbers:
                os.kill(os.getpid(), number)
                reached.append(number)

    with pytest.raises(KeyboardInterrupt):
        block()
    assert reached == [numbers[0]]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_failure_is_told_unless_it_follows_from_the_stop(tmp_path: Path) -> None:
    def block(*, interrupted: bool) -> None:
        with stoppable(tmp_path):
            if interrupted:
                os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError("trials did not complete")

    with pytest.raises(RuntimeError, match="did not complete"):
        block(interrupted=False)
    with pytest.raises(Interrupted):
        block(interrupted=True)


def test_nothing_happens_without_a_signal_nor_outside_of_the_main_thread(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with stoppable(tmp_path):
        assert signal.getsignal(signal.SIGINT) is not before
    handlers = []

    def elsewhere() -> None:
        with stoppable(tmp_path):
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert handlers == [before]

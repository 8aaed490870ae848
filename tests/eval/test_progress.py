"""What a waiting reader sees of a long evaluation."""

from __future__ import annotations

import io

import pytest

from eval.progress import Meter, duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


def meter(stream, *, every_s=0.0, rows_done=0, cost_done=0):
    found = Meter(stream=stream, every_s=every_s)
    found.start(rows=100, cost=1000, rows_done=rows_done, cost_done=cost_done)
    return found


def test_speed_and_remaining_time_by_hand():
    """40 rows in 10 s are 4 rows/s; 200 of 1000 cost took 10 s, so 800 take 40 s."""
    found = meter(io.StringIO())
    found.set(rows=40, cost=200)
    assert found.text(10.0) == "evaluation: 40 of 100 rows, 4.0 rows/s, about 40 s left"


def test_rows_of_an_earlier_process_do_not_count_for_the_speed():
    """30 rows and 100 cost were there: 10 rows in 10 s, 100 cost in 10 s, 800 to go."""
    found = meter(io.StringIO(), rows_done=30, cost_done=100)
    found.set(rows=40, cost=200)
    assert found.text(10.0) == "evaluation: 40 of 100 rows, 1.0 rows/s, about 80 s left"


def test_nothing_is_guessed_before_something_is_done():
    assert meter(io.StringIO()).text(3.0) == "evaluation: 0 of 100 rows"


def test_a_log_gets_whole_lines_without_control_characters():
    stream = io.StringIO()
    found = meter(stream)
    for done in (1, 2):
        found.set(rows=done, cost=done)
    found.finish()
    assert stream.getvalue().count("\n") == 2
    assert not {"\r", "\x1b"} & set(stream.getvalue())


def test_a_terminal_gets_one_line_that_is_ended():
    stream = Terminal()
    found = meter(stream)
    for done in (1, 2):
        found.set(rows=done, cost=done)
    assert stream.getvalue().count("\r") == 2
    assert "\n" not in stream.getvalue()
    found.finish()
    assert stream.getvalue().endswith("\n")


def test_a_short_evaluation_says_nothing():
    stream = io.StringIO()
    found = Meter(stream=stream)
    found.start(rows=2, cost=2)
    found.set(rows=2, cost=2)
    found.finish()
    assert stream.getvalue() == ""


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (180, "3 min"), (7500, "2 h 5 min")])
def test_durations_are_words(seconds, text):
    assert duration(seconds) == text

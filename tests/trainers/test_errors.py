"""Errors that a user can act on keep their parts on the way from a worker process."""

from __future__ import annotations

import copy
import pickle

import pytest

from trainers.errors import InputError, RunError, SetupError, UserFacingError
from trainers.loop import DivergedError

EVERY_ERROR = [(UserFacingError, 1), (RunError, 1), (InputError, 2), (SetupError, 3), (DivergedError, 1)]


def test_the_message_lists_what_where_why_and_fix() -> None:
    error = InputError("density = 1.4", where="merge.ties.density", why="it is a fraction", fix="give a number in (0, 1]")
    assert str(error) == "density = 1.4\n  where: merge.ties.density\n  why: it is a fraction\n  fix: give a number in (0, 1]"
    assert str(InputError("density = 1.4", fix="less")) == "density = 1.4\n  fix: less"
    assert str(InputError("density = 1.4")) == "density = 1.4"


@pytest.mark.parametrize(("kind", "exit_code"), EVERY_ERROR, ids=lambda value: getattr(value, "__name__", str(value)))
@pytest.mark.parametrize("copied", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy], ids=["pickle", "copy"])
def test_a_pickled_error_keeps_its_kind_exit_code_and_parts(kind: type[UserFacingError], exit_code: int, copied) -> None:
    expected = kind("what", where="here", why="because", fix="do")
    actual = copied(expected)
    assert type(actual) is kind
    assert actual.exit_code == exit_code
    assert (actual.what, actual.where, actual.why, actual.fix) == ("what", "here", "because", "do")
    assert str(actual) == str(expected)
    bare = copied(kind("only this"))
    assert (bare.what, bare.where, bare.why, bare.fix) == ("only this", None, None, None)


def test_an_input_error_is_a_value_error_and_the_others_are_not() -> None:
    """Library code raises it where Python would raise ValueError; pydantic and callers may catch it as one."""
    assert [issubclass(kind, ValueError) for kind, _ in EVERY_ERROR] == [False, False, True, False, False]

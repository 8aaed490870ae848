"""Failures that a user can act on: each says what is wrong, where, why and what to do."""

from __future__ import annotations


class UserFacingError(Exception):
    """A failure that is printed as a message instead of a traceback.

    Args:
        what: the problem in one sentence, with the offending value.
        where: file, line, key or row.
        why: the reason it cannot work, where that is not obvious.
        fix: what to change.
    """

    exit_code = 1
    label = "error"

    def __init__(self, what: str, *, where: str | None = None, why: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.why, self.fix = what, where, why, fix
        parts = [what]
        parts += [f"  {name}: {text}" for name, text in (("where", where), ("why", why), ("fix", fix)) if text]
        super().__init__("\n".join(parts))


class RunError(UserFacingError):
    """The run itself failed (exit code 1)."""

    exit_code = 1
    label = "run failed"


class InputError(UserFacingError, ValueError):
    """Configuration, data or a checkpoint is unusable as given (exit code 2)."""

    exit_code = 2
    label = "input error"


class SetupError(UserFacingError):
    """The machine or the installation lacks something (exit code 3)."""

    exit_code = 3
    label = "environment error"

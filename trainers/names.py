"""Names that a configuration takes and that plugins may add to."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Self

_MADE: dict[tuple[type, str], Any] = {}
"""Members beside the built-in ones, by class and value: one object per name, so that ``is`` holds."""
_ADDED: dict[type, dict[str, Any]] = {}
"""Those of them that are valid now."""


class OpenNames(StrEnum):
    """An enum of built-in names that takes further ones at run time; iterating gives the built-in ones.

    An added name can be sent to a process that does not know it yet, and becomes valid there with the plugin that adds it.
    """

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        return _ADDED.get(cls, {}).get(str(value))

    @classmethod
    def known(cls) -> tuple[str, ...]:
        """All valid names, the built-in ones first."""
        return (*(member.value for member in cls), *_ADDED.get(cls, {}))

    @classmethod
    def add(cls, name: str) -> Self:
        """Make a name valid."""
        member = _member(cls, name)
        _ADDED.setdefault(cls, {})[name] = member
        return member

    @classmethod
    def remove(cls, name: str) -> None:
        """Make an added name invalid again."""
        _ADDED.get(cls, {}).pop(name, None)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _member, (type(self), self.value)


def _member(cls: Any, name: str) -> Any:
    if name in cls._value2member_map_:
        return cls._value2member_map_[name]
    if (cls, name) not in _MADE:
        member = str.__new__(cls, name)
        member._name_, member._value_ = name.upper(), name
        _MADE[cls, name] = member
    return _MADE[cls, name]

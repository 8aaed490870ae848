"""What a term does with a field of its input that may be missing: use it, or say which one it lacks."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


def required(value: T | None, *, term: str, field: str) -> T:
    """The value, if there is one.

    Raises:
        ValueError: if it is None.
    """
    if value is None:
        raise ValueError(f"{term} needs {field}, which is missing")
    return value


def required_tensor(value: Tensor | None, *, term: str, field: str, like: Tensor) -> Tensor:
    """The tensor, if there is one with as many entries as ``like``.

    Raises:
        ValueError: if it is None or of another shape.
    """
    tensor = required(value, term=term, field=field)
    if tensor.shape != like.shape:
        raise ValueError(f"{term} needs {field} of shape {tuple(like.shape)}, but got {tuple(tensor.shape)}")
    return tensor

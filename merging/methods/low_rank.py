"""An update as the product of two factors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """The update ``scale * B @ A`` of rank at most r, transposed if the base stores its weight as (in, out).

    Args:
        a: float32, shape (r, in).
        b: float32, shape (out, r).
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0
    transpose: bool = False

    @property
    def rank(self) -> int:
        """The number of rows of A."""
        return self.a.shape[0]

    @property
    def left(self) -> Tensor:
        """The left factor of the update in the base's shape, scale included."""
        return (self.a.T if self.transpose else self.b) * self.scale

    @property
    def right(self) -> Tensor:
        """The right factor of the update in the base's shape."""
        return self.b.T if self.transpose else self.a

    def dense(self) -> Tensor:
        """The update in the base's shape, contiguous."""
        update = self.b @ self.a
        update = (update.T if self.transpose else update).contiguous()
        return update.mul_(self.scale)


def from_sides(*, left: Tensor, right: Tensor, transpose: bool) -> LowRank:
    """The factors whose update in the base's shape is ``left @ right``."""
    if transpose:
        return LowRank(a=left.T.contiguous(), b=right.T.contiguous(), transpose=True)
    return LowRank(a=right.contiguous(), b=left.contiguous())

"""Nothing is timed before all arms are shown to compute the same loss and the same gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.arms.base import Arm, Gradient

LOSS_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 1e-5
"""Relative to the norm of the whole gradient. Measured in float32: losses differ by up to 1e-7, gradients by up to 8e-7; a KL that also
reads the prompts, a missing end token or sums in place of means differ by more than 1e-2."""


@dataclass(frozen=True)
class Difference:
    """How far an arm is from the first one: relative loss difference, and norm of the gradients' difference over their norm."""

    arm: str
    loss: float
    gradient: float


class ArmsDisagreeError(AssertionError):
    """Two arms do not compute the same step: a comparison of their speed would mean nothing."""


def difference(expected: Gradient, actual: Gradient, *, arm: str) -> Difference:
    """The distance between two results of the same step.

    Raises:
        ArmsDisagreeError: if they have gradients of other parameters.
    """
    if expected.by_name.keys() != actual.by_name.keys():
        odd = sorted(expected.by_name.keys() ^ actual.by_name.keys())
        raise ArmsDisagreeError(f"{arm}: gradients of other parameters, the first is {odd[0]}")
    norm = math.sqrt(sum(float(value.double().square().sum()) for value in expected.by_name.values()))
    apart = math.sqrt(
        sum(float((actual.by_name[name].double() - value.double()).square().sum()) for name, value in expected.by_name.items())
    )
    return Difference(arm=arm, loss=abs(actual.loss - expected.loss) / abs(expected.loss), gradient=apart / norm)


def check_close(
    found: Difference, *, expected: str, loss_tolerance: float = LOSS_TOLERANCE, gradient_tolerance: float = GRADIENT_TOLERANCE
) -> None:
    """Refuse a difference that is more than rounding.

    Raises:
        ArmsDisagreeError: naming both arms.
    """
    if not (found.loss <= loss_tolerance and found.gradient <= gradient_tolerance):
        raise ArmsDisagreeError(
            f"{found.arm} differs from {expected}: loss by {found.loss:.1e} (allowed {loss_tolerance:.0e}), "
            f"gradient by {found.gradient:.1e} (allowed {gradient_tolerance:.0e})"
        )


def check_arms_agree(arms: Sequence[Arm], *, pairs: Sequence[int]) -> list[Difference]:
    """Distances of all arms from the first, on one step.

    Raises:
        ArmsDisagreeError: if one is more than rounding.
    """
    first = arms[0].gradient(pairs)
    found = [difference(first, arm.gradient(pairs), arm=arm.name) for arm in arms[1:]]
    for one in found:
        check_close(one, expected=arms[0].name)
    return found

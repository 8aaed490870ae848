"""Normalised gradient difference: forget and retain gradients enter an update with equal length."""

from __future__ import annotations

import math
from typing import NamedTuple


class GradientCoefficients(NamedTuple):
    """Factors of the two sides' gradients in an update."""

    forget: float
    retain: float


def normalised_coefficients(*, forget_norm: float, retain_norm: float) -> GradientCoefficients:
    """1 / norm for each side; 0 for a side whose gradient is zero, which contributes nothing.

    The update's gradient is g_retain / |g_retain| - g_forget / |g_forget| with g the gradients of cross-entropy. The forget term is
    gradient ascent, so its gradient is -g_forget already and both factors are positive. A side's gradient is that of all its weighted
    terms: one weight common to a side cancels. The paper's learning rate from curvature (AutoLR) is not part of this.

    Args:
        forget_norm: Euclidean norm of the forget terms' gradient over all trained parameters and the whole step, >= 0.
        retain_norm: the same of the retain terms.

    Raises:
        ValueError: if a norm is negative, infinite or not a number.

    Source: Bu, Jin et al. 2024, https://arxiv.org/abs/2410.22086
    """
    for name, norm in (("forget_norm", forget_norm), ("retain_norm", retain_norm)):
        if not (math.isfinite(norm) and norm >= 0):
            raise ValueError(f"{name} = {norm}, must be finite and >= 0: the gradient has overflowed; lower the learning rate")
    return GradientCoefficients(*(0.0 if norm == 0 else 1.0 / norm for norm in (forget_norm, retain_norm)))

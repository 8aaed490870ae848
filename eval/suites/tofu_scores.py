"""TOFU's two numbers for a model: what is left of its utility, and how far its forgetting looks like never having known."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def model_utility(terms: Sequence[float]) -> float:
    """Harmonic mean of nine terms in [0, 1]; 0 if one of them is 0, NaN if one is undefined.

    Args:
        terms: {probability, ROUGE-L recall, truth ratio} x {retain, real authors, world facts}; the probability is normalised against
            the wrong answers on the last two sets, and the truth ratio is max(0, 1 - R).

    Source: Maini et al. 2024 (TOFU), https://arxiv.org/abs/2401.06121
    """
    return math.nan if any(math.isnan(term) for term in terms) else float(statistics.harmonic_mean(terms))


@dataclass(frozen=True)
class ForgetQuality:
    """The two-sample Kolmogorov-Smirnov test between the truth ratios of two models.

    Args:
        p_value: probability of a difference at least this large if both models' ratios came from one distribution; high is good.
        statistic: largest distance between the two empirical distribution functions, in [0, 1]; 0 is best.
    """

    p_value: float
    statistic: float


def forget_quality(*, ratios: Sequence[float], retained_ratios: Sequence[float]) -> ForgetQuality:
    """How much the truth ratios on the forget set look like those of a model that was never trained on it.

    The test sees ranks only: the ratio and its inverse (which the published code compares) give the same result. Its p-value assumes
    independent rows, while TOFU's come 20 to an author, and shrinks with the number of rows: compare like with like.

    Args:
        ratios: of the unlearned model, one per row.
        retained_ratios: of the model trained without the forget set.

    Returns:
        NaN in both fields where a ratio is NaN.

    Source: Maini et al. 2024 (TOFU), https://arxiv.org/abs/2401.06121; scipy.stats.ks_2samp with its defaults (two-sided, exact where
    feasible), as in https://github.com/locuslab/tofu
    """
    from scipy.stats import ks_2samp

    a, b = np.asarray(ratios, dtype=np.float64), np.asarray(retained_ratios, dtype=np.float64)
    if np.isnan(a).any() or np.isnan(b).any():
        return ForgetQuality(p_value=math.nan, statistic=math.nan)
    # An infinite ratio is a rank like any other, but not every version of the test takes it.
    largest = np.finfo(np.float64).max
    with warnings.catch_warnings():
        # Where the exact computation fails, which equal samples make it do, the test takes its limit and says so.
        warnings.simplefilter("ignore", RuntimeWarning)
        result = ks_2samp(np.minimum(a, largest), np.minimum(b, largest))
    return ForgetQuality(p_value=float(result.pvalue), statistic=float(result.statistic))

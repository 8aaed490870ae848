"""Was a text trained on? Scores of one text for membership attacks, computed from what the model thinks of its tokens.

Every score is oriented like a loss: smaller means "more likely a member". So ``eval.mia.attack_auc`` takes each of them as it is,
and an AUC of 1 means remembered. A text without scored tokens gives NaN, which that function counts as infinitely unlikely.

Shape suffix: N scored tokens.
"""

from __future__ import annotations

import math
import zlib

import numpy as np

from eval.teacher_forced import TokenScores

_LEAST_VARIANCE = 1e-6
"""Of log p under the model's own distribution, nats squared: a distribution with a single possible token has none at all."""


def loss(scores: TokenScores) -> float:
    """Mean token loss, nats.

    Source: Yeom et al. 2018, https://arxiv.org/abs/1709.01604
    """
    return -_mean(scores.log_prob_N)


def zlib_ratio(scores: TokenScores, *, text: str) -> float:
    """Mean token loss divided by the number of bytes that zlib needs for the text (UTF-8, default level), nats per byte.

    A text that is easy for everybody (repetitions, lists) also compresses well, so that it does not pass for a member.

    Args:
        scores: of the text's tokens.
        text: what was scored.

    Source: Carlini et al. 2021, https://arxiv.org/abs/2012.07805 (logarithm of the perplexity over zlib entropy)
    """
    return loss(scores) / len(zlib.compress(text.encode("utf-8")))


def min_k(scores: TokenScores, *, fraction: float) -> float:
    """Minus the mean of the lowest token log-probabilities, nats: a text that was never seen has a few very unlikely tokens.

    Args:
        scores: of the text's tokens.
        fraction: share of the tokens that is averaged, in (0, 1]; rounded down, but at least one token.

    Raises:
        ValueError: if the fraction is not in (0, 1].

    Source: Shi et al. 2023, https://arxiv.org/abs/2310.16789
    """
    return -_lowest_mean(scores.log_prob_N, fraction=fraction)


def min_k_plus_plus(scores: TokenScores, *, fraction: float) -> float:
    """Minus the mean of the lowest z = (log p(x_t) - mean_t) / sd_t: how far a token lies below what the model expects at its place.

    Mean and standard deviation are those of log p under the model's own next-token distribution; the variance counts as at least 1e-6.

    Args:
        scores: of the text's tokens, with moments.
        fraction: share of the tokens that is averaged, in (0, 1]; rounded down, but at least one token.

    Raises:
        ValueError: if the fraction is not in (0, 1], or the scores came without moments.

    Source: Zhang et al. 2024, https://arxiv.org/abs/2404.02936
    """
    if scores.mean_N is None or scores.variance_N is None:
        raise ValueError("min-k %++ needs the moments of the model's own distribution: ask token_scores for them")
    z_N = (scores.log_prob_N - scores.mean_N) / np.sqrt(np.maximum(scores.variance_N, _LEAST_VARIANCE))
    return -_lowest_mean(z_N, fraction=fraction)


def reference(scores: TokenScores, *, reference_scores: TokenScores) -> float:
    """Mean token loss minus that of another model, nats: what this model finds easier than one that need not know the text.

    Args:
        scores: of the text's tokens under the attacked model.
        reference_scores: of the same tokens under the other model.

    Raises:
        ValueError: if the two are of different tokens.

    Source: Carlini et al. 2021, https://arxiv.org/abs/2012.07805 (ratio to another model's perplexity)
    """
    if len(scores.log_prob_N) != len(reference_scores.log_prob_N):
        raise ValueError(
            f"{len(scores.log_prob_N)} tokens of {scores.row_id!r} under one model, {len(reference_scores.log_prob_N)} under the other"
        )
    return loss(scores) - loss(reference_scores)


def _mean(values_N: np.ndarray) -> float:
    return float(values_N.mean()) if len(values_N) else math.nan


def _lowest_mean(values_N: np.ndarray, *, fraction: float) -> float:
    """Mean of the lowest values; a value that is not a number counts as the lowest of all and makes the mean NaN."""
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction = {fraction}: it must be in (0, 1]")
    # 0.29 * 100 is a little less than 29 in floating point.
    number = max(1, math.floor(round(fraction * len(values_N), 9)))
    ordered_N = np.sort(np.where(np.isnan(values_N), -np.inf, values_N))
    mean = _mean(ordered_N[:number])
    return math.nan if np.isnan(values_N).any() else mean

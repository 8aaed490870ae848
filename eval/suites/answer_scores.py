"""How well a model knows one given text, from what it thinks of its tokens.

Shape suffix: N scored tokens.
"""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import numpy as np

from eval.teacher_forced import TokenScores


def answer_loss(scores: TokenScores) -> float:
    """Mean token loss, nats; NaN without tokens."""
    return -float(scores.log_prob_N.mean()) if len(scores.log_prob_N) else math.nan


def probability(scores: TokenScores) -> float:
    """exp(-mean token loss): the geometric mean of the token probabilities, in [0, 1]; NaN without tokens.

    The end token counts where it is among the scores. TOFU's code also scores the words ``Answer: `` of the prompt of its non-chat
    models, which raises the value; open-unlearning scores answer and end token, as here.

    Source: Maini et al. 2024 (TOFU), https://arxiv.org/abs/2401.06121
    """
    return math.exp(-answer_loss(scores))


def normalised_probability(*, right_loss: float, wrong_losses: list[float] | tuple[float, ...]) -> float:
    """The right answer's probability divided by the sum over the right one and all wrong ones, in [0, 1].

    Args:
        right_loss: mean token loss of the right answer, nats.
        wrong_losses: the same of each wrong answer, at least one.

    Source: TOFU, https://arxiv.org/abs/2401.06121. open-unlearning adds 1e-10 to the denominator.
    """
    losses = np.array([right_loss, *wrong_losses], dtype=np.float64)
    # Relative to the most likely answer: the quotient stays defined where every probability underflows.
    weights = np.exp(losses.min() - losses)
    return float(weights[0] / weights.sum())


def without_end(scores: TokenScores) -> TokenScores:
    """The same scores without the last token: what is said of the answer's own text."""
    values = {field.name: getattr(scores, field.name) for field in fields(scores)}
    shorter: dict[str, Any] = {name: value[:-1] for name, value in values.items() if isinstance(value, np.ndarray)}
    return replace(scores, **shorter)


def exact_memorization(scores: TokenScores) -> float:
    """Share of the tokens that are the argmax after the true tokens before them, in [0, 1]; NaN without tokens.

    open-unlearning leaves the end token out, so give the scores without it.

    Source: Tirumala et al. 2022, https://arxiv.org/abs/2205.10770
    """
    return float(scores.correct_N.mean()) if len(scores.correct_N) else math.nan


def extraction_strength(scores: TokenScores) -> float:
    """1 - k / n: k is the shortest prefix of the text's n tokens after which the argmax repeats all the rest; in [0, 1].

    0 where even the last token is not repeated, for which open-unlearning gives 1 / n. NaN without tokens.

    Source: Carlini et al. 2021, https://arxiv.org/abs/2012.07805
    """
    n = len(scores.correct_N)
    return int(scores.correct_N[::-1].cumprod().sum()) / n if n else math.nan

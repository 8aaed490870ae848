"""Every objective once more, in float64 loops over plain lists: slow, obvious, with gradients derived by hand.

A sequence is a list of scored tokens. A value is the loss of a whole step; a gradient has the shape of the logits:
one list per sequence, one per token, one number per vocabulary entry.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Gradient = list[list[list[float]]]


@dataclass(frozen=True)
class Token:
    """One scored token: the model's and the reference's logits over the vocabulary, and the label."""

    logits: list[float]
    reference_logits: list[float]
    label: int


Sequence = list[Token]


def log_softmax(logits: list[float]) -> list[float]:
    """log p over the vocabulary."""
    highest = max(logits)
    normaliser = highest + math.log(sum(math.exp(value - highest) for value in logits))
    return [value - normaliser for value in logits]


def log_prob(token: Token) -> float:
    """log p_model(label)."""
    return log_softmax(token.logits)[token.label]


def log_prob_gradient(token: Token) -> list[float]:
    """d log p(label) / d logit_v = [v is the label] - p_v."""
    return [(1.0 if entry == token.label else 0.0) - math.exp(value) for entry, value in enumerate(log_softmax(token.logits))]


def scaled(factor: float, gradient: list[float]) -> list[float]:
    """A gradient times a number."""
    return [factor * value for value in gradient]


def count_tokens(sequences: list[Sequence]) -> int:
    """Scored tokens of a set."""
    return sum(len(sequence) for sequence in sequences)


def grad_ascent(sequences: list[Sequence]) -> tuple[float, Gradient]:
    """Mean log-probability of the tokens: minimising it ascends the cross-entropy."""
    number = count_tokens(sequences)
    value = 0.0
    for sequence in sequences:
        for token in sequence:
            value += log_prob(token) / number
    return value, [[scaled(1.0 / number, log_prob_gradient(token)) for token in sequence] for sequence in sequences]


def retain_ce(sequences: list[Sequence]) -> tuple[float, Gradient]:
    """Mean cross-entropy of the tokens."""
    number = count_tokens(sequences)
    value = 0.0
    for sequence in sequences:
        for token in sequence:
            value -= log_prob(token) / number
    return value, [[scaled(-1.0 / number, log_prob_gradient(token)) for token in sequence] for sequence in sequences]


def retain_kl(sequences: list[Sequence]) -> tuple[float, Gradient]:
    """Mean over tokens of sum_v q_v (log q_v - log p_v), q the reference, p the model; its gradient is p_v - q_v."""
    number = count_tokens(sequences)
    value = 0.0
    gradient: Gradient = []
    for sequence in sequences:
        rows = []
        for token in sequence:
            model, reference = log_softmax(token.logits), log_softmax(token.reference_logits)
            for log_p, log_q in zip(model, reference, strict=True):
                value += math.exp(log_q) * (log_q - log_p) / number
            rows.append([(math.exp(log_p) - math.exp(log_q)) / number for log_p, log_q in zip(model, reference, strict=True)])
        gradient.append(rows)
    return value, gradient


def npo(sequences: list[Sequence], *, beta: float, token_mean: bool) -> tuple[float, Gradient]:
    """Mean over sequences of (2 / beta) log(1 + exp(beta * d)), d the sum (or the mean) of its tokens' log-ratios.

    The derivative by d is 2 sigmoid(beta * d), shared by the tokens of the sequence.
    """
    value = 0.0
    gradient: Gradient = []
    for sequence in sequences:
        share = 1.0 / len(sequence) if token_mean else 1.0
        ratio = 0.0
        for token in sequence:
            ratio += share * (log_prob(token) - log_softmax(token.reference_logits)[token.label])
        value += (2.0 / beta) * math.log(1.0 + math.exp(beta * ratio)) / len(sequences)
        slope = 2.0 / (1.0 + math.exp(-beta * ratio)) / len(sequences)
        gradient.append([scaled(slope * share, log_prob_gradient(token)) for token in sequence])
    return value, gradient

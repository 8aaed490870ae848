"""Every objective once more, in float64 loops over plain lists: slow, obvious, with gradients derived by hand.

A sequence is a list of scored tokens. A value is the loss of a whole step; a gradient has the shape of the logits:
one list per sequence, one per token, one number per vocabulary entry. Where an objective holds a factor or a target constant,
``constant`` gives the tokens that these are computed from, so that a test can move the others alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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


def log_ratio(token: Token) -> float:
    """log p_model(label) - log p_reference(label)."""
    return log_prob(token) - log_softmax(token.reference_logits)[token.label]


def log_prob_gradient(token: Token) -> list[float]:
    """d log p(label) / d logit_v = [v is the label] - p_v."""
    return [(1.0 if entry == token.label else 0.0) - math.exp(value) for entry, value in enumerate(log_softmax(token.logits))]


def scaled(factor: float, gradient: list[float]) -> list[float]:
    """A gradient times a number."""
    return [factor * value for value in gradient]


def shares(lengths: list[int], *, by_sequence: bool) -> list[float]:
    """What one token of each sequence weighs in an average over tokens, or over the sequences' averages."""
    if by_sequence:
        return [1.0 / (length * len(lengths)) if length else 0.0 for length in lengths]
    return [1.0 / max(1, sum(lengths)) for _ in lengths]


# --- objectives that average tokens ---


def ascent_with_factor(
    sequences: list[Sequence], *, factor: Callable[[float], float], constant: list[Sequence] | None, by_sequence: bool
) -> tuple[float, Gradient]:
    """Average of factor(p) log p, the factor constant; the gradient of a token is factor(p) times that of log p."""
    value = 0.0
    gradient: Gradient = []
    share_of = shares([len(sequence) for sequence in sequences], by_sequence=by_sequence)
    for sequence, fixed, share in zip(sequences, constant or sequences, share_of, strict=True):
        rows = []
        for token, fixed_token in zip(sequence, fixed, strict=True):
            weight = share * factor(math.exp(log_prob(fixed_token)))
            value += weight * log_prob(token)
            rows.append(scaled(weight, log_prob_gradient(token)))
        gradient.append(rows)
    return value, gradient


def grad_ascent(sequences: list[Sequence], *, by_sequence: bool = False) -> tuple[float, Gradient]:
    """Mean log-probability of the tokens: minimising it ascends the cross-entropy."""
    return ascent_with_factor(sequences, factor=lambda p: 1.0, constant=None, by_sequence=by_sequence)


def cross_entropy(sequences: list[Sequence], *, by_sequence: bool = False) -> tuple[float, Gradient]:
    """Mean of -log p: on the retain set rehearsal, on the forget set what task-vector negation subtracts."""
    return ascent_with_factor(sequences, factor=lambda p: -1.0, constant=None, by_sequence=by_sequence)


def wga(
    sequences: list[Sequence], *, beta: float, constant: list[Sequence] | None = None, by_sequence: bool = False
) -> tuple[float, Gradient]:
    """Mean of p^beta log p, p^beta constant."""
    return ascent_with_factor(sequences, factor=lambda p: p**beta, constant=constant, by_sequence=by_sequence)


def satimp(
    sequences: list[Sequence], *, beta_1: float, beta_2: float, constant: list[Sequence] | None = None, by_sequence: bool = False
) -> tuple[float, Gradient]:
    """Mean of p^beta_1 (1 - p)^beta_2 log p, the powers constant."""
    return ascent_with_factor(sequences, factor=lambda p: p**beta_1 * (1 - p) ** beta_2, constant=constant, by_sequence=by_sequence)


def distillation(
    sequences: list[Sequence],
    *,
    target: Callable[[Token], list[float]],
    constant: list[Sequence] | None,
    by_sequence: bool,
    skip_first: bool = False,
    minus_entropy: bool = False,
) -> tuple[float, Gradient]:
    """Average of -sum_v t_v log p_v, t constant; since t sums to one the gradient of a token is p - t.

    With ``minus_entropy`` sum_v t_v log t_v is added, which makes it KL(t || p) and changes no gradient.
    """
    first = 1 if skip_first else 0
    value = 0.0
    gradient: Gradient = []
    share_of = shares([max(0, len(sequence) - first) for sequence in sequences], by_sequence=by_sequence)
    for sequence, fixed, share in zip(sequences, constant or sequences, share_of, strict=True):
        rows = []
        for index, (token, fixed_token) in enumerate(zip(sequence, fixed, strict=True)):
            if index < first:
                rows.append([0.0] * len(token.logits))
                continue
            model, t = log_softmax(token.logits), target(fixed_token)
            for log_p, probability in zip(model, t, strict=True):
                value -= share * probability * log_p
                if minus_entropy:
                    value += share * probability * math.log(probability)
            rows.append([share * (math.exp(log_p) - probability) for log_p, probability in zip(model, t, strict=True)])
        gradient.append(rows)
    return value, gradient


def probabilities(logits: list[float]) -> list[float]:
    """p over the vocabulary."""
    return [math.exp(value) for value in log_softmax(logits)]


def retain_kl(sequences: list[Sequence], *, by_sequence: bool = False) -> tuple[float, Gradient]:
    """Mean of sum_v q_v (log q_v - log p_v), q the reference, p the model; its gradient is p - q."""
    return distillation(
        sequences, target=lambda token: probabilities(token.reference_logits), constant=None, by_sequence=by_sequence, minus_entropy=True
    )


def undial(sequences: list[Sequence], *, beta: float, by_sequence: bool = False) -> tuple[float, Gradient]:
    """Mean cross-entropy against the softmax of the reference's logits, the label's lowered by beta."""

    def target(token: Token) -> list[float]:
        return probabilities([value - beta * (entry == token.label) for entry, value in enumerate(token.reference_logits)])

    return distillation(sequences, target=target, constant=None, by_sequence=by_sequence)


def ce_u(
    sequences: list[Sequence], *, skip_first: bool, constant: list[Sequence] | None = None, by_sequence: bool = False
) -> tuple[float, Gradient]:
    """Mean cross-entropy against the softmax of the model's own logits without the label's, constant."""

    def target(token: Token) -> list[float]:
        others = iter(probabilities([value for entry, value in enumerate(token.logits) if entry != token.label]))
        return [0.0 if entry == token.label else next(others) for entry in range(len(token.logits))]

    return distillation(sequences, target=target, constant=constant, by_sequence=by_sequence, skip_first=skip_first)


# --- objectives of whole sequences ---


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
            ratio += share * log_ratio(token)
        value += (2.0 / beta) * math.log(1.0 + math.exp(beta * ratio)) / len(sequences)
        slope = 2.0 / (1.0 + math.exp(-beta * ratio)) / len(sequences)
        gradient.append([scaled(slope * share, log_prob_gradient(token)) for token in sequence])
    return value, gradient


def simnpo(sequences: list[Sequence], *, beta: float, margin: float) -> tuple[float, Gradient]:
    """Mean over sequences of (2 / beta) log(1 + exp(-beta (c - margin))), c the mean of its tokens' -log p.

    The derivative by c is -2 sigmoid(-beta (c - margin)), and c falls by 1 / length where a token's log p rises by 1.
    """
    value = 0.0
    gradient: Gradient = []
    for sequence in sequences:
        excess = -margin
        for token in sequence:
            excess -= log_prob(token) / len(sequence)
        value += (2.0 / beta) * math.log(1.0 + math.exp(-beta * excess)) / len(sequences)
        slope = 2.0 / (1.0 + math.exp(beta * excess)) / len(sequences)
        gradient.append([scaled(slope / len(sequence), log_prob_gradient(token)) for token in sequence])
    return value, gradient


def dpo(sequences: list[Sequence], alternatives: list[Sequence], *, beta: float, token_mean: bool) -> tuple[float, Gradient, Gradient]:
    """Mean over pairs of (2 / beta) log(1 + exp(-beta (a - d))), a and d the log-ratios of alternative and answer.

    The derivative by d is 2 sigmoid(-beta (a - d)), and by a the same with the other sign. Gradients: of the answers' logits, then of
    the alternatives'.
    """
    value = 0.0
    gradients: tuple[Gradient, Gradient] = ([], [])
    for answer, alternative in zip(sequences, alternatives, strict=True):
        share = [1.0 / len(tokens) if token_mean else 1.0 for tokens in (answer, alternative)]
        lead = 0.0
        for token in alternative:
            lead += share[1] * log_ratio(token)
        for token in answer:
            lead -= share[0] * log_ratio(token)
        value += (2.0 / beta) * math.log(1.0 + math.exp(-beta * lead)) / len(sequences)
        slope = 2.0 / (1.0 + math.exp(beta * lead)) / len(sequences)
        gradients[0].append([scaled(slope * share[0], log_prob_gradient(token)) for token in answer])
        gradients[1].append([scaled(-slope * share[1], log_prob_gradient(token)) for token in alternative])
    return value, *gradients


# --- activations ---


def squared_distance(rows: list[list[list[float]]], targets: list[list[list[float]]], *, by_sequence: bool) -> tuple[float, Gradient]:
    """Average over tokens of mean_d (a_d - c_d)^2, with gradient 2 (a_d - c_d) / D; one list per row, token and dimension."""
    value = 0.0
    gradient: Gradient = []
    share_of = shares([len(row) for row in rows], by_sequence=by_sequence)
    for row, target_row, share in zip(rows, targets, share_of, strict=True):
        tokens = []
        for activation, target in zip(row, target_row, strict=True):
            factor = share / len(activation)
            for a, c in zip(activation, target, strict=True):
                value += factor * (a - c) ** 2
            tokens.append([2 * factor * (a - c) for a, c in zip(activation, target, strict=True)])
        gradient.append(tokens)
    return value, gradient

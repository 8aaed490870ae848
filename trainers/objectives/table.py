"""Every objective by name: its terms, its published weights and what it needs from the loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from trainers.config import ObjectiveConfig, ObjectiveName
from trainers.objectives.grad_ascent import grad_ascent_term
from trainers.objectives.npo import npo_term
from trainers.objectives.retain_ce import retain_ce_term
from trainers.objectives.retain_kl import retain_kl_term
from trainers.objectives.terms import LossTerm, Scored


class Need(StrEnum):
    """What the loop must provide beside the model's own log-probabilities."""

    FORGET_REFERENCE_LOG_PROBS = "forget_reference_log_probs"
    RETAIN_REFERENCE_LOGITS = "retain_reference_logits"


@dataclass(frozen=True)
class Weights:
    """Dimensionless coefficients of an objective's terms."""

    forget: float
    retain_ce: float
    retain_kl: float


@dataclass(frozen=True)
class ObjectiveInfo:
    """An objective's published weights and where they come from."""

    weights: Weights
    uses_npo: bool
    source: str


OBJECTIVES: Mapping[ObjectiveName, ObjectiveInfo] = MappingProxyType(
    {
        ObjectiveName.GRAD_ASCENT: ObjectiveInfo(Weights(1.0, 0.0, 0.0), False, "https://arxiv.org/abs/2401.06121"),
        ObjectiveName.GRAD_DIFF: ObjectiveInfo(Weights(1.0, 1.0, 0.0), False, "https://arxiv.org/abs/2401.06121"),
        ObjectiveName.KL_MIN: ObjectiveInfo(Weights(1.0, 0.0, 1.0), False, "https://arxiv.org/abs/2401.06121"),
        ObjectiveName.NPO: ObjectiveInfo(Weights(1.0, 0.0, 0.0), True, "https://arxiv.org/abs/2404.05868"),
        # The stronger-forgetting run of ZJUKLAB; the public code multiplies "gd" with KL and "gk" with cross-entropy.
        ObjectiveName.NPO_CE_KL: ObjectiveInfo(Weights(0.4, 0.2, 0.4), True, "https://arxiv.org/abs/2503.21088"),
    }
)


def resolve_weights(config: ObjectiveConfig) -> Weights:
    """The configured weights, with the objective's published ones where nothing is configured."""
    default = OBJECTIVES[config.name].weights

    def pick(value: float | None, fallback: float) -> float:
        return fallback if value is None else value

    return Weights(
        forget=pick(config.forget_weight, default.forget),
        retain_ce=pick(config.retain_ce_weight, default.retain_ce),
        retain_kl=pick(config.retain_kl_weight, default.retain_kl),
    )


def needs(config: ObjectiveConfig) -> frozenset[Need]:
    """What the objective needs beside the model's own log-probabilities."""
    found = set()
    if OBJECTIVES[config.name].uses_npo:
        found.add(Need.FORGET_REFERENCE_LOG_PROBS)
    if resolve_weights(config).retain_kl > 0:
        found.add(Need.RETAIN_REFERENCE_LOGITS)
    return frozenset(found)


def objective_terms(config: ObjectiveConfig, *, forget: Scored, retain: Scored) -> tuple[LossTerm, ...]:
    """The terms of one micro-batch, before they are divided by the counts of the whole step.

    A side with weight zero is left out, so that it costs nothing; the forget term is always there.
    """
    weights = resolve_weights(config)
    if OBJECTIVES[config.name].uses_npo:
        terms = [npo_term(forget=forget, beta=config.beta, reduction=config.reduction, weight=weights.forget)]
    else:
        terms = [grad_ascent_term(forget=forget, weight=weights.forget)]
    if weights.retain_ce > 0:
        terms.append(retain_ce_term(retain=retain, weight=weights.retain_ce))
    if weights.retain_kl > 0:
        terms.append(retain_kl_term(retain=retain, weight=weights.retain_kl))
    return tuple(terms)

"""Every objective by name: its terms, its published settings and what it needs from the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from trainers.config import ObjectiveConfig, ObjectiveName
from trainers.objectives.ce_u import ce_u_term
from trainers.objectives.dpo import dpo_term
from trainers.objectives.forget_ce import forget_ce_term
from trainers.objectives.grad_ascent import grad_ascent_term
from trainers.objectives.inputs import required
from trainers.objectives.npo import npo_term
from trainers.objectives.retain_ce import retain_ce_term
from trainers.objectives.retain_kl import retain_kl_term
from trainers.objectives.rmu import activation_term
from trainers.objectives.satimp import satimp_term
from trainers.objectives.simnpo import simnpo_term
from trainers.objectives.terms import LossTerm, Scored, Side
from trainers.objectives.undial import undial_term
from trainers.objectives.wga import wga_term


class Need(StrEnum):
    """What the loop must provide beside the model's own log-probabilities."""

    FORGET_REFERENCE_LOG_PROBS = "forget_reference_log_probs"
    """Log-probabilities of the forget answers, and of the alternative ones, under the reference."""
    FORGET_DISTRIBUTIONS = "forget_distributions"
    """The reference's next-token distributions at the scored forget tokens."""
    RETAIN_DISTRIBUTIONS = "retain_distributions"
    """The reference's next-token distributions at the retain tokens of ``kl_scope``."""
    MEAN_LOGITS = "mean_logits"
    """The model's logits averaged under its own distribution, at the scored forget tokens."""
    ALTERNATIVE_ANSWERS = "alternative_answers"
    """Other answers to the forget prompts."""
    ACTIVATIONS = "activations"
    """Outputs of the steered layer on both sets, and their targets."""
    SIDE_GRADIENTS = "side_gradients"
    """The gradients of the forget and of the retain terms apart, combined by ``normalised_coefficients``."""


@dataclass(frozen=True)
class Weights:
    """Dimensionless coefficients of an objective's terms."""

    forget: float
    retain_ce: float = 0.0
    retain_kl: float = 0.0
    retain_activation: float = 0.0


ForgetTerm = Callable[[ObjectiveConfig, Scored, float], LossTerm]
"""The forget term of a resolved configuration, on one micro-batch, with a weight."""

_WEIGHTS = frozenset({"forget_weight", "retain_ce_weight", "retain_kl_weight"})


@dataclass(frozen=True)
class ObjectiveInfo:
    """What an objective is made of, as published.

    Args:
        forget_term: its forget term.
        weights: of its terms.
        reads: the settings that change it, beside those that come with a retain term.
        source: URL of the paper.
        forget_needs: what its forget term needs from the loop.
        beta: default of ``ObjectiveConfig.beta``; None if the objective has none. Likewise the others.
    """

    forget_term: ForgetTerm
    weights: Weights
    reads: frozenset[str]
    source: str
    forget_needs: frozenset[Need] = frozenset()
    beta: float | None = None
    beta_2: float | None = None
    steering: float | None = None
    negation_scale: float | None = None


def _grad_ascent(config: ObjectiveConfig, forget: Scored, weight: float) -> LossTerm:
    return grad_ascent_term(forget=forget, weight=weight, average=config.average)


def _npo(config: ObjectiveConfig, forget: Scored, weight: float) -> LossTerm:
    return npo_term(forget=forget, beta=_resolved(config.beta), reduction=config.reduction, weight=weight)


def _simnpo(config: ObjectiveConfig, forget: Scored, weight: float) -> LossTerm:
    return simnpo_term(forget=forget, beta=_resolved(config.beta), margin=config.margin, weight=weight)


def _dpo(config: ObjectiveConfig, forget: Scored, weight: float) -> LossTerm:
    return dpo_term(forget=forget, beta=_resolved(config.beta), reduction=config.reduction, weight=weight)


def _rmu(config: ObjectiveConfig, forget: Scored, weight: float) -> LossTerm:
    activations = required(forget.activations, term="forget_rmu", field="forget.activations")
    return activation_term(activations=activations, num_rows=forget.num_rows, side=Side.FORGET, weight=weight, average=config.average)


def _undial(config: ObjectiveConfig, forget: Scored, weight: float) -> LossTerm:
    return undial_term(forget=forget, beta=_resolved(config.beta), weight=weight, average=config.average)


def _wga(config: ObjectiveConfig, forget: Scored, weight: float) -> LossTerm:
    return wga_term(forget=forget, beta=_resolved(config.beta), weight=weight, average=config.average)


def _satimp(config: ObjectiveConfig, forget: Scored, weight: float) -> LossTerm:
    return satimp_term(forget=forget, beta_1=_resolved(config.beta), beta_2=_resolved(config.beta_2), weight=weight, average=config.average)


def _ce_u(config: ObjectiveConfig, forget: Scored, weight: float) -> LossTerm:
    return ce_u_term(forget=forget, skip_first_token=config.skip_first_token, weight=weight, average=config.average)


def _forget_ce(config: ObjectiveConfig, forget: Scored, weight: float) -> LossTerm:
    return forget_ce_term(forget=forget, weight=weight, average=config.average)


def _resolved(value: float | None) -> float:
    assert value is not None, "the configuration has been resolved, so the published default is filled in"
    return value


_objectives: dict[ObjectiveName, ObjectiveInfo] = {
    ObjectiveName.GRAD_ASCENT: ObjectiveInfo(
        _grad_ascent, weights=Weights(forget=1.0), reads=_WEIGHTS | {"average"}, source="https://arxiv.org/abs/2401.06121"
    ),
    ObjectiveName.GRAD_DIFF: ObjectiveInfo(
        _grad_ascent,
        weights=Weights(forget=1.0, retain_ce=1.0),
        reads=_WEIGHTS | {"average"},
        source="https://arxiv.org/abs/2401.06121",
    ),
    ObjectiveName.KL_MIN: ObjectiveInfo(
        _grad_ascent,
        weights=Weights(forget=1.0, retain_kl=1.0),
        reads=_WEIGHTS | {"average"},
        source="https://arxiv.org/abs/2401.06121",
    ),
    ObjectiveName.NPO: ObjectiveInfo(
        _npo,
        weights=Weights(forget=1.0),
        reads=_WEIGHTS | {"beta", "reduction"},
        source="https://arxiv.org/abs/2404.05868",
        forget_needs=frozenset({Need.FORGET_REFERENCE_LOG_PROBS}),
        beta=0.1,
    ),
    # The stronger-forgetting run of ZJUKLAB; the public code multiplies "gd" with KL and "gk" with cross-entropy.
    ObjectiveName.NPO_CE_KL: ObjectiveInfo(
        _npo,
        weights=Weights(forget=0.4, retain_ce=0.2, retain_kl=0.4),
        reads=_WEIGHTS | {"beta", "reduction"},
        source="https://arxiv.org/abs/2503.21088",
        forget_needs=frozenset({Need.FORGET_REFERENCE_LOG_PROBS}),
        beta=0.1,
    ),
    # TOFU forget05.
    ObjectiveName.SIMNPO: ObjectiveInfo(
        _simnpo,
        weights=Weights(forget=0.1375, retain_ce=1.0),
        reads=_WEIGHTS | {"beta", "margin"},
        source="https://arxiv.org/abs/2410.07163",
        beta=2.5,
    ),
    ObjectiveName.DPO: ObjectiveInfo(
        _dpo,
        weights=Weights(forget=1.0),
        reads=_WEIGHTS | {"beta", "reduction"},
        source="https://arxiv.org/abs/2305.18290",
        forget_needs=frozenset({Need.FORGET_REFERENCE_LOG_PROBS, Need.ALTERNATIVE_ANSWERS}),
        beta=0.1,
    ),
    # The retain weight is open-unlearning's.
    ObjectiveName.IDK_DPO: ObjectiveInfo(
        _dpo,
        weights=Weights(forget=1.0, retain_ce=1.0),
        reads=_WEIGHTS | {"beta", "reduction"},
        source="https://arxiv.org/abs/2401.06121",
        forget_needs=frozenset({Need.FORGET_REFERENCE_LOG_PROBS, Need.ALTERNATIVE_ANSWERS}),
        beta=0.1,
    ),
    # Zephyr-7B; the code's defaults are steering 20 and retain weight 100.
    ObjectiveName.RMU: ObjectiveInfo(
        _rmu,
        weights=Weights(forget=1.0, retain_activation=1200.0),
        reads=_WEIGHTS | {"retain_activation_weight", "layer", "steering", "average"},
        source="https://arxiv.org/abs/2403.03218",
        forget_needs=frozenset({Need.ACTIVATIONS}),
        steering=6.5,
    ),
    ObjectiveName.ADAPTIVE_RMU: ObjectiveInfo(
        _rmu,
        weights=Weights(forget=1.0, retain_activation=1200.0),
        reads=_WEIGHTS | {"retain_activation_weight", "layer", "steering", "average"},
        source="https://arxiv.org/abs/2408.06223",
        forget_needs=frozenset({Need.ACTIVATIONS}),
        steering=5.0,
    ),
    ObjectiveName.UNDIAL: ObjectiveInfo(
        _undial,
        weights=Weights(forget=1.0),
        reads=_WEIGHTS | {"beta", "average"},
        source="https://arxiv.org/abs/2402.10052",
        forget_needs=frozenset({Need.FORGET_REFERENCE_LOG_PROBS, Need.FORGET_DISTRIBUTIONS}),
        beta=10.0,
    ),
    ObjectiveName.WGA: ObjectiveInfo(
        _wga,
        weights=Weights(forget=1.0, retain_ce=1.0),
        reads=_WEIGHTS | {"beta", "average"},
        source="https://arxiv.org/abs/2502.19301",
        beta=1.0,
    ),
    ObjectiveName.SATIMP: ObjectiveInfo(
        _satimp,
        weights=Weights(forget=1.0, retain_ce=0.1),
        reads=_WEIGHTS | {"beta", "beta_2", "average"},
        source="https://arxiv.org/abs/2505.11953",
        beta=5.0,
        beta_2=1.0,
    ),
    ObjectiveName.CE_U: ObjectiveInfo(
        _ce_u,
        weights=Weights(forget=1.0),
        reads=_WEIGHTS | {"average", "skip_first_token"},
        source="https://arxiv.org/abs/2503.01224",
        forget_needs=frozenset({Need.MEAN_LOGITS}),
    ),
    # The forget gradient is scaled to length 1 whatever its weight.
    ObjectiveName.NG_DIFF: ObjectiveInfo(
        _grad_ascent,
        weights=Weights(forget=1.0, retain_ce=1.0),
        reads=(_WEIGHTS | {"average"}) - {"forget_weight"},
        source="https://arxiv.org/abs/2410.22086",
        forget_needs=frozenset({Need.SIDE_GRADIENTS}),
    ),
    # What is learned is subtracted, so a retain term would do harm.
    ObjectiveName.TASK_VECTOR_NEGATION: ObjectiveInfo(
        _forget_ce,
        weights=Weights(forget=1.0),
        reads=frozenset({"forget_weight", "average", "negation_scale"}),
        source="https://arxiv.org/abs/2212.04089",
        negation_scale=1.0,
    ),
}

OBJECTIVES: Mapping[ObjectiveName, ObjectiveInfo] = MappingProxyType(_objectives)
"""The built-in objectives, and those that plugins have added in this process."""


def add_objective(name: str, info: ObjectiveInfo) -> None:
    """Make an objective known under a name that ``trainers.plugins.register`` has taken."""
    _objectives[ObjectiveName.add(name)] = info


def remove_objective(name: str) -> None:
    """Forget an added objective."""
    _objectives.pop(ObjectiveName(name), None)
    ObjectiveName.remove(name)


def resolve(config: ObjectiveConfig) -> ObjectiveConfig:
    """The configuration with the published default wherever ``beta``, ``beta_2``, ``steering`` or ``negation_scale`` is null.

    A setting that the objective does not have stays null.
    """
    info = OBJECTIVES[config.name]
    defaults = {"beta": info.beta, "beta_2": info.beta_2, "steering": info.steering, "negation_scale": info.negation_scale}
    missing = {name: value for name, value in defaults.items() if value is not None and getattr(config, name) is None}
    return config.model_copy(update=missing)


def resolve_weights(config: ObjectiveConfig) -> Weights:
    """The configured weights, with the published ones where nothing is configured or where the objective reads no such setting."""
    info = OBJECTIVES[config.name]

    def pick(name: str) -> float:
        setting = f"{name}_weight"
        configured = getattr(config, setting) if setting in info.reads else None
        return getattr(info.weights, name) if configured is None else configured

    return Weights(
        forget=pick("forget"),
        retain_ce=pick("retain_ce"),
        retain_kl=pick("retain_kl"),
        retain_activation=pick("retain_activation"),
    )


def unused_settings(config: ObjectiveConfig) -> tuple[str, ...]:
    """Settings that were given another value than their default but change nothing under this objective, in alphabetical order."""
    weights = resolve_weights(config)
    reads = {"name", *OBJECTIVES[config.name].reads}
    if weights.retain_kl > 0:
        reads.add("kl_scope")
    if max(weights.retain_ce, weights.retain_kl, weights.retain_activation) > 0:
        reads.add("average")
    fields = ObjectiveConfig.model_fields
    return tuple(sorted(name for name in config.model_fields_set - reads if getattr(config, name) != fields[name].default))


def needs(config: ObjectiveConfig) -> frozenset[Need]:
    """What the objective needs beside the model's own log-probabilities."""
    weights = resolve_weights(config)
    found = set(OBJECTIVES[config.name].forget_needs)
    if weights.retain_kl > 0:
        found.add(Need.RETAIN_DISTRIBUTIONS)
    if weights.retain_activation > 0:
        found.add(Need.ACTIVATIONS)
    return frozenset(found)


def objective_terms(config: ObjectiveConfig, *, forget: Scored, retain: Scored, weights: Weights | None = None) -> tuple[LossTerm, ...]:
    """The terms of one micro-batch, before they are divided by the counts of the whole step.

    A retain term with weight zero is left out, so that it costs nothing; the forget term is always there.

    Args:
        config: what is null takes its published default.
        forget: forget rows, with what ``needs`` names.
        retain: retain rows, likewise.
        weights: in place of the configured ones, for instance of a schedule that adapts them.

    Raises:
        ValueError: if an input that a term needs is missing or mis-shaped.
    """
    config = resolve(config)
    weights = weights or resolve_weights(config)
    terms = [OBJECTIVES[config.name].forget_term(config, forget, weights.forget)]
    if weights.retain_ce > 0:
        terms.append(retain_ce_term(retain=retain, weight=weights.retain_ce, average=config.average))
    if weights.retain_kl > 0:
        terms.append(retain_kl_term(retain=retain, weight=weights.retain_kl, average=config.average))
    if weights.retain_activation > 0:
        activations = required(retain.activations, term="retain_activation", field="retain.activations")
        terms.append(
            activation_term(
                activations=activations,
                num_rows=retain.num_rows,
                side=Side.RETAIN,
                weight=weights.retain_activation,
                average=config.average,
            )
        )
    return tuple(terms)

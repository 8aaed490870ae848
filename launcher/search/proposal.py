"""What Optuna would try next: a pure function of what was tried before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from launcher.search.surrogates import Surrogates
from launcher.search_space import Choice, Domain, SearchSpace

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import TPESampler
    from optuna.trial import FrozenTrial


@dataclass(frozen=True)
class Tried:
    """A trial that a proposal learns from.

    Args:
        overrides: its searched settings by path.
        result: its measures; ``pruned`` if it was stopped because others were better, or diverged; ``running`` if it still may end well.
    """

    overrides: Mapping[str, Any]
    result: Surrogates | Literal["pruned", "running"]


def propose(history: Sequence[Tried], *, space: SearchSpace, seed: int) -> dict[str, Any]:
    """The settings to try next, by the multi-objective tree-structured Parzen estimator.

    A sweep has tens of trials. NSGA-II draws at random until its first population (50 by default) is full; TPE models both
    objectives' best trials from the first few on, and MOTPE beat NSGA-II at 100 to 250 evaluations in its paper.
    Running trials count as bad ones, so that trials that run side by side differ; pruned ones rank behind all complete ones:
    their early values would look retentive, because they have trained for less.

    Args:
        history: in the order of the trials. Those that lie outside the space are left out.
        space: what is searched.
        seed: of this proposal alone, so that it does not depend on what this process proposed before.

    Source: Ozaki et al. 2022, https://doi.org/10.1613/jair.1.13188 ; https://optuna.readthedocs.io/en/stable/reference/samplers/
    """
    import optuna

    study = optuna.create_study(directions=["maximize", "maximize"], sampler=_sampler(seed))
    for tried in history:
        params = to_params(tried.overrides, space=space)
        if params is not None:
            study.add_trial(to_trial(tried, params=params, space=space))
    asked = study.ask(fixed_distributions=distributions(space))
    return from_params(asked.params, space=space)


def proposal_seed(seed: int, *, index: int, attempt: int) -> int:
    """The seed of one proposal, 32 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed}/proposal/{index}/{attempt}".encode()).digest()[:4], "big")


def to_trial(tried: Tried, *, params: Mapping[str, Any], space: SearchSpace, attributes: Mapping[str, Any] | None = None) -> FrozenTrial:
    """A trial in Optuna's form; it has no settings where ``params`` is empty."""
    from optuna.trial import TrialState, create_trial

    result = tried.result
    state = TrialState.COMPLETE if isinstance(result, Surrogates) else TrialState[result.upper()]
    return create_trial(
        state=state,
        values=[result.forgetting, result.retention] if isinstance(result, Surrogates) else None,
        params=dict(params),
        distributions=distributions(space) if params else {},
        user_attrs=dict(attributes or {}),
    )


def distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    """The space in Optuna's form; a choice is one of its values' JSON texts, because lists and sections are allowed, too."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, BaseDistribution] = {}
    for path, domain in space.domains.items():
        if isinstance(domain, Choice):
            found[path] = CategoricalDistribution(tuple(map(_label, domain.values)))
        elif domain.distribution == "int_uniform":
            found[path] = IntDistribution(int(domain.min), int(domain.max))
        else:
            found[path] = FloatDistribution(domain.min, domain.max, log=domain.distribution == "log_uniform")
    return found


def to_params(overrides: Mapping[str, Any], *, space: SearchSpace) -> dict[str, Any] | None:
    """A trial's searched settings in Optuna's form; None if one of them lies outside the space, as a start point's may."""
    params: dict[str, Any] = {}
    for path, domain in space.domains.items():
        if path not in overrides:
            return None
        value = overrides[path]
        if isinstance(domain, Choice):
            value = _label(value)
            inside = value in map(_label, domain.values)
        else:
            inside = isinstance(value, (int, float)) and domain.min <= value <= domain.max
        if not inside:
            return None
        params[path] = value
    return params


def from_params(params: Mapping[str, Any], *, space: SearchSpace) -> dict[str, Any]:
    """Searched settings as a trial's overrides."""
    return {path: _value(params[path], domain=domain) for path, domain in space.domains.items()}


def _value(param: Any, *, domain: Domain) -> Any:
    if isinstance(domain, Choice):
        return json.loads(param)
    return int(param) if domain.distribution == "int_uniform" else domain.rounded(param)


def _label(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _sampler(seed: int) -> TPESampler:
    import warnings

    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        # Before Optuna 5 two of these settings warn that they are experimental.
        warnings.simplefilter("ignore")
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=1, multivariate=True, constant_liar=True)

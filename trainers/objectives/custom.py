"""Objectives that a user's plugin adds: registered by a decorator, tried out once on made-up rows before any model is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from trainers.config import Average, ObjectiveConfig, Reduction
from trainers.errors import InputError
from trainers.objectives.table import OBJECTIVES, Need, ObjectiveInfo, Weights, add_objective, remove_objective
from trainers.objectives.terms import Activations, Distributions, LossTerm, Scored, Side, Unit
from trainers.plugins import register

SETTINGS = ("beta", "beta_2", "margin", "reduction", "average", "skip_first_token")
"""Settings of ``train.objective`` that a forget term may take by name."""
_GIVEN = ("forget", "weight")
_WEIGHTS = frozenset({"forget_weight", "retain_ce_weight", "retain_kl_weight"})

Term = TypeVar("Term", bound=Callable[..., LossTerm])


def register_objective(
    name: str,
    *,
    source: str = "",
    beta: float | None = None,
    beta_2: float | None = None,
    steering: float | None = None,
    forget_weight: float = 1.0,
    retain_ce_weight: float = 0.0,
    retain_kl_weight: float = 0.0,
    needs: Collection[Need] = (),
) -> Callable[[Term], Term]:
    """Decorate the forget term of a new objective: a function with the keyword arguments ``forget``, ``weight`` and the settings it reads.

    The function gets the scored forget rows of one micro-batch (``trainers.objectives.terms.Scored``) and returns a
    ``LossTerm`` whose total is a sum over tokens or sequences. Retain terms, division by the counts of the whole step, ranks and
    micro-batches are the loop's affair. The settings it may take are ``beta``, ``beta_2``, ``margin``, ``reduction``,
    ``average`` and ``skip_first_token``.

    Args:
        name: value of ``train.objective.name``.
        source: URL of the paper, if there is one.
        beta: default of ``train.objective.beta``; required if the function takes ``beta``. Likewise ``beta_2``.
        steering: default of ``train.objective.steering``; required with ``Need.ACTIVATIONS``.
        forget_weight: default weight of the forget term.
        retain_ce_weight: default weight of cross-entropy on retain answers.
        retain_kl_weight: default weight of KL(reference || model) on the retain set.
        needs: what the term reads beside the model's own log-probabilities (``trainers.objectives.table.Need``).

    Raises:
        InputError: for a name that is taken, a signature or a default that does not fit, or a term that is no sum over rows.
    """

    def decorate(function: Term) -> Term:
        settings = _settings_of(function, name=name)
        defaults = {"beta": beta, "beta_2": beta_2}
        for setting, default in defaults.items():
            if (setting in settings) != (default is not None):
                told = "takes it, but it has no default" if setting in settings else f"does not take it, but its default is {default}"
                raise InputError(
                    f"objective {name}, setting {setting}: the function {told}",
                    fix=f"write @register_objective({name!r}, {setting}=1.0) with a function that takes {setting}, or leave both out",
                )
        wanted = frozenset(needs)
        if (Need.ACTIVATIONS in wanted) != (steering is not None):
            raise InputError(
                f"objective {name}: Need.ACTIVATIONS and steering belong together",
                fix="give both, or none of them",
            )
        if Need.SIDE_GRADIENTS in wanted:
            raise InputError(
                f"objective {name}: Need.SIDE_GRADIENTS is not open to plugins",
                why="it changes how a step combines gradients, which no term says",
                fix="leave it out; ng_diff is the objective that combines them",
            )

        def term(config: ObjectiveConfig, forget: Scored, weight: float) -> LossTerm:
            made = function(forget=forget, weight=weight, **{setting: getattr(config, setting) for setting in settings})
            return _checked(made, name=name)

        info = ObjectiveInfo(
            term,
            weights=Weights(forget=forget_weight, retain_ce=retain_ce_weight, retain_kl=retain_kl_weight),
            reads=_WEIGHTS | set(settings) | ({"steering", "layer"} if steering is not None else set()),
            source=source,
            forget_needs=wanted,
            beta=beta,
            beta_2=beta_2,
            steering=steering,
        )
        register("objective", name, taken=[known.value for known in OBJECTIVES], undo=lambda: remove_objective(name))
        add_objective(name, info)
        try_out(info, name=name)
        return function

    return decorate


def _settings_of(function: Callable[..., Any], *, name: str) -> tuple[str, ...]:
    if not callable(function):
        raise InputError(f"objective {name}: what is registered is no function", fix="put @register_objective(...) above a function")
    parameters = inspect.signature(function).parameters
    known = (*_GIVEN, *SETTINGS)
    foreign = [
        one.name for one in parameters.values() if one.name not in known or one.kind not in (one.KEYWORD_ONLY, one.POSITIONAL_OR_KEYWORD)
    ]
    missing = [one for one in _GIVEN if one not in parameters]
    if foreign or missing:
        told = f"takes {', '.join(foreign)}" if foreign else f"does not take {', '.join(missing)}"
        raise InputError(
            f"objective {name}: the function {getattr(function, '__name__', '')} {told}",
            why=f"it is called with forget and weight, and with those of {', '.join(SETTINGS)} that it names",
            fix="for instance def my_term(*, forget, weight, beta)",
        )
    return tuple(one for one in SETTINGS if one in parameters)


def _checked(made: Any, *, name: str) -> LossTerm:
    """What a term returned, if the step can use it."""
    if not isinstance(made, LossTerm):
        problem = f"returned {type(made).__name__}, not a LossTerm"
    elif made.side is not Side.FORGET:
        problem = f"returned a term of the {made.side} side"
    elif not isinstance(made.total, Tensor) or made.total.ndim != 0:
        problem = "returned a total that is no scalar tensor"
    elif not isinstance(made.unit, Unit):
        problem = f"returned the unit {made.unit!r}"
    else:
        return made
    raise InputError(
        f"the forget term of objective {name} {problem}",
        fix="return LossTerm(name=..., total=SUM, unit=Unit.TOKEN or Unit.SEQUENCE, side=Side.FORGET, weight=weight)",
    )


# ---- one call on made-up rows


def try_out(info: ObjectiveInfo, *, name: str) -> None:
    """Call a term on a few rows at once, one by one, and on none.

    A step adds the totals of its micro-batches, so a total must be a sum over rows: a mean would depend on how a step is split.

    Raises:
        InputError: if it is not, or if no gradient reaches the model.
    """
    config = ObjectiveConfig(name=name, beta=info.beta, beta_2=info.beta_2, steering=info.steering)  # type: ignore[arg-type]
    for reduction in Reduction if "reduction" in info.reads else (config.reduction,):
        for average in Average if "average" in info.reads else (config.average,):
            _try_out(info, config=config.model_copy(update={"reduction": reduction, "average": average}), name=name)


def _try_out(info: ObjectiveInfo, *, config: ObjectiveConfig, name: str) -> None:
    lengths = (3, 1, 4)
    total = info.forget_term(config, made_up_rows(lengths), 1.0).total
    single = [info.forget_term(config, made_up_rows(lengths, only=index), 1.0).total for index in range(len(lengths))]
    none = float(info.forget_term(config, made_up_rows(()), 1.0).total.detach())
    together, apart = float(total.detach()), float(sum(one.detach() for one in single))
    if not total.requires_grad:
        raise InputError(
            f"no gradient of the forget term of objective {name} reaches the model",
            why="it reads nothing that is differentiable, or detaches it",
            fix="let the total depend on forget.token_log_probs_N",
        )
    if not abs(together - apart) <= 1e-9 * max(1.0, abs(apart)):
        raise InputError(
            f"the forget term of objective {name} is no sum over rows: {together:g} for three rows, {apart:g} for the same one by one",
            why="a step is split into micro-batches and over ranks, whose totals are added and divided by the step's count",
            fix="return the sum (not the mean) over tokens or sequences, with the unit that it is to be divided by",
        )
    if none != 0.0:
        raise InputError(
            f"the forget term of objective {name} is {none:g} for a micro-batch without rows",
            why="a rank may have none, and takes part all the same",
            fix="return a sum, which is 0 there",
        )


def made_up_rows(lengths: tuple[int, ...], *, only: int | None = None) -> Scored:
    """Scored rows of the given lengths with all that a term may need, in float64; a row has the same numbers alone as among others."""
    generator = torch.Generator().manual_seed(0)
    # Drawn for all rows, so that a row is the same wherever it stands.
    draws = [torch.rand((length, 8), generator=generator, dtype=torch.float64) for length in lengths]
    chosen = list(draws) if only is None else [draws[only]]
    values_N8 = torch.cat(chosen) if chosen else torch.zeros((0, 8), dtype=torch.float64)
    row_N = torch.cat([torch.full((len(one),), index) for index, one in enumerate(chosen)]) if chosen else torch.zeros(0, dtype=torch.int64)

    def column(index: int, *, differentiable: bool) -> Tensor:
        return (-2.0 * values_N8[:, index]).requires_grad_(differentiable)

    def scored() -> Scored:
        normaliser_N = column(1, differentiable=True)
        return Scored(
            token_log_probs_N=column(0, differentiable=True),
            row_N=row_N,
            num_rows=len(chosen),
            log_normaliser_N=normaliser_N,
            mean_logit_N=column(2, differentiable=True),
            reference_token_log_probs_N=column(3, differentiable=False),
            distributions=Distributions(normaliser_N, column(4, differentiable=True), column(5, differentiable=False), row_N),
            activations=Activations(values_N8[:, :4].clone().requires_grad_(), values_N8[:, 4:], row_N),
        )

    return replace(scored(), alternative=scored())

"""Merge methods that a user's plugin adds: registered by a decorator, tried out once on two made-up updates."""

from __future__ import annotations

import inspect
import string
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from merging.methods.table import METHODS, PARAMETERS, Method, Need, add_method, remove_method
from trainers.errors import InputError
from trainers.plugins import origin_now, register

_UPDATES = ("updates", "weights")
_EXTRAS = {need.value: need for need in (Need.TOTAL_WEIGHT, Need.GENERATORS, Need.FACTORS)}
_IN_FORMULA = ("density", "epsilon", "gamma", "seed", "election", "rescaled")

Merge = TypeVar("Merge", bound=Callable[..., Any])


def register_method(
    name: str,
    *,
    formula: str,
    source: str = "",
    negative_weights: bool = False,
    num_trials: int | None = None,
    absent_as_zero: bool = False,
) -> Callable[[Merge], Merge]:
    """Decorate a new merge method: a function from the trials' updates of one tensor to the merged update.

    It takes the keyword arguments ``updates`` (float32 tensors of one shape, one per trial) and ``weights`` (one number per update), and by
    name any setting of a merge that it reads (``density``, ``epsilon``, ``gamma``, ``rescale``, ``seed``, ``elect``, ``divisor``,
    ``zero_sum``), ``total_weight`` (of all trials), ``generators`` (a seeded random generator per update) or ``factors`` (the low-rank
    factors of each update, or None). It returns a tensor like an update, or a ``merging.methods.combination.Combination``. ``scale``, the
    base and rounding are the framework's affair.

    Args:
        name: value of ``merge.method`` and ``--method``.
        formula: of the merged update m, for records; settings in braces, such as ``{density:g}``.
        source: URL of the paper, if there is one.
        negative_weights: whether a weight below zero is defined.
        num_trials: how many trials it merges; None is any number.
        absent_as_zero: whether it gets a zero update for each trial that leaves a tensor as it is; else such trials are left out.

    Raises:
        InputError: for a name that is taken, a signature or formula that does not fit, or an update of another shape.
    """

    def decorate(function: Merge) -> Merge:
        reads, needs = _parameters_of(function, name=name)
        _check_formula(formula, name=name)
        plugin = origin_now()
        method = Method(
            name=name,
            formula=formula,
            reads=reads,
            merge=f"{function.__module__}:{function.__qualname__}",
            source=source,
            needs=needs | ({Need.ABSENT} if absent_as_zero else set()),
            negative_weights=negative_weights,
            num_trials=num_trials,
            plugin={"file": plugin.file.name, "sha256": plugin.sha256} if plugin else {},
        )
        register("merge method", name, taken=tuple(METHODS), undo=lambda: remove_method(name))
        add_method(method)
        function.__globals__[function.__name__] = function  # found by its name while its module is still being run
        _try_out(name, num_updates=num_trials or 2)
        return function

    return decorate


def _parameters_of(function: Callable[..., Any], *, name: str) -> tuple[tuple[str, ...], frozenset[Need]]:
    if not inspect.isfunction(function) or function.__qualname__ != function.__name__:
        raise InputError(
            f"merge method {name}: what is registered is no function of a module", fix="put @register_method(...) above a function"
        )
    parameters = inspect.signature(function).parameters
    allowed = (*_UPDATES, *(one for one in PARAMETERS if one != "convention"), *_EXTRAS)
    foreign = [
        one.name for one in parameters.values() if one.name not in allowed or one.kind not in (one.KEYWORD_ONLY, one.POSITIONAL_OR_KEYWORD)
    ]
    missing = [one for one in _UPDATES if one not in parameters]
    if foreign or missing:
        told = f"takes {', '.join(foreign)}" if foreign else f"does not take {', '.join(missing)}"
        raise InputError(
            f"merge method {name}: the function {function.__name__} {told}",
            why=f"it is called with updates and weights, and with those of {', '.join(allowed[2:])} that it names",
            fix="for instance def my_merge(*, updates, weights, density)",
        )
    needs = frozenset(need for extra, need in _EXTRAS.items() if extra in parameters)
    drawn = ("seed",) if Need.GENERATORS in needs else ()
    return tuple(dict.fromkeys([one for one in PARAMETERS if one in parameters] + list(drawn))), needs


def _check_formula(formula: str, *, name: str) -> None:
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(formula) if field is not None]
    except ValueError as error:
        raise InputError(f"merge method {name}: the formula cannot be read: {error}", fix="write braces of your own twice: {{ }}") from None
    foreign = [field for field in fields if field not in _IN_FORMULA]
    if foreign:
        raise InputError(
            f"merge method {name}: the formula has {{{foreign[0]}}}",
            why=f"what is in braces is replaced by its value; known are {', '.join(_IN_FORMULA)}",
            fix="write braces of your own twice: {{ }}",
        )


def _try_out(name: str, *, num_updates: int) -> None:
    import torch

    from merging.config import MergeConfig
    from merging.methods.run import run_method

    generator = torch.Generator().manual_seed(0)
    updates: Sequence[Tensor] = [torch.randn((2, 3), generator=generator) for _ in range(num_updates)]
    config = MergeConfig.model_validate({"method": name})
    made = run_method(
        updates=updates,
        weights=[1.0] * num_updates,
        config=config,
        total_weight=float(num_updates),
        generators=[torch.Generator().manual_seed(index) for index in range(num_updates)],
        factors=[None] * num_updates,
    )
    config.formula()
    if not bool(torch.isfinite(made.update).all()):
        raise InputError(f"the merge method {name} made numbers that are not finite of updates that are", fix="look for a division by zero")

"""Runs a method of the table on the updates of one tensor."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Generator, Tensor

from merging.config import MergeConfig
from merging.methods.combination import Combination
from merging.methods.low_rank import LowRank
from merging.methods.table import METHODS, PARAMETERS, Need, load
from trainers.errors import InputError


def run_method(
    *,
    updates: Sequence[Tensor],
    weights: Sequence[float],
    config: MergeConfig,
    total_weight: float | None = None,
    generators: Sequence[Generator] = (),
    factors: Sequence[LowRank | None] = (),
) -> Combination:
    """Prepare and merge, as the method's table entry says. Ties over a whole model is ``merging.combine``'s affair.

    Args:
        updates: float32 task vectors of one shape.
        weights: one per update.
        config: method and settings.
        total_weight: of all trials, if some were left out because they are zero here; null is the sum of ``weights``.
        generators: one per update, for methods that draw.
        factors: one or null per update, for methods that look at factors.

    Raises:
        InputError: if the method of a plugin returns something else than an update of that shape.
    """
    method = METHODS[config.method]
    given: dict[Need, Any] = {Need.TOTAL_WEIGHT: total_weight, Need.GENERATORS: generators, Need.FACTORS: factors}
    extra = {need.value: value for need, value in given.items() if need in method.needs}
    prepared = list(updates)
    if method.prepare:
        prepare = load(method.prepare)
        prepared = prepare(updates=prepared, **_arguments(prepare, config, extra))
    merge = load(method.merge)
    merged = merge(updates=prepared, weights=weights, **_arguments(merge, config, extra))
    made = merged if isinstance(merged, Combination) else Combination(update=merged, entered=tuple(prepared))
    if method.plugin is not None:
        _check(made.update, like=updates[0], name=method.name)
    return made


def _check(update: Any, *, like: Tensor, name: str) -> None:
    """Refuse what a user's function should not have returned."""
    if isinstance(update, Tensor) and update.shape == like.shape and update.dtype == like.dtype:
        return
    found = f"{update.dtype} of shape {tuple(update.shape)}" if isinstance(update, Tensor) else type(update).__name__
    raise InputError(
        f"the merge method {name} returned {found} for updates of {like.dtype} and shape {tuple(like.shape)}",
        fix="return one tensor like each of the updates",
    )


def _arguments(function: Callable[..., Any], config: MergeConfig, extra: dict[str, Any]) -> dict[str, Any]:
    """The settings and extras that a function takes by name."""
    names = inspect.signature(function).parameters
    settings = {name: getattr(config, name) for name in PARAMETERS if name in names and config.reads(name)}
    return settings | {name: value for name, value in extra.items() if name in names}

"""Every merge method by name: its formula, the settings that it reads, and what it needs of the trials.

Functions are named, not imported, so that configurations and the command line can list the methods without loading torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module
from types import MappingProxyType
from typing import Any

from trainers.names import OpenNames


class MethodName(OpenNames):
    """How task vectors become one. Plugins add names (``merging.methods.custom``)."""

    TIES = "ties"
    LINEAR = "linear"
    TASK_ARITHMETIC = "task_arithmetic"
    MAGNITUDE_PRUNE = "magnitude_prune"
    DARE_LINEAR = "dare_linear"
    DARE_TIES = "dare_ties"
    DELLA = "della"
    BREADCRUMBS = "breadcrumbs"
    SLERP = "slerp"
    KNOTS = "knots"
    UNANIMOUS = "unanimous"
    SEED = "seed"


class Need(StrEnum):
    """What a method must be given beside the updates, their weights and the settings that it reads."""

    ABSENT = "absent"
    """A zero update for each trial that leaves a tensor as it is; other methods are not changed by leaving such trials out."""
    TOTAL_WEIGHT = "total_weight"
    """The sum of all trials' weights."""
    GENERATORS = "generators"
    """A seeded random generator per update."""
    FACTORS = "factors"
    """The factors A and B of each update, where it has them."""


@dataclass(frozen=True)
class Method:
    """How a method is made of functions.

    Args:
        name: value of ``method``.
        formula: of the merged update m, for records; names in braces are settings.
        reads: the settings that change the result, besides ``scale`` and ``weights``.
        merge: the function that takes prepared updates to the merged one.
        source: URL of the paper.
        prepare: the function that sparsifies the updates; empty if they enter as they are.
        needs: what else the two functions take.
        negative_weights: whether a weight below zero is defined.
        num_trials: how many trials it merges; null is any number.
        plugin: file and content hash of the plugin that added it, for records; null if it is built in.
    """

    name: str
    formula: str
    reads: tuple[str, ...]
    merge: str
    source: str
    prepare: str = ""
    needs: frozenset[Need] = frozenset()
    negative_weights: bool = False
    num_trials: int | None = None
    plugin: Mapping[str, str] | None = None


ELECTION = ("elect", "divisor", "zero_sum")
_SUM = "merging.linear:task_arithmetic"
_ELECT = "merging.methods.election:elect_and_average"

_METHODS = (
    Method(
        name="ties",
        formula="{ties}",
        reads=("density", "convention", "trim_scope", "trim_count", "equal_magnitudes", *ELECTION),
        merge="merging.ties:ties",
        source="https://arxiv.org/abs/2306.01708",
    ),
    Method(
        name="linear",
        formula="sum(w_i * t_i) / sum(w_i)",
        reads=(),
        merge="merging.linear:linear",
        source="https://arxiv.org/abs/2203.05482",
        needs=frozenset({Need.TOTAL_WEIGHT}),
    ),
    Method(
        name="task_arithmetic",
        formula="sum(w_i * t_i)",
        reads=(),
        merge=_SUM,
        source="https://arxiv.org/abs/2212.04089",
        negative_weights=True,
    ),
    Method(
        name="magnitude_prune",
        formula="sum(w_i * top(t_i)), top: the {density:g} of each tensor that is largest in magnitude",
        reads=("density",),
        prepare="merging.methods.magnitude_prune:keep_largest",
        merge=_SUM,
        source="https://arxiv.org/abs/1506.02626",
        negative_weights=True,
    ),
    Method(
        name="dare_linear",
        formula="sum(w_i * drop(t_i)), drop: each element kept with probability {density:g}, {rescaled}, seed {seed}",
        reads=("density", "rescale", "seed"),
        prepare="merging.methods.dare:drop_at_random",
        merge=_SUM,
        source="https://arxiv.org/abs/2311.03099",
        needs=frozenset({Need.GENERATORS}),
        negative_weights=True,
    ),
    Method(
        name="dare_ties",
        formula="elect(drop(t_i)), drop: each element kept with probability {density:g}, {rescaled}, seed {seed}; {election}",
        reads=("density", "rescale", "seed", *ELECTION),
        prepare="merging.methods.dare:drop_at_random",
        merge=_ELECT,
        source="https://arxiv.org/abs/2311.03099",
        needs=frozenset({Need.GENERATORS}),
    ),
    Method(
        name="della",
        formula="elect(drop(t_i)), drop: kept with probability {density:g} - {epsilon:g} for the smallest of a row to "
        "{density:g} + {epsilon:g} for the largest, {rescaled}, seed {seed}; {election}",
        reads=("density", "epsilon", "rescale", "seed", *ELECTION),
        prepare="merging.methods.della:drop_by_rank",
        merge=_ELECT,
        source="https://arxiv.org/abs/2406.11617",
        needs=frozenset({Need.GENERATORS}),
    ),
    Method(
        name="breadcrumbs",
        formula="sum(w_i * band(t_i)), band: without the {gamma:g} of each tensor that is largest in magnitude, the next {density:g}",
        reads=("density", "gamma"),
        prepare="merging.methods.breadcrumbs:keep_band",
        merge=_SUM,
        source="https://arxiv.org/abs/2312.06795",
        negative_weights=True,
    ),
    Method(
        name="slerp",
        formula="(sin((1 - t) * a) * t_1 + sin(t * a) * t_2) / sin(a), a: angle of the two updates of a tensor, t = w_2 / (w_1 + w_2)",
        reads=(),
        merge="merging.methods.slerp:slerp",
        source="https://doi.org/10.1145/325165.325242",
        needs=frozenset({Need.ABSENT}),
        num_trials=2,
    ),
    Method(
        name="knots",
        formula="U * S * ties(V_i), U * S * [V_1 .. V_N]: singular value decomposition of [t_1 .. t_N]; "
        "V_i: top {density:g} of each by magnitude; {election}",
        reads=("density", *ELECTION),
        merge="merging.methods.knots:knots",
        source="https://arxiv.org/abs/2410.19735",
        needs=frozenset({Need.FACTORS}),
    ),
    Method(
        name="unanimous",
        formula="sum(w_i * t_i) / sum(w_i) where all t_i have one sign, else 0",
        reads=(),
        prepare="merging.methods.unanimous:keep_unanimous",
        merge="merging.linear:linear",
        source="https://arxiv.org/abs/2410.05583",
        needs=frozenset({Need.ABSENT}),
    ),
    Method(
        name="seed",
        formula="ties(sqrt(w_i * s_i), B_i) @ ties(sqrt(w_i * s_i), A_i), factor by factor, for update s_i * B_i @ A_i; "
        "top {density:g} of each factor by magnitude; sign = sign(sum), + at a zero sum; mean over the number of those that agree",
        reads=("density", "convention"),
        merge="merging.methods.seed:merge_factors",
        source="https://arxiv.org/abs/2503.21088",
        needs=frozenset({Need.ABSENT, Need.FACTORS}),
    ),
)

_known = {method.name: method for method in _METHODS}
METHODS: Mapping[str, Method] = MappingProxyType(_known)
"""In the order in which they are listed to users; those that plugins have added in this process come last."""


def add_method(method: Method) -> None:
    """Make a method known under a name that ``trainers.plugins.register`` has taken."""
    _known[MethodName.add(method.name)] = method


def remove_method(name: str) -> None:
    """Forget an added method."""
    _known.pop(name, None)
    MethodName.remove(name)


PARAMETERS = tuple(dict.fromkeys(name for method in _METHODS for name in method.reads))
"""Every setting that some methods read and others do not."""

CONVENTIONS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "paper": {
            "method": "ties",
            "trim_scope": "model",
            "trim_count": "floor_plus_one",
            "elect": "unweighted",
            "divisor": "count",
            "zero_sum": "majority",
        },
        "peft-dense": {
            "method": "ties",
            "trim_scope": "tensor",
            "trim_count": "floor",
            "equal_magnitudes": "topk",
            "elect": "unweighted",
            "divisor": "count",
            "zero_sum": "positive",
        },
        "mergekit": {
            "method": "ties",
            "trim_scope": "tensor",
            "trim_count": "floor",
            "equal_magnitudes": "first",
            "elect": "weighted",
            "divisor": "weight",
            "zero_sum": "positive",
        },
        "seed": {"method": "seed"},
    }
)
"""What each named reading of TIES sets. Sources: the authors' code (paper), https://github.com/prateeky2806/ties-merging;
``peft.utils.merge_utils.ties`` on dense float32 updates; ``merge_method: ties`` of mergekit 0.1.4; and
``add_weighted_adapter(combination_type="ties")`` of peft, as ZJUKLAB's system calls it (seed)."""


def load(function: str) -> Callable[..., Any]:
    """The function of a name such as ``merging.linear:linear``."""
    module, _, name = function.partition(":")
    return getattr(import_module(module), name)

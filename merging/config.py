"""What a merge and a pair search are: names, defaults, units and checks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from merging.methods.table import CONVENTIONS, METHODS, PARAMETERS, MethodName
from trainers.config import Frozen


class MergeConfig(Frozen):
    """One merge of task vectors. The defaults are the ``peft-dense`` reading of TIES on float32 updates, but for equal magnitudes.

    A setting that the method does not read is refused where it is given, and left out where the configuration is written.
    ``merging.methods.table`` says which method reads what.
    """

    method: MethodName = Field(default=MethodName.TIES, description="how the task vectors become one")
    convention: Literal["paper", "peft-dense", "mergekit", "seed"] | None = Field(
        default=None,
        description="a published reading of TIES: sets trim_scope, trim_count, elect, divisor and zero_sum, or for seed the method; "
        "null leaves them as they are given",
    )
    density: float = Field(
        default=0.8, gt=0, le=1, description="fraction of each task vector kept, by magnitude or at random, as the method says"
    )
    scale: float = Field(
        default=1.0, gt=0, description="factor (lambda of the paper) on the merged task vector before it is added to the target"
    )
    weights: tuple[float, ...] | None = Field(
        default=None, description="one factor per trial, in the order of the trials; null is 1 for each"
    )
    trim_scope: Literal["tensor", "model"] = Field(
        default="tensor",
        description="where the density holds: in each tensor (int(density * n) elements kept), or over all tensors that a trial "
        "changes (as in the paper; elements equal to the threshold are all kept)",
    )
    trim_count: Literal["floor", "floor_plus_one"] = Field(
        default="floor",
        description="elements kept of n: int(density * n), or one more, which the paper's code keeps; the latter with trim_scope = model",
    )
    equal_magnitudes: Literal["first", "topk"] = Field(
        default="first",
        description="which elements stay where the border of a tensor's trim runs through equal magnitudes: the first in memory order, as "
        "in mergekit, or those that torch.topk chooses, as in peft; the latter takes several times as long",
    )
    elect: Literal["unweighted", "weighted"] = Field(
        default="unweighted", description="whether the sign is elected before or after the weights are applied"
    )
    divisor: Literal["count", "weight"] = Field(
        default="count", description="the disjoint mean divides by the number or by the weights of the agreeing trials"
    )
    zero_sum: Literal["positive", "drop", "majority"] = Field(
        default="positive",
        description="the elected sign where the kept values sum to zero; drop leaves no update there; majority takes the sign that "
        "prevails among all elected signs of the model (ties only)",
    )
    epsilon: float = Field(
        default=0.15, gt=0, lt=0.5, description="della: half the range of keep probabilities; density - epsilon and + epsilon in (0, 1)"
    )
    gamma: float = Field(default=0.01, ge=0, lt=1, description="breadcrumbs: fraction dropped at the top, by magnitude")
    rescale: Literal["density", "l1", "none"] = Field(
        default="density",
        description="what makes up for elements dropped at random: divide each kept one by its keep probability, as the papers do; "
        "scale to the L1 norm before the drop, as mergekit does; or nothing",
    )
    seed: int = Field(default=42, ge=0, description="of the random masks, which also follow from the tensor's name and the trial's content")

    @model_validator(mode="before")
    @classmethod
    def _apply_convention(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("convention") not in CONVENTIONS:
            return values
        name, values = values["convention"], dict(values)
        settings = CONVENTIONS[name]
        if values.get("method") == "ties":  # what a convention is a reading of
            values["method"] = settings["method"]
        for setting, value in settings.items():
            if values.setdefault(setting, value) != value:
                raise ValueError(f"{setting} = {values[setting]} contradicts convention = {name}, which sets {value}")
        return values

    @model_validator(mode="after")
    def _settings_are_read(self) -> MergeConfig:
        method = METHODS[self.method]
        for name in PARAMETERS:
            if name in self.model_fields_set and name not in method.reads:
                reads = ", ".join((*method.reads, "scale", "weights"))
                raise ValueError(f"{name} = {getattr(self, name)}: method = {self.method} does not read it; it reads {reads}")
        return self

    @model_validator(mode="after")
    def _settings_fit_each_other(self) -> MergeConfig:
        if self.trim_count == "floor_plus_one" and self.trim_scope != "model":
            raise ValueError("trim_count = floor_plus_one is defined for trim_scope = model only")
        if self.equal_magnitudes == "topk" and self.trim_scope != "tensor":
            raise ValueError("equal_magnitudes = topk is defined for trim_scope = tensor only; over the whole model all of them are kept")
        if self.zero_sum == "majority" and self.method != "ties":
            raise ValueError(f"zero_sum = majority is defined for method = ties only, not {self.method}")
        low, high = self.density - self.epsilon, self.density + self.epsilon
        if self.method == "della" and not 0 < low < high < 1:
            raise ValueError(
                f"density = {self.density:g} with epsilon = {self.epsilon:g} gives keep probabilities from {low:g} to {high:g}; "
                "both must be in (0, 1)"
            )
        if self.method == "breadcrumbs" and self.density + self.gamma > 1:
            raise ValueError(
                f"density = {self.density:g} and gamma = {self.gamma:g} sum to more than 1: gamma is dropped at the top, density is kept"
            )
        return self

    @model_validator(mode="after")
    def _weights_make_sense(self) -> MergeConfig:
        if self.weights is None:
            return self
        if not self.weights or not all(math.isfinite(weight) and weight != 0 for weight in self.weights):
            raise ValueError(f"weights = {list(self.weights)}: give one finite number other than 0 per trial")
        if not METHODS[self.method].negative_weights and min(self.weights) < 0:
            defined = ", ".join(method.name for method in METHODS.values() if method.negative_weights)
            raise ValueError(f"weights = {list(self.weights)}: negative weights are defined for method = {defined} only")
        return self

    @model_serializer(mode="wrap")
    def _without_unread(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        unread = set(PARAMETERS) - set(METHODS[self.method].reads)
        return {name: value for name, value in handler(self).items() if name not in unread}

    def reads(self, name: str) -> bool:
        """Whether a setting changes this merge."""
        return name not in PARAMETERS or name in METHODS[self.method].reads

    def trial_weights(self, num_trials: int) -> tuple[float, ...]:
        """One weight per trial.

        Raises:
            ValueError: if the number of weights is not the number of trials, or the method merges another number of trials.
        """
        wanted = METHODS[self.method].num_trials
        if wanted is not None and num_trials != wanted:
            raise ValueError(f"method = {self.method} merges {wanted} trials, not {num_trials}")
        if self.weights is None:
            return (1.0,) * num_trials
        if len(self.weights) != num_trials:
            raise ValueError(f"weights has {len(self.weights)} numbers for {num_trials} trials")
        return self.weights

    def formula(self) -> str:
        """The merge in one line, with the values of this configuration, for records and logs."""
        weights = "w = 1" if self.weights is None else f"w = {list(self.weights)}"
        values = {name: getattr(self, name) for name in ("density", "epsilon", "gamma", "seed")}
        texts = {"ties": self._ties_text(), "election": self._election_text(), "rescaled": _RESCALED[self.rescale]}
        merged = METHODS[self.method].formula.format(**values, **texts)
        convention = f"; convention {self.convention}" if self.convention else ""
        if self.method in ("linear", "task_arithmetic"):
            return f"base + {self.scale:g} * {merged}, {weights}"
        return f"base + {self.scale:g} * m; m = {merged}; {weights}{convention}"

    def _ties_text(self) -> str:
        scope = "each tensor" if self.trim_scope == "tensor" else "the whole task vector"
        more = " and one element more" if self.trim_count == "floor_plus_one" else ""
        equal = ", the first" if self.equal_magnitudes == "first" else ", torch.topk's choice"
        among = f"{equal} of equal ones" if self.trim_scope == "tensor" and self.density < 1 else ""
        return f"elect(t_i); t_i: top {self.density:g}{more} of {scope} by magnitude{among}; {self._election_text()}"

    def _election_text(self) -> str:
        voters = "t_i" if self.elect == "unweighted" else "w_i * t_i"
        divisor = "number" if self.divisor == "count" else "sum of weights"
        zero = {"positive": "+", "drop": "no update", "majority": "the sign of most elements"}[self.zero_sum]
        return f"elect: sign = sign(sum({voters})), {zero} at a zero sum, then sum of w_i * t_i that agree / {divisor} of those that agree"


_RESCALED = {"density": "divided by that probability", "l1": "scaled to the L1 norm before the drop", "none": "not rescaled"}


class ObjectiveWeights(Frozen):
    """What the pair search maximises: a weighted mean of these scores. Equal weights are the benchmark's final score."""

    task_aggregate: float = Field(default=1.0, ge=0, description="weight of the harmonic mean over tasks")
    mia_score: float = Field(default=1.0, ge=0, description="weight of 1 - 2 |AUC - 0.5|")
    mmlu_average: float = Field(default=1.0, ge=0, description="weight of general knowledge")

    @model_validator(mode="after")
    def _something_counts(self) -> ObjectiveWeights:
        if not self.task_aggregate + self.mia_score + self.mmlu_average > 0:
            raise ValueError("all weights are 0: give at least one of task_aggregate, mia_score and mmlu_average a weight")
        return self


class PairConfig(Frozen):
    """How the pair search spends its measurements, what it maximises, and what may not be lost.

    Cheap measurements are forward passes without generation over a growing part of the validation fold, the same examples in the same
    order for all merges. A merge that fails a gate ranks below every merge that passes.
    """

    objective: ObjectiveWeights = ObjectiveWeights()
    candidates: Literal["checkpoints", "last"] = Field(
        default="checkpoints", description="what may be merged: every checkpoint that a trial keeps (train.checkpoints), or its last one"
    )
    max_pairs: int = Field(default=24, ge=1, description="pairs measured on the first examples, best prediction first")
    calibrated: int = Field(
        default=6,
        ge=0,
        description="pairs whose density, weights and scale are calibrated, most promising first; 0: every pair is measured as it is, "
        "with equal weights at scale 1",
    )
    densities: tuple[float, ...] = Field(
        default=(0.2, 0.5, 0.8), min_length=1, description="densities tried for a calibrated pair; 0.2 is the paper's"
    )
    shares: tuple[float, ...] = Field(
        default=(0.25, 0.5, 0.75),
        description="shares of the over-forgetting parent in the weights tried for a calibrated pair, besides the one that is predicted to "
        "meet AUC 0.5; no effect where merge.weights is given",
    )
    scale_bounds: tuple[float, float] = Field(default=(0.5, 1.5), description="lowest and highest scale that the calibration may use")
    scale_steps: int = Field(
        default=3, ge=0, description="further measurements of a merge on the whole fold, moving the scale until the AUC meets 0.5"
    )
    auc_tolerance: float = Field(default=0.01, gt=0, lt=0.5, description="distance of the AUC from 0.5 at which a calibration stops early")
    first_rung: int = Field(default=64, ge=32, description="examples that every merge is measured on first; fewer are noise")
    eta: int = Field(default=4, ge=2, description="factor between rungs: one of so many merges goes on, to so many times as many examples")
    max_passes: float | None = Field(
        default=None, gt=0, description="budget: passes over the validation fold before the finalists are chosen; null: no limit"
    )
    finalists: int = Field(default=3, ge=1, description="merges measured in full, with generation")
    confidence: float = Field(
        default=0.95,
        gt=0,
        lt=1,
        description="a merge is handed out if the paired interval, of this coverage, of its gain over the best trial lies above 0",
    )
    min_mmlu_fraction: float = Field(default=0.75, ge=0, le=1, description="gate: lowest MMLU accuracy, as a fraction of the baseline's")
    min_retention_fraction: float = Field(
        default=0.5, ge=0, le=1, description="gate: lowest retention (and retain token accuracy), as a fraction of the baseline's"
    )
    workers: int | None = Field(
        default=None, ge=1, description="merges measured at the same time; null: one per GPU, or one on a machine without GPUs"
    )

    @model_validator(mode="after")
    def _ranges_make_sense(self) -> PairConfig:
        if not all(0 < density <= 1 for density in self.densities):
            raise ValueError(f"densities = {list(self.densities)}: each must be in (0, 1], the fraction of each task vector kept")
        if not all(0 < share < 1 for share in self.shares):
            raise ValueError(f"shares = {list(self.shares)}: each must be in (0, 1), the over-forgetting parent's part of the weights")
        low, high = self.scale_bounds
        if not 0 < low <= 1 <= high:
            raise ValueError(f"scale_bounds = {list(self.scale_bounds)}: needs 0 < low <= 1 <= high, because the search starts at scale 1")
        return self

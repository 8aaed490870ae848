"""What a merge and a pair search are: names, defaults, units and checks."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from trainers.config import Frozen


class MergeConfig(Frozen):
    """One merge of task vectors. The defaults are the ``peft-dense`` reading of TIES on float32 updates.

    Source: Yadav et al. 2023, https://arxiv.org/abs/2306.01708
    """

    method: Literal["ties", "linear", "task_arithmetic"] = Field(
        default="ties",
        description="ties: trim, elect, disjoint mean; linear: weighted mean; task_arithmetic: weighted sum of the task vectors",
    )
    density: float = Field(
        default=0.8, gt=0, le=1, description="fraction of each task vector kept by the trim, by magnitude; only ties trims"
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
    elect: Literal["unweighted", "weighted"] = Field(
        default="unweighted", description="whether the sign is elected before or after the weights are applied"
    )
    divisor: Literal["count", "weight"] = Field(
        default="count", description="the disjoint mean divides by the number or by the weights of the agreeing trials"
    )
    zero_sum: Literal["positive", "drop"] = Field(
        default="positive", description="the elected sign where the kept values sum to zero; drop leaves no update there"
    )

    @model_validator(mode="after")
    def _weights_make_sense(self) -> MergeConfig:
        if self.weights is None:
            return self
        if not self.weights or not all(math.isfinite(weight) and weight != 0 for weight in self.weights):
            raise ValueError(f"weights = {list(self.weights)}: give one finite number other than 0 per trial")
        if self.method != "task_arithmetic" and min(self.weights) < 0:
            raise ValueError(f"weights = {list(self.weights)}: negative weights are defined for method = task_arithmetic only")
        return self

    def trial_weights(self, num_trials: int) -> tuple[float, ...]:
        """One weight per trial.

        Raises:
            ValueError: if the number of weights is not the number of trials.
        """
        if self.weights is None:
            return (1.0,) * num_trials
        if len(self.weights) != num_trials:
            raise ValueError(f"weights has {len(self.weights)} numbers for {num_trials} trials")
        return self.weights

    def formula(self) -> str:
        """The merge in one line, with the values of this configuration, for records and logs."""
        weights = "w = 1" if self.weights is None else f"w = {list(self.weights)}"
        if self.method == "linear":
            return f"base + {self.scale:g} * sum(w_i * t_i) / sum(w_i), {weights}"
        if self.method == "task_arithmetic":
            return f"base + {self.scale:g} * sum(w_i * t_i), {weights}"
        scope = "each tensor" if self.trim_scope == "tensor" else "the whole task vector"
        voters = "t_i" if self.elect == "unweighted" else "w_i * t_i"
        divisor = "number" if self.divisor == "count" else "sum of weights"
        zero = "+" if self.zero_sum == "positive" else "no update"
        return (
            f"base + {self.scale:g} * m; t_i: top {self.density:g} of {scope} by magnitude; "
            f"sign = sign(sum({voters})), {zero} at a zero sum; m = sum of w_i * t_i that agree / {divisor} of those that agree; {weights}"
        )


class PairConfig(Frozen):
    """How the pair search spends its measurements.

    Cheap measurements are teacher-forced losses without generation. Their objective is the mean of
    ``1 - forget_token_accuracy``, ``retain_token_accuracy`` and ``mia_score``; a merge that fails a gate ranks below
    every merge that passes. Full measurements are ranked by ``final_score``, or without MMLU by the mean of
    ``task_aggregate`` and ``mia_score``.
    """

    max_pairs: int = Field(default=6, ge=1, description="pairs measured cheaply, best prediction first")
    finalists: int = Field(default=2, ge=1, description="merges measured in full, with generation")
    densities: tuple[float, ...] = Field(
        default=(0.2, 0.5, 0.8), min_length=1, description="densities tried for every pair at scale 1; 0.2 is the paper's"
    )
    scale_bounds: tuple[float, float] = Field(default=(0.5, 1.5), description="lowest and highest scale that the calibration may use")
    scale_steps: int = Field(
        default=4, ge=0, description="cheap measurements per calibrated (pair, density), moving the scale until the AUC meets 0.5"
    )
    calibrated: int = Field(default=6, ge=0, description="(pair, density) points whose scale is calibrated, most promising first")
    auc_tolerance: float = Field(default=0.01, gt=0, lt=0.5, description="distance of the AUC from 0.5 at which a calibration stops early")
    min_mmlu_fraction: float = Field(default=0.75, ge=0, le=1, description="gate: lowest MMLU accuracy, as a fraction of the baseline's")
    min_retention_fraction: float = Field(
        default=0.5, ge=0, le=1, description="gate: lowest retention (cheap: retain token accuracy), as a fraction of the baseline's"
    )

    @model_validator(mode="after")
    def _ranges_make_sense(self) -> PairConfig:
        if not all(0 < density <= 1 for density in self.densities):
            raise ValueError(f"densities = {list(self.densities)}: each must be in (0, 1], the fraction of each task vector kept")
        low, high = self.scale_bounds
        if not 0 < low <= 1 <= high:
            raise ValueError(f"scale_bounds = {list(self.scale_bounds)}: needs 0 < low <= 1 <= high, because the search starts at scale 1")
        return self

"""Whole tiny trials on one process or several, with what tests compare of them; and mistakes to make on purpose."""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers.master_weights import MasterWeightsEngine
from tests.helpers.ranks import RankGroup
from trainers import loop, step
from trainers.checkpoint import ADAPTER, WEIGHTS, finished_checkpoints
from trainers.config import TrainConfig
from trainers.distributed import Rank
from trainers.engine.base import Engine, TrainingState
from trainers.engine.deepspeed_engine import DeepSpeedEngine
from trainers.engine.local import LocalEngine
from trainers.modeling import decoder_layers
from trainers.plan import MicroBatch
from trainers.trial_rows import TrialInputs

MASTER_WEIGHTS = "master weights in plain torch"
"""A trial's ``engine`` that no configuration names: the reference in bfloat16."""


@dataclass
class RankRun:
    """What one rank saw of a trial, from where it started or resumed.

    Args:
        metrics: of each step.
        micro_batches: the rows it computed, for each step.
        state: hash of the trained weights and moments after the last step.
        layer_passes: forward passes of the lowest decoder layer, recomputed ones included.
    """

    metrics: list[dict[str, Any]] = field(default_factory=list)
    micro_batches: list[list[MicroBatch]] = field(default_factory=list)
    state: str = ""
    layer_passes: int = 0


@dataclass(frozen=True)
class Run:
    """A trial that went to its end or was interrupted.

    Args:
        train: its configuration.
        trial: its folder.
        ranks: what each rank saw; their metrics and their states are the same.
    """

    train: TrainConfig
    trial: Path
    ranks: Sequence[RankRun]

    def values(self, name: str) -> list[float]:
        """One metric of every step."""
        return [metrics[name] for metrics in self.ranks[0].metrics]

    @property
    def weights(self) -> dict[str, Tensor]:
        """The newest checkpoint's weights."""
        folder = finished_checkpoints(self.trial)[-1]
        return load_file(next(file for file in (folder / ADAPTER, folder / WEIGHTS) if file.exists()))


class Trials:
    """Runs trials, each on as many processes as its configuration says; one process is the caller's own."""

    def __init__(self, *, inputs: TrialInputs, root: Path) -> None:
        self.inputs = inputs
        self.groups = {number: RankGroup(number) for number in (2, 4)}
        self._root = root
        self._numbers = itertools.count()
        self._undisturbed: dict[str, Run] = {}
        self._interrupted: dict[str, Run] = {}

    def folder(self) -> Path:
        """A new trial's folder."""
        return self._root / f"trial-{next(self._numbers)}"

    def undisturbed(self, train: TrainConfig, *, engine: str = "") -> Run:
        """A trial from its first step to its last; the same one again for the same configuration."""
        key = f"{engine} {train.model_dump_json()}"
        if key not in self._undisturbed:
            self._undisturbed[key] = self.run(train, engine=engine)
        return self._undisturbed[key]

    def interrupted(self, train: TrainConfig, *, after: int) -> Path:
        """A copy of a trial's folder, left by a trial that was interrupted after so many steps."""
        key = f"{after} {train.model_dump_json()}"
        if key not in self._interrupted:
            self._interrupted[key] = self.run(train, stop_after=after)
        return Path(shutil.copytree(self._interrupted[key].trial, self.folder()))

    def run(
        self, train: TrainConfig, *, trial: Path | None = None, stop_after: int | None = None, engine: str = "", wrong: str = ""
    ) -> Run:
        """Start or resume a trial; ``stop_after`` interrupts it after so many steps, ``wrong`` breaks one thing on purpose."""
        trial = trial or self.folder()
        arguments = {"train": train, "inputs": self.inputs, "trial": trial, "stop_after": stop_after, "engine": engine, "wrong": wrong}
        if train.engine.ranks == 1:
            return Run(train, trial, [run_rank(**arguments)])
        run = Run(train, trial, self.groups[train.engine.ranks].call(run_rank, **arguments))
        first = run.ranks[0]
        for number, other in enumerate(run.ranks[1:], start=1):
            assert [m | {"seconds": 0} for m in other.metrics] == [m | {"seconds": 0} for m in first.metrics], f"metrics of rank {number}"
            assert other.state == first.state, f"rank {number} ends with other weights or moments than rank 0"
        return run

    def stop(self) -> None:
        """End all processes."""
        for group in self.groups.values():
            group.stop()


def run_rank(
    *,
    train: TrainConfig,
    inputs: TrialInputs,
    trial: Path,
    stop_after: int | None = None,
    engine: str = "",
    wrong: str = "",
    rank: Rank | None = None,
) -> RankRun:
    """One rank of a trial."""
    run = RankRun()
    engines: list[Engine] = []
    with pytest.MonkeyPatch.context() as patch:
        if wrong:
            MISTAKES[wrong](patch, rank or Rank())
        build, split = loop.build_engine, step.split_step

        def build_and_watch(model: Any, *, train: TrainConfig, device: str) -> Engine:
            if engine == MASTER_WEIGHTS:
                built: Engine = MasterWeightsEngine(model, weight_decay=train.weight_decay, max_grad_norm=train.max_grad_norm)
            else:
                built = build(model, train=train, device=device)
            engines.append(built)
            decoder_layers(built.model.causal_lm)[0].self_attn.register_forward_pre_hook(count_pass)
            return built

        def count_pass(*_: Any) -> None:
            run.layer_passes += 1

        def split_and_watch(plan: Any, **arguments: Any) -> list[MicroBatch]:
            run.micro_batches.append(split(plan, **arguments))
            return run.micro_batches[-1]

        patch.setattr(loop, "build_engine", build_and_watch)
        patch.setattr(step, "split_step", split_and_watch)
        steps = loop.train_worker(train=train, inputs=inputs, trial=trial, rank=rank)
        for metrics in steps:
            run.metrics.append(metrics)
            if metrics["step"] == metrics["num_steps"]:
                run.state = hash_state(engines[0].state())
            if stop_after is not None and len(run.metrics) == stop_after:
                steps.close()
    return run


def hash_state(state: TrainingState) -> str:
    """A name for the exact values of a state."""
    digest = hashlib.sha256(f"{state.optimizer_step} {state.optimizer_age}".encode())
    for part in (state.weights, state.exp_avg, state.exp_avg_sq):
        for name, value in part.items():
            digest.update(name.encode())
            digest.update(value.numpy().tobytes())
    return digest.hexdigest()


# --- mistakes, for negative controls ---


def _counts_of_one_rank(patch: pytest.MonkeyPatch, rank: Rank) -> None:
    """Each rank divides by the counts of its own rows."""
    honest = step.step_counts

    def own_counts(plan: Any, *, rows: Any) -> Any:
        own = {side: getattr(plan, side)[rank.rank :: rank.world_size] for side in ("forget", "retain")}
        return honest(replace(plan, **own), rows=rows)

    patch.setattr(step, "step_counts", own_counts)


def _gradients_averaged(patch: pytest.MonkeyPatch, rank: Rank) -> None:
    """The gradient is averaged over the ranks, as DeepSpeed does by itself, where it is to be summed."""
    honest = DeepSpeedEngine.backward

    def averaged(self: DeepSpeedEngine, loss: Tensor, *, last: bool) -> None:
        honest(self, loss / self.world_size, last=last)

    patch.setattr(DeepSpeedEngine, "backward", averaged)


def _same_rows_on_every_rank(patch: pytest.MonkeyPatch, rank: Rank) -> None:
    """All ranks compute what the first one should."""
    honest = step.split_step

    def first_rank_s(plan: Any, **arguments: Any) -> list[MicroBatch]:
        return honest(plan, **{**arguments, "rank": 0})

    patch.setattr(step, "split_step", first_rank_s)


def _optimizer_never_reset(patch: pytest.MonkeyPatch, rank: Rank) -> None:
    """Moments of one learning-rate cycle go on in the next."""
    for engine in (LocalEngine, DeepSpeedEngine):
        patch.setattr(engine, "reset_optimizer", lambda self: None)


def _other_dropout(patch: pytest.MonkeyPatch, rank: Rank) -> None:
    """Dropout draws from a stream of its own."""
    patch.setattr(step, "set_step_seed", lambda **_: None)


def _moments_lost(patch: pytest.MonkeyPatch, rank: Rank) -> None:
    """A resumed trial starts its optimizer anew."""
    for engine in (LocalEngine, DeepSpeedEngine):
        honest = engine.load_state

        def load_weights(self: Any, state: TrainingState, honest: Any = honest) -> None:
            honest(self, replace(state, optimizer_age=0, exp_avg={}, exp_avg_sq={}))

        patch.setattr(engine, "load_state", load_weights)


MISTAKES = {
    "counts of one rank": _counts_of_one_rank,
    "gradients averaged": _gradients_averaged,
    "same rows on every rank": _same_rows_on_every_rank,
    "optimizer never reset": _optimizer_never_reset,
    "other dropout": _other_dropout,
    "moments lost": _moments_lost,
}


@dataclass(frozen=True)
class Differences:
    """How far two runs of a trial lie apart.

    Args:
        loss: largest difference of a step's loss, relative to the largest of the losses and of their terms' means, which may cancel.
        norm: largest relative difference of a step's gradient norm.
        weight: largest difference of a weight at the end, in learning rates, which is about what AdamW moves a weight by per step.
        spread: root of the weights' mean squared difference at the end, likewise.
    """

    loss: float
    norm: float
    weight: float
    spread: float


def differences(actual: Run, expected: Run, *, from_step: int = 1) -> Differences:
    """Between the steps of ``actual`` and those of ``expected`` from ``from_step`` on."""
    losses, wanted_losses = actual.values("loss"), expected.values("loss")[from_step - 1 :]
    norms, wanted_norms = actual.values("grad_norm"), expected.values("grad_norm")[from_step - 1 :]
    assert len(losses) == len(wanted_losses)
    scale = max(abs(value) for metrics in expected.ranks[0].metrics for value in (metrics["loss"], *metrics["terms"].values()))
    weights, wanted_weights = actual.weights, expected.weights
    assert weights.keys() == wanted_weights.keys()
    apart = torch.cat([(weights[name] - wanted_weights[name]).flatten() for name in weights])
    return Differences(
        loss=max(abs(a - b) for a, b in zip(losses, wanted_losses, strict=True)) / scale,
        norm=max(abs(a / b - 1) for a, b in zip(norms, wanted_norms, strict=True)),
        weight=float(apart.abs().max()) / expected.train.learning_rate,
        spread=float(apart.square().mean().sqrt()) / expected.train.learning_rate,
    )

"""The plan of a sweep: how each trial is sharded, how many run at once, what they cost; from files and nodes, before anything starts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.config import ExperimentConfig, SweepConfig
from launcher.data import PreparedData
from launcher.disk_plan import DiskPlan, checkpoint_bytes, free_bytes, reference_bytes, weights_bytes
from launcher.nodes import Node, cluster_nodes, this_machine
from launcher.planner import ShardingPlan, is_open, plan_sharding, resolve_without_model
from launcher.resources import ResourcePlan, gpus_per_rank, plan_resources
from launcher.search.source import epochs_cost
from launcher.search_space import TrialSpec
from launcher.trial import trial_inputs
from trainers.config import TrainConfig
from trainers.data.types import ForgetRetain
from trainers.errors import InputError
from trainers.memory import GIB

if TYPE_CHECKING:
    from trainers.trial_rows import EncodedTrial, TrialInputs


@dataclass(frozen=True)
class TrialPlan:
    """What is known of a trial before it starts.

    Args:
        train: its configuration, with numbers where the planner had the choice.
        sharding: how it is computed; None where its model is not known.
        flops: operations of its training; None where its model is not known.
        note: why nothing is known.
    """

    train: TrainConfig
    sharding: ShardingPlan | None = None
    flops: int | None = None
    note: str | None = None


class TrialPlanner:
    """Plans the trials of a sweep one by one, all on the same number of ranks once that is settled.

    Args:
        config: the experiment.
        data: its rows.
        nodes: where trials may run.
    """

    def __init__(self, config: ExperimentConfig, *, data: PreparedData, nodes: Sequence[Node]) -> None:
        self.nodes = tuple(nodes)
        self.gpus_per_rank = gpus_per_rank(config.sweep, nodes=nodes)
        self.ranks: int | None = None
        self._inputs = _inputs(config, data=data)
        self._rows: dict[str, EncodedTrial] = {}
        self._sharding: dict[tuple[str, int | None], ShardingPlan | InputError] = {}
        self._plans: dict[tuple[str, int | None], TrialPlan] = {}

    def settle_ranks(self, trains: Sequence[TrainConfig]) -> int:
        """As many ranks for every trial as the one that needs most: a sweep's resources are planned once."""
        self.ranks = max(self._resolved(train).train.engine.num_ranks for train in trains)
        return self.ranks

    def plan(self, train: TrainConfig) -> TrialPlan:
        """A trial's plan.

        Raises:
            InputError: if it does not fit, and its configuration leaves a choice.
        """
        key = (train.model_dump_json(), self.ranks)
        if key not in self._plans:
            self._plans[key] = self._plan(train)
        return self._plans[key]

    def resolve(self, specs: Sequence[TrialSpec]) -> tuple[TrialSpec, ...]:
        """The trials with numbers in place of what was left open."""
        return tuple(replace(spec, config=self.plan(spec.config).train) for spec in specs)

    def cost(self, train: TrainConfig) -> float:
        """What a trial is expected to take: operations, or passes over the data where its model is not known."""
        flops = self.plan(train).flops
        return float(flops) if flops is not None else epochs_cost(train)

    def _plan(self, train: TrainConfig) -> TrialPlan:
        from trainers.flops import training_flops, trial_volume
        from trainers.model_shape import shape_of, trained_of

        plan = self._resolved(train)
        if plan.sharding is None:
            return plan
        flops = training_flops(
            shape_of(self.model_config),
            train=train,
            trained=trained_of(self.model_config, train=train),
            volume=trial_volume(self.rows(train), train=train),
            recomputes=plan.sharding.recomputes,
        )
        return replace(plan, flops=flops)

    def _resolved(self, train: TrainConfig) -> TrialPlan:
        """The plan without its operations, which take a look at every step."""
        if self._inputs is None:
            return TrialPlan(resolve_without_model(train, ranks=self.ranks), note="the target is still to be built")
        sharding = self._sharded(train)
        if isinstance(sharding, InputError):
            if is_open(train) and self.gpus_per_rank > 0:
                raise sharding
            return TrialPlan(resolve_without_model(train, ranks=self.ranks), note=sharding.what)
        return TrialPlan(sharding.apply(train), sharding=sharding)

    def _sharded(self, train: TrainConfig) -> ShardingPlan | InputError:
        from trainers.memory_plan import memory_setting

        setting = memory_setting(train)
        key = (setting, self.ranks)
        free = self._sharding.get((setting, None))
        if isinstance(free, ShardingPlan) and free.ranks == self.ranks:
            return free  # it knows why it needs as many
        if key not in self._sharding:
            try:
                self._sharding[key] = plan_sharding(
                    self.model_config,
                    rows=self.rows(train),
                    train=train,
                    nodes=self.nodes,
                    gpus_per_rank=self.gpus_per_rank,
                    ranks=self.ranks,
                )
            except InputError as error:
                self._sharding[key] = error
        return self._sharding[key]

    @property
    def model_config(self) -> Any:
        """The target's configuration (transformers')."""
        from trainers.modeling import load_model_config

        assert self._inputs is not None
        return load_model_config(self._inputs.target)

    def rows(self, train: TrainConfig) -> EncodedTrial:
        """A trial's training rows as token ids."""
        from trainers.memory_plan import text_setting
        from trainers.trial_rows import encode_trial

        assert self._inputs is not None
        key = text_setting(train)
        if key not in self._rows:
            self._rows[key] = encode_trial(replace(self._inputs, validation=ForgetRetain((), ()), attack=None), train=train)
        return self._rows[key]


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep will do.

    Args:
        specs: its trials, with numbers where the planner had the choice.
        total: how many there will be; more than ``specs`` where others are proposed as the sweep goes on.
        resources: what each of them gets, and how many run at once.
        trials: the plan of each by its name.
        planner: for trials that are proposed later.
    """

    specs: tuple[TrialSpec, ...]
    total: int
    resources: ResourcePlan
    trials: Mapping[str, TrialPlan]
    planner: TrialPlanner


def make_plan(
    specs: Sequence[TrialSpec],
    *,
    config: ExperimentConfig,
    data: PreparedData,
    nodes: Sequence[Node] | None = None,
    possible: Sequence[TrialSpec] = (),
) -> SweepPlan:
    """Plan a sweep.

    Args:
        specs: the trials that are known.
        config: the experiment.
        data: its rows.
        nodes: where it may run; null: this machine, or the cluster in RAY_ADDRESS.
        possible: other trials that may come; the number of ranks is enough for them, too.

    Raises:
        InputError: if a trial can never fit.
    """
    planner = TrialPlanner(config, data=data, nodes=available_nodes() if nodes is None else nodes)
    planner.settle_ranks([spec.config for spec in (*specs, *possible)] or [config.train])
    trials = {spec.name: planner.plan(spec.config) for spec in specs}
    total = config.sweep.num_trials if config.sweep.search == "optuna" else len(specs)
    resources = plan_resources(
        nodes=planner.nodes, sweep=config.sweep, train=resolve_without_model(config.train, ranks=planner.ranks), num_trials=total
    )
    return SweepPlan(planner.resolve(specs), total, resources, trials, planner)


def resolve_alone(config: ExperimentConfig, *, data: PreparedData) -> TrainConfig:
    """The one trial of an experiment with numbers in place of what was left open, computed in a single process on this machine.

    Raises:
        InputError: if it does not fit on one GPU.
    """
    if not is_open(config.train):
        return config.train
    planner = TrialPlanner(config, data=data, nodes=(this_machine(),))
    planner.ranks = 1
    return planner.plan(config.train).train


def available_nodes() -> tuple[Node, ...]:
    """The nodes of the cluster in RAY_ADDRESS, or this machine.

    Raises:
        SetupError: if the cluster does not answer.
    """
    if not os.environ.get("RAY_ADDRESS"):
        return (this_machine(),)
    import ray

    from launcher.ray_session import start_ray, stop_ray

    if ray.is_initialized():
        return cluster_nodes()
    start_ray(cpus=os.cpu_count() or 1)
    try:
        return cluster_nodes()
    finally:
        stop_ray()


@dataclass(frozen=True)
class NodesWanted:
    """Nodes that a plan is made for without having them.

    Args:
        number: of nodes.
        gpus: of each.
        gpu_memory_gib: memory of each GPU, GiB.
        gpu_name: of the GPUs, such as H100; None leaves hours out of the plan.
    """

    number: int
    gpus: int
    gpu_memory_gib: float
    gpu_name: str | None = None


def imagined_nodes(wanted: NodesWanted, *, sweep: SweepConfig) -> tuple[Node, ...]:
    """Such nodes; their cores are taken as enough for the ranks on their GPUs."""
    cores = wanted.gpus / (sweep.gpus_per_rank or 1) * sweep.cpus_per_rank
    size = int(wanted.gpu_memory_gib * GIB)
    return tuple(
        Node(f"node {index + 1}", "", cpus=cores, gpus=float(wanted.gpus), gpu_bytes=size, gpu_name=wanted.gpu_name)
        for index in range(wanted.number)
    )


def plan_disk(plan: SweepPlan, *, config: ExperimentConfig, elsewhere: bool = False) -> DiskPlan | None:
    """What a run writes; None where the model is not known.

    Args:
        plan: of the sweep.
        config: the experiment.
        elsewhere: whether it is planned for other machines, whose free space is not known.
    """
    from trainers.memory_plan import text_setting
    from trainers.model_shape import shape_of, trained_of

    planner, target = plan.planner, _target(config)
    known = {name: trial for name, trial in plan.trials.items() if trial.sharding is not None}
    if target is None or not known:
        return None
    model = planner.model_config
    shape = shape_of(model)
    # A target that is built from a base is written in float32.
    weights = weights_bytes(target) if config.model.model_name_or_path is not None else 4 * shape.parameters
    checkpoints, reference = 0, dict[tuple[Any, ...], int]()
    for trial in known.values():
        trained = trained_of(model, train=trial.train)
        checkpoints += checkpoint_bytes(shape, train=trial.train, trained=trained, bytes_per_weight=weights / shape.parameters)
        parts = reference_bytes(shape, rows=planner.rows(trial.train), train=trial.train, trained=trained)
        setting = (text_setting(trial.train), trained.head, trial.train.objective.layer, trial.train.engine.dtype)
        reference |= {(part, *setting): size for part, size in parts.items()}
    sizes = {
        "checkpoints": round(checkpoints * plan.total / len(known)),
        "reference": sum(reference.values()),
        "merged model": weights,
        "target": weights if config.model.model_name_or_path is None else 0,
    }
    return DiskPlan({name: size for name, size in sizes.items() if size}, free=None if elsewhere else free_bytes(Path(config.storage_path)))


def _target(config: ExperimentConfig) -> Path | None:
    """The model folder whose shape the target has; None if it is built from scratch."""
    path = config.model.model_name_or_path or (config.target.base if config.target else None)
    return None if path is None else Path(path).expanduser()


def _inputs(config: ExperimentConfig, *, data: PreparedData) -> TrialInputs | None:
    target = _target(config)
    return None if target is None else trial_inputs(run=config.run_folder, data=data, target=target, target_hash="")

"""The plan of a sweep, and what is printed of it."""

from __future__ import annotations

import io
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.console import Console
from launcher.data import prepare_data
from launcher.disk_plan import DiskPlan
from launcher.load import LoadedExperiment, load_experiment
from launcher.nodes import Node
from launcher.plan_text import disk_text, nodes_text, plan_warnings, work_text
from launcher.stages import plan_sweep, print_plan, run_memorize, run_train, validate_experiment
from launcher.sweep_plan import NodesWanted, SweepPlan, available_nodes, imagined_nodes, plan_disk
from launcher.trial import PLAN
from tests.helpers.small_run import write_small_data, write_small_experiment
from trainers.checkpoint import finished_checkpoints
from trainers.errors import InputError
from trainers.files import read_json
from trainers.memory import GIB

CPU = (Node("laptop", "", cpus=2, gpus=0),)
TWO_GPUS = tuple(Node(f"node {index}", "", cpus=16, gpus=2, gpu_bytes=80 * GIB, gpu_name="H100") for index in (1, 2))
OPEN = {
    "train__engine": {"name": "deepspeed", "ranks": None, "zero_stage": None, "dtype": "bfloat16"},
    "train__per_device_train_batch_size": None,
    "sweep__max_concurrent": None,
}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_data(tmp_path_factory.mktemp("plan") / "data")


@pytest.fixture(scope="module")
def target(data: Path) -> Path:
    """A target that has seen its documents once."""
    run_memorize(experiment=experiment(data.parent, data=data, name="source", target__num_train_epochs=1))
    return data.parent / "source" / "target"


def experiment(folder: Path, *, data: Path, overrides: tuple[str, ...] = (), **changes: Any) -> LoadedExperiment:
    folder.mkdir(exist_ok=True)
    return load_experiment(write_small_experiment(folder / "small.yaml", data=data, storage=folder, **changes), overrides)


def planned(loaded: LoadedExperiment, *, nodes: tuple[Node, ...] = CPU) -> SweepPlan:
    return plan_sweep(loaded, data=prepare_data(loaded.config), nodes=nodes)


def printed(loaded: LoadedExperiment, *, nodes: tuple[Node, ...] = CPU) -> list[str]:
    output = io.StringIO()
    print_plan(planned(loaded, nodes=nodes), config=loaded.config, data=prepare_data(loaded.config), console=Console(stream=output))
    return output.getvalue().splitlines()


def lines_of(label: str, lines: list[str]) -> list[str]:
    return [line[15:] for line in lines if line[2:14].rstrip() == label]


# ---- what trials get


def test_trials_get_numbers_for_what_was_left_open(data: Path, target: Path, tmp_path: Path) -> None:
    """One GPU holds this model easily: one rank, nothing shared out, all eight pairs of a step in one pass."""
    plan = planned(experiment(tmp_path, data=data, target=target, **OPEN), nodes=TWO_GPUS)
    for spec in plan.specs:
        engine = spec.config.engine
        assert (engine.ranks, engine.zero_stage, spec.config.per_device_train_batch_size) == (1, 1, 8)
        assert spec.config.train_batch_size == 8
    assert (plan.resources.concurrent, plan.resources.gpus_per_trial, plan.resources.strategy) == (4, 1, "STRICT_PACK")


@pytest.mark.parametrize("with_target", [True, False])
def test_on_a_cpu_what_was_left_open_takes_its_default(data: Path, target: Path, tmp_path: Path, with_target: bool) -> None:
    plan = planned(experiment(tmp_path, data=data, target=target if with_target else None, **OPEN))
    assert {(s.config.engine.ranks, s.config.engine.zero_stage, s.config.per_device_train_batch_size) for s in plan.specs} == {(1, 2, 4)}


def test_a_configuration_that_leaves_nothing_open_stays_as_it_is(data: Path, target: Path, tmp_path: Path) -> None:
    loaded = experiment(tmp_path, data=data, target=target)
    plan = planned(loaded)
    engines = {spec.config.engine for spec in plan.specs}
    assert engines == {loaded.config.train.engine}
    assert {spec.config.activation_checkpointing for spec in plan.specs} == {None}


def test_all_trials_have_as_many_ranks_as_the_largest_needs(data: Path, target: Path, tmp_path: Path) -> None:
    """Beside the fixed 2 GB of a process there is room for the small adapters, not for those of rank 60,000, on one GPU: the planner
    gives two to every trial."""
    settings = {
        "train__lora__r": {"values": [2, 60_000]},
        "sweep__start_points": [{"lora.r": 2}, {"lora.r": 60_000}],
        "sweep__num_trials": 2,
        "train__per_device_train_batch_size": 8,
        "train__activation_checkpointing": False,
    }
    loaded = experiment(tmp_path, data=data, target=target, **(OPEN | settings))
    large = planned(loaded, nodes=TWO_GPUS).trials["trial-01"].sharding
    assert large is not None
    middle = int(large.estimate.total * 1.05)
    nodes = tuple(replace(node, gpu_bytes=middle) for node in TWO_GPUS)
    plan = planned(loaded, nodes=nodes)
    assert [spec.config.engine.ranks for spec in plan.specs] == [2, 2]
    assert (plan.resources.ranks, plan.resources.concurrent) == (2, 2)
    small = plan.trials["trial-00"].sharding
    assert small is not None
    assert "the sweep's number of ranks" in small.why


def test_what_cannot_be_understood_is_refused_only_where_the_planner_was_asked(data: Path, target: Path, tmp_path: Path) -> None:
    tiny = tuple(replace(node, gpu_bytes=2**28) for node in TWO_GPUS)
    with pytest.raises(InputError, match="does not fit into the GPUs that there are"):
        planned(experiment(tmp_path, data=data, target=target, **OPEN), nodes=tiny)
    fixed = planned(experiment(tmp_path, data=data, target=target), nodes=tiny)
    warnings = plan_warnings(fixed, disk=None, config=experiment(tmp_path, data=data, target=target).config)
    assert len(warnings) == 1
    assert "may not fit into the GPU's memory" in warnings[0]
    assert warnings[0].startswith("trial-00, trial-01, trial-02, trial-03 may")


def test_trials_that_are_proposed_later_are_planned_alike(data: Path, target: Path, tmp_path: Path) -> None:
    plan = planned(experiment(tmp_path, data=data, target=target, **OPEN), nodes=TWO_GPUS)
    later = replace(plan.specs[0], name="trial-09", config=experiment(tmp_path, data=data, target=target, **OPEN).config.train)
    (resolved,) = plan.planner.resolve([later])
    assert (resolved.config.engine.ranks, resolved.config.per_device_train_batch_size) == (1, 8)
    assert plan.planner.resolve([resolved]) == (resolved,), "what is settled stays"
    assert plan.planner.cost(resolved.config) == plan.planner.cost(later.config) > 0


def test_cost_follows_the_passes_over_the_documents(data: Path, target: Path, tmp_path: Path) -> None:
    """Start points of 8, 20, 16 and 8 epochs: twice the epochs are twice the operations."""
    plan = planned(experiment(tmp_path, data=data, target=target))
    costs = [plan.planner.cost(spec.config) for spec in plan.specs]
    assert costs[1] / costs[0] == pytest.approx(20 / 8)
    assert costs[2] / costs[0] == pytest.approx(16 / 8)
    unknown = planned(experiment(tmp_path, data=data))
    assert [unknown.planner.cost(spec.config) for spec in unknown.specs] == [8, 20, 16, 8]


def test_a_single_trial_gets_its_numbers_too(data: Path, target: Path, tmp_path: Path) -> None:
    settings = {
        "train__engine": {"name": "deepspeed", "ranks": None, "zero_stage": None},
        "train__objective__forget_weight": 0.1,
        "train__learning_rate": 1e-3,
        "train__num_train_epochs": 1,
        "sweep__start_points": [],
        "data__mmlu": None,
        "eval__max_new_tokens": 2,
    }
    run_train(experiment=experiment(tmp_path, data=data, target=target, **(OPEN | settings)))
    train = read_json(tmp_path / "small" / PLAN)["trials"]["trial-00"]["train"]
    assert (train["engine"]["ranks"], train["engine"]["zero_stage"], train["per_device_train_batch_size"]) == (1, 2, 4)
    (checkpoint,) = finished_checkpoints(tmp_path / "small" / "trials" / "trial-00")[-1:]
    assert read_json(checkpoint / "manifest.json")["train"]["per_device_train_batch_size"] == 4


# ---- what is printed


GOLDEN = """\
== Plan of small
  run folder   RUNS/small
  train        # forget rows, # retain rows
  validation   # forget rows, # retain rows
  test         # forget rows, # retain rows
  trained on   # forget rows, # retain rows
  nodes        2 nodes, each 16 CPU cores, 2 GPUs of 80.0 GiB (H100)
  engine       deepspeed, bfloat16
  sharding     1 rank, ZeRO-1, 8 pairs per pass, no recomputation: adapters train; it fits on one GPU, so nothing is shared out or \
communicated; # of 80.0 GiB
  memory       # GiB per rank: context #, buffers #; a GPU has 80.0 GiB
  resources    4 at a time, limited by 4 GPUs on 2 nodes; each has 1 rank with 1 CPU cores and 1 GPUs in all
  placement    a trial lies on one node (STRICT_PACK)
  order        longest first: trial-01, trial-02, trial-00, trial-03
  work         4 trials, # FLOPs of training, the longest #; # GPU-hours, # h from first to last (assumed: 20% of 989 TFLOP/s per GPU)
  disk         # KiB: checkpoints # KiB, merged model # KiB; # GiB free at RUNS
  trial-00     forget_weight=0.1, learning_rate=0.01, num_train_epochs=8  (# FLOPs)
  trial-01     forget_weight=0.4, learning_rate=0.02, num_train_epochs=20  (# FLOPs)
  trial-02     forget_weight=0.5, learning_rate=0.02, num_train_epochs=16  (# FLOPs)
  trial-03     forget_weight=0.1, learning_rate=1e+30, num_train_epochs=8  (# FLOPs)
"""
MEASURES = (
    r"[\d.]+(?= (?:forget|retain) rows)", r"[\d.e+-]+(?= FLOPs)", r"(?<=the longest )[\d.e+-]+", r"[\d.e+-]+(?= GPU-hours| h from)",
    r"[\d.]+(?= of 80)", r"(?<=memory       )[\d.]+", r"(?<=context )[\d.]+", r"(?<=buffers )[\d.]+",
    r"[\d.]+(?= KiB)", r"[\d.]+(?= GiB free)",
)  # fmt: skip
"""What depends on the documents and on the model's last byte, in the golden output a #."""


def test_the_plan_in_full(data: Path, target: Path, tmp_path: Path) -> None:
    text = "\n".join(printed(experiment(tmp_path, data=data, target=target, **OPEN), nodes=TWO_GPUS)) + "\n"
    text = text.replace(str(tmp_path), "RUNS")
    for measure in MEASURES:
        text = re.sub(measure, "#", text)
    assert text == GOLDEN


def test_a_plan_tells_the_memory_of_its_trials_once(data: Path, target: Path, tmp_path: Path) -> None:
    lines = printed(experiment(tmp_path, data=data, target=target))
    (sharding,) = lines_of("sharding", lines)
    assert sharding.startswith("1 rank, ZeRO-2, 8 pairs per pass") or sharding.startswith("1 rank, plain torch")
    (memory,) = lines_of("memory", lines)
    assert "MiB per rank: " in memory
    assert "no hours, because the speed of this hardware is not known" in lines_of("work", lines)[0]


def test_trials_that_take_different_memory_are_named(data: Path, target: Path, tmp_path: Path) -> None:
    points = {"train__lora__r": {"values": [2, 64]}, "sweep__start_points": [{"lora.r": 2}, {"lora.r": 64}, {"lora.r": 2}]}
    lines = lines_of("memory", printed(experiment(tmp_path, data=data, target=target, sweep__num_trials=3, **points)))
    assert [line.partition(": ")[0] for line in lines] == ["trial-00, trial-02", "trial-01"]


def test_nothing_is_said_of_a_target_that_is_still_to_be_built(data: Path, tmp_path: Path) -> None:
    lines = printed(experiment(tmp_path, data=data))
    assert lines_of("memory", lines) == ["not predicted: the target is still to be built"]
    assert lines_of("work", lines) == ["not known: the target is still to be built"]
    assert lines_of("disk", lines) == ["not known: the target is still to be built, or not understood"]


def test_nodes_that_are_alike_are_counted() -> None:
    head = Node("head", "", cpus=4, gpus=0)
    assert nodes_text((head, *TWO_GPUS)) == "head: 4 CPU cores; 2 nodes, each 16 CPU cores, 2 GPUs of 80.0 GiB (H100)"
    assert nodes_text((Node("x", "", cpus=1, gpus=1),)) == "x: 1 CPU core, 1 GPU of unknown memory"


def test_more_trials_than_are_known_are_counted(data: Path, target: Path, tmp_path: Path) -> None:
    """Eight trials, of which four are known: twice their operations."""
    loaded = experiment(tmp_path, data=data, target=target)
    plan = planned(loaded)
    four, eight = work_text(plan, config=loaded.config), work_text(replace(plan, total=8), config=loaded.config)
    assert (four.split()[0], eight.split()[0]) == ("4", "8")
    assert float(eight.split()[2]) == pytest.approx(2 * float(four.split()[2]), rel=0.1)


# ---- other machines


def test_a_laptop_plans_for_a_cluster(data: Path, tmp_path: Path) -> None:
    sweep = experiment(tmp_path, data=data).config.sweep
    nodes = imagined_nodes(NodesWanted(number=2, gpus=8, gpu_memory_gib=80), sweep=sweep)
    assert [(node.cpus, node.gpus, node.gpu_bytes) for node in nodes] == [(8, 8, 80 * GIB)] * 2
    halves = sweep.model_copy(update={"gpus_per_rank": 0.5, "cpus_per_rank": 3})
    assert imagined_nodes(NodesWanted(number=1, gpus=8, gpu_memory_gib=80), sweep=halves)[0].cpus == 48


def test_the_disk_here_says_nothing_about_machines_elsewhere(
    data: Path, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = experiment(tmp_path, data=data, target=target, **OPEN)
    validate_experiment(experiment=loaded, nodes=NodesWanted(number=2, gpus=2, gpu_memory_gib=80, gpu_name="H100"))
    lines = capsys.readouterr().out.splitlines()
    assert lines_of("nodes", lines) == ["2 nodes, each 2 CPU cores, 2 GPUs of 80.0 GiB (H100)"]
    assert "free at" not in lines_of("disk", lines)[0]
    assert lines[-1] == "valid"


# ---- disk


def test_a_disk_that_is_too_small_is_told(data: Path, target: Path, tmp_path: Path) -> None:
    loaded = experiment(tmp_path, data=data, target=target)
    plan = planned(loaded)
    short, enough = DiskPlan({"checkpoints": 3 * GIB}, free=2 * GIB), DiskPlan({"checkpoints": 3 * GIB}, free=4 * GIB)
    assert plan_warnings(plan, disk=enough, config=loaded.config) == []
    (warning,) = plan_warnings(plan, disk=short, config=loaded.config)
    assert "takes about 3.0 GiB, but 2.0 GiB are free" in warning
    assert disk_text(short, where="runs") == "3.0 GiB: checkpoints 3.0 GiB; 2.0 GiB free at runs"


@pytest.mark.parametrize("lora", [{"r": 8, "lora_alpha": 16, "lora_dropout": 0.0}, None], ids=["adapters", "whole model"])
def test_the_disk_that_is_told_is_the_disk_that_is_taken(data: Path, target: Path, tmp_path: Path, lora: dict | None) -> None:
    """Of a real trial: tensors of its checkpoints (the optimizer's state beside the last one only) and of the reference, in bytes. The plan
    also counts the state that is still there while the next is written."""
    settings = {
        "train__lora": lora,
        "train__objective": {"name": "npo_ce_kl"},
        "train__learning_rate": 1e-3,
        "train__num_train_epochs": 2,
        "train__checkpoints": 2,
        "train__signals": 0,
        "sweep__start_points": [],
        "sweep__num_trials": 1,
        "data__mmlu": None,
        "eval__max_new_tokens": 2,
    }
    loaded = experiment(tmp_path, data=data, target=target, **settings)
    plan = planned(loaded)
    disk = plan_disk(plan, config=loaded.config)
    assert disk is not None
    run_train(experiment=loaded)
    run = tmp_path / "small"
    checkpoints = finished_checkpoints(run / "trials" / "trial-00")
    assert len(checkpoints) == 2
    taken = sum(tensor_bytes(file) for folder in checkpoints for file in folder.glob("*.safetensors"))
    while_written = tensor_bytes(checkpoints[-1] / "optimizer.safetensors")
    assert disk.parts["checkpoints"] == taken + while_written
    assert disk.parts["reference"] == sum(tensor_bytes(file) for file in (run / "reference").rglob("*.safetensors"))
    assert disk.parts["merged model"] == sum(file.stat().st_size for file in target.glob("*.safetensors"))
    assert "target" not in disk.parts


def tensor_bytes(file: Path) -> int:
    """Bytes of a safetensors file's tensors: what comes after its header."""
    with file.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
        names = json.loads(stream.read(header))
    return max(entry["data_offsets"][1] for name, entry in names.items() if name != "__metadata__")


# ---- the nodes that there are


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A head without GPUs and a node that claims four, which cannot tell their memory because there are none."""
    from ray.cluster_utils import Cluster

    place = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    ours = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0, "include_dashboard": False, "temp_dir": place})
    try:
        ours.add_node(num_cpus=3, num_gpus=4, resources={"accelerator_type:A100": 1})
        monkeypatch.setenv("RAY_ADDRESS", ours.address)
        yield ours.address
    finally:
        ours.shutdown()
        shutil.rmtree(place, ignore_errors=True)


@pytest.mark.ray
def test_the_cluster_in_use_is_planned_for_and_left_alone(cluster: str, data: Path, target: Path, tmp_path: Path) -> None:
    import ray

    loaded = experiment(tmp_path, data=data, target=target, **OPEN)
    plan = plan_sweep(loaded, data=prepare_data(loaded.config))
    assert [(node.cpus, node.gpus, node.gpu_bytes, node.gpu_name) for node in plan.planner.nodes] == [
        (1, 0, None, None),
        (3, 4, None, "A100"),
    ]
    assert (plan.resources.concurrent, plan.resources.gpus_per_trial) == (3, 1)
    assert "limited by the CPU cores beside the GPUs on 2 nodes" in plan.resources.why
    assert not ray.is_initialized()


def test_without_a_cluster_it_is_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (node,) = available_nodes()
    assert (node.name, node.node_id) == ("this machine", "")
    assert node.cpus >= 1

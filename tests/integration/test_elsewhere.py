"""A driver on a machine without GPUs lets a machine that has them compute: what it finds is what it would have computed itself."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest

from launcher.elsewhere import wants_gpu_elsewhere
from launcher.nodes import Node
from tests.helpers.small_run import assert_same_facts, running, write_small_experiment
from tests.integration.conftest import FinishedSweep
from trainers.files import read_jsonl


@pytest.mark.parametrize(("address", "gpus", "wanted"), [("10.0.0.1:6379", 8.0, True), ("10.0.0.1:6379", 0.0, False), (None, 8.0, False)])
def test_only_a_cluster_with_gpus_is_asked(address, gpus, wanted, monkeypatch):
    import torch

    if address is None:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    else:
        monkeypatch.setenv("RAY_ADDRESS", address)
    nodes = [Node("head", "a", cpus=4, gpus=0), Node("worker", "b", cpus=4, gpus=gpus)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert wants_gpu_elsewhere(nodes) == wanted
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert not wants_gpu_elsewhere(nodes), "the driver's own GPU is nearer"


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_from_a_head_without_gpus_ends_with_the_same_numbers(undisturbed: FinishedSweep, tmp_path: Path):
    """The machine with the GPU is a second raylet that says it has one: what computes there is told by its id."""
    from ray.cluster_utils import Cluster

    place = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 0, "include_dashboard": False, "temp_dir": place})
    try:
        worker = cluster.add_node(num_cpus=2, num_gpus=1)
        file = write_small_experiment(tmp_path / "small.yaml", data=undisturbed.data, storage=tmp_path, sweep__gpus_per_rank=0.5)
        with running("sweep", file, folder=tmp_path, environment={"RAY_ADDRESS": cluster.address}) as command:
            assert command.wait() == 0, command.text()
    finally:
        cluster.shutdown()
        shutil.rmtree(place, ignore_errors=True)
    assert_same_facts(undisturbed.run, tmp_path / "small")
    computed = {
        event["work"]: event["node"] for event in read_jsonl(tmp_path / "small" / "events.jsonl") if event["kind"] == "computed_elsewhere"
    }
    assert set(computed) == {
        "build_target_ahead",
        "score_baseline_ahead",
        "prepare_references_ahead",
        "score_delivered_ahead",
        "score_merges_ahead",
    }
    assert set(computed.values()) == {worker.node_id}

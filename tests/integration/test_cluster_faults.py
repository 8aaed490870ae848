"""A trial whose ranks sit on two machines, and machines that go away: several raylets of one computer stand for them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers.gang_runs import (
    LOSS_TOLERANCE,
    NUM_STEPS,
    TRIAL,
    WEIGHT_TOLERANCE,
    gang,
    largest_difference,
    losses_of,
    named,
    starts_of,
    status_of,
    weights_of,
)
from tests.helpers.small_run import Command, assert_same_facts, running, write_small_experiment
from tests.integration.conftest import FinishedSweep
from tests.integration.test_kills import steps_done

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that computes nothing and two machines of one core each: a trial of two ranks needs both."""
    from ray.cluster_utils import Cluster

    place = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "temp_dir": place})
    try:
        for _ in range(2):
            found.add_node(num_cpus=1)
        yield found
    finally:
        found.shutdown()
        shutil.rmtree(place, ignore_errors=True)


def rank_processes() -> list[psutil.Process]:
    """The processes of ranks below this one, on whichever machine of the cluster."""
    return named(psutil.Process().children(recursive=True), "RankActor")


def spread(folder: Path, *, undisturbed: FinishedSweep, **changes: Any) -> Path:
    """The experiment of a trial on two ranks under ZeRO-3, each with a core of its own."""
    folder.mkdir()
    return write_small_experiment(
        folder / "small.yaml",
        data=undisturbed.data,
        storage=folder,
        target=undisturbed.run / "target",
        **gang(3, sweep__cpus_per_rank=1.0, **changes),
    )


@pytest.fixture(scope="module")
def two_machines(cluster: Any, undisturbed: FinishedSweep, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of one trial whose ranks sit on two machines; the run folder."""
    root = tmp_path_factory.mktemp("two-machines")
    file = spread(root / "run", undisturbed=undisturbed)
    with running("sweep", file, folder=root, environment={"RAY_ADDRESS": cluster.address}) as command:
        assert command.wait() == 0, command.text()
    assert rank_processes() == [], "ranks outlived their sweep on machines that go on"
    return root / "run" / "small"


def test_ranks_on_two_machines_agree_with_one(two_machines: Path, alone: Path) -> None:
    trial = two_machines / TRIAL
    status = status_of(two_machines)
    assert (status["state"], status["errors"], status["preemptions"]) == ("finished", 0, 0)
    leader, first, second = status["nodes"]
    assert leader == first
    assert first != second, "one rank on each machine"
    assert len(losses_of(trial)) == NUM_STEPS
    assert losses_of(trial) == pytest.approx(losses_of(alone), abs=LOSS_TOLERANCE)
    assert largest_difference(weights_of(trial), weights_of(alone)) < WEIGHT_TOLERANCE


def lose(cluster: Any, node_id: str) -> None:
    """A machine goes away without a word."""
    (node,) = [node for node in cluster.worker_nodes if node.node_id == node_id]
    cluster.remove_node(node, allow_graceful=False)


def test_a_trial_outlives_the_machines_of_its_ranks(cluster: Any, two_machines: Path, undisturbed: FinishedSweep, tmp_path: Path) -> None:
    """First the machine of rank 1 goes, then that of rank 0 and of the process that leads both; errors may not happen at all."""
    file = spread(tmp_path / "run", undisturbed=undisturbed, sweep__max_failures=0)
    run = tmp_path / "run" / "small"

    def survive(command: Command, *, rank: int, after: int, losses: int) -> None:
        command.until(lambda: steps_done(run, "trial-00") > after, what=f"step {after}")
        ranks = rank_processes()
        lose(cluster, status_of(run)["nodes"][1 + rank])
        command.until(lambda: not any(process.is_running() for process in ranks), what="end of all ranks")
        cluster.add_node(num_cpus=1)
        command.until(lambda: status_of(run).get("preemptions") == losses, what="record of the loss")

    with running("sweep", file, folder=tmp_path, environment={"RAY_ADDRESS": cluster.address}) as command:
        survive(command, rank=1, after=8, losses=1)
        survive(command, rank=0, after=16, losses=2)
        assert command.wait() == 0, command.text()
    assert rank_processes() == []
    status = status_of(run)
    assert (status["state"], status["reason"], status["errors"], status["preemptions"]) == ("finished", None, 0, 2)
    assert starts_of(run) == [False, True, True]
    assert_same_facts(run, two_machines)

"""Machines that share nothing but the URI of a run: each has a home folder, and so a working copy, of its own."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from launcher.nodes import living_nodes
from launcher.storage_probe import absent_paths, check_cluster_storage, check_shared, probe_storage
from tests.helpers.gang_runs import LOSS_TOLERANCE, TRIAL, gang, losses_of, status_of
from tests.helpers.small_run import facts, running, stamps, wait_for_end, write_small_experiment
from tests.integration.conftest import FinishedSweep
from trainers.errors import SetupError
from trainers.files import read_json, read_jsonl

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def homes() -> Iterator[Path]:
    """Home folders of the machines, by name."""
    place = Path(tempfile.mkdtemp(prefix="homes-", dir="/tmp"))
    yield place
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(homes: Path) -> Iterator[Any]:
    """A head that computes nothing, and two machines of one core."""
    from ray.cluster_utils import Cluster

    def variables(name: str) -> dict[str, str]:
        (homes / name).mkdir()
        return {"HOME": str(homes / name)}

    token, patch = Path.home() / ".ray" / "auth_token", pytest.MonkeyPatch()
    if token.exists():
        # A private Ray that this process started before has turned its token on, which is looked for in the home folder.
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))

    temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": temporary, "env_vars": variables("head")}
    found = Cluster(initialize_head=True, head_node_args=head)
    try:
        for name in ("first", "second"):
            found.add_node(num_cpus=1, env_vars=variables(name))
        yield found
    finally:
        found.shutdown()
        patch.undo()
        shutil.rmtree(temporary, ignore_errors=True)


def working_copies(home: Path) -> list[Path]:
    return sorted(home.glob(".cache/unlearn/runs/*/*"))


def started(run: Path, stage: str) -> bool:
    return any(event["kind"] == "stage_started" and event["stage"] == stage for event in read_jsonl(run / "events.jsonl"))


def test_a_sweep_goes_on_from_its_uri_alone_when_driver_and_machine_are_gone(
    cluster: Any, homes: Path, undisturbed: FinishedSweep, tmp_path: Path
) -> None:
    """Killed after its trials, and the driver's machine with it: another one repeats none, and finds what an undisturbed run finds."""
    file = write_small_experiment(tmp_path / "small.yaml", data=undisturbed.data, storage=f"file://{tmp_path}/bucket", pairs__workers=2)
    home = tmp_path / "bucket" / "small"
    shutil.copytree(undisturbed.run / "target", home / "target")
    environment = {"RAY_ADDRESS": cluster.address, "HOME": str(homes / "head")}
    with running("sweep", file, folder=tmp_path, environment=environment) as command:
        copy = command.until(lambda: working_copies(homes / "head"), what="a working copy")[0]
        command.until(lambda: started(copy, "pairs"), what="the pairs stage")
        command.kill()
        wait_for_end(command, limit_s=60, but=("Agent",))
    assert all(working_copies(homes / name) for name in ("first", "second")), "both machines computed"
    done = stamps(home / "trials")
    assert {name.split("/")[0] for name in done if name.endswith("eval.json")} == {"trial-00", "trial-01", "trial-02"}
    shutil.rmtree(homes / "head")
    (homes / "new head").mkdir()
    environment["HOME"] = str(homes / "new head")
    with running("sweep", file, folder=tmp_path, environment=environment) as command:
        assert command.wait() == 0, command.text()
        assert f"home     file://{tmp_path}/bucket/small" in command.text()
    assert stamps(home / "trials") == done, "trials that had ended were made again"
    ours, theirs = facts(home), facts(undisturbed.run)
    assert (ours["pairs"]["config"].pop("workers"), theirs["pairs"]["config"].pop("workers")) == (2, None)
    assert sorted(ours) == sorted(theirs)
    for name in ours:
        assert ours[name] == theirs[name], f"{name} differs"
    (copy,) = working_copies(homes / "new head")
    assert read_json(copy / "results.json") == read_json(home / "results.json")
    assert not list(copy.glob("trials/*/checkpoints/*/optimizer.safetensors")), "what only training reads was not fetched"


def test_ranks_on_two_machines_that_share_a_uri_only(cluster: Any, homes: Path, undisturbed: FinishedSweep, tmp_path: Path) -> None:
    """A trial's leader, and its ranks under ZeRO-3, read status and checkpoints of each other through the home."""
    changes = gang(3, sweep__cpus_per_rank=1.0)
    file = write_small_experiment(
        tmp_path / "small.yaml", data=undisturbed.data, storage=f"file://{tmp_path}/bucket", target=undisturbed.run / "target", **changes
    )
    (homes / "another head").mkdir()
    environment = {"RAY_ADDRESS": cluster.address, "HOME": str(homes / "another head")}
    with running("sweep", file, folder=tmp_path, environment=environment) as command:
        assert command.wait() == 0, command.text()
    home = tmp_path / "bucket" / "small"
    status = status_of(home)
    assert (status["state"], status["errors"], status["preemptions"]) == ("finished", 0, 0)
    assert len(set(status["nodes"])) == 2
    assert {path.name for path in (home / TRIAL / "logs").iterdir()} == {"rank-0.log", "rank-1.log"}
    assert (home / TRIAL / "eval.json").exists()
    assert losses_of(home / TRIAL) == pytest.approx(losses_of(working_copies(homes / "another head")[0] / TRIAL), abs=LOSS_TOLERANCE)


@pytest.fixture
def connected(cluster: Any) -> Iterator[None]:
    ray.init(address=cluster.address, log_to_driver=False)
    yield
    ray.shutdown()


def test_a_folder_that_the_machines_do_not_share_is_found_out(connected: None, homes: Path, tmp_path: Path) -> None:
    """The same path is another folder on each machine; the probe leaves nothing behind."""
    nodes = living_nodes()
    assert len(nodes) == 3
    seen = probe_storage("~/runs/small", nodes=nodes)
    assert [one.error for one in seen] == [None] * 3
    assert [len(one.missing) for one in seen] == [2, 2, 2]
    with pytest.raises(SetupError) as caught:
        check_shared("~/runs/small", seen=seen)
    text = str(caught.value)
    assert "the storage is not shared" in text
    assert all(node.name in text for node in nodes)
    assert "s3://BUCKET/runs" in text
    assert not list(homes.glob("*/runs")), "the folders that it made are gone again"
    # Negative control: a folder of this one computer is the same for all of them, and so is a URI.
    for place in (tmp_path / "runs" / "small", f"file://{tmp_path}/bucket/small"):
        seen = probe_storage(place, nodes=nodes)
        check_shared(place, seen=seen)
        assert all(one.missing == () and one.free_bytes for one in seen)
    assert not list(tmp_path.rglob(".probe*"))
    assert not (tmp_path / "runs").exists()


def test_a_storage_that_a_machine_cannot_use_and_a_model_that_it_lacks_are_named(connected: None, homes: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    seen = probe_storage(tmp_path / "file" / "runs", nodes=living_nodes())
    with pytest.raises(SetupError, match=r"cannot use the storage(.|\n)*mount it there"):
        check_shared(tmp_path / "file" / "runs", seen=seen)
    assert check_cluster_storage(tmp_path, needed=[tmp_path]) in ([], check_cluster_storage(tmp_path))
    with pytest.raises(SetupError, match=f"does not have {tmp_path}/model"):
        check_cluster_storage(tmp_path, needed=[tmp_path / "model"])
    assert absent_paths([str(tmp_path), str(tmp_path / "model")]) == [str(tmp_path / "model")]

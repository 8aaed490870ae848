"""What the doctor says of a cluster: pure checks with their failures, and a cluster of two nodes for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from launcher import doctor, doctor_cluster
from launcher.check import GIB
from launcher.gpus import Gpu, parse_gpus, parse_processes
from launcher.node_facts import NodeFacts, source_hash
from launcher.nodes import Node, cluster_nodes
from launcher.ping import Seat, ping_nodes

NODE = Node(name="worker-1", node_id="b" * 56, cpus=8, gpus=1)
VERSIONS = {"python": "3.11.7", "torch": "2.6.0+cu124", "ray": "2.60.0", "cuda": "12.4"}
FACTS = NodeFacts(versions=VERSIONS, gpus=(), processes=(), free_bytes=100 * GIB, interface="eth1", loopback=False)
SMI_GPUS = "0, GPU-aa, NVIDIA H100 80GB HBM3, 81559, 80994\n1, GPU-bb, NVIDIA H100 80GB HBM3, 81559, 50000\n"
SMI_PROCESSES = f"GPU-bb, {os.getpid()}, python3, 31000\nGPU-bb, 4194000, [Not Found], [N/A]\nGPU-zz, 7, other, 5\n"


# ---- GPUs


def test_gpus_are_read_from_nvidia_smi() -> None:
    first, second = parse_gpus(SMI_GPUS + "something else\n2, GPU-cc, broken, [N/A], [N/A]\n")
    assert first == Gpu(0, "GPU-aa", "NVIDIA H100 80GB HBM3", 81559 << 20, 80994 << 20)
    assert (second.index, second.free_bytes) == (1, 50000 << 20)


def test_processes_are_read_with_their_users_and_those_of_other_gpus_left_out() -> None:
    ours, hidden = parse_processes(SMI_PROCESSES, gpus=parse_gpus(SMI_GPUS))
    assert (ours.gpu, ours.pid, ours.name, ours.used_bytes) == (1, os.getpid(), "python3", 31000 << 20)
    assert ours.user
    assert (hidden.user, hidden.used_bytes) == (None, None)


def test_a_foreign_process_is_named_with_its_owner_and_left_alone() -> None:
    process = parse_processes(SMI_PROCESSES, gpus=parse_gpus(SMI_GPUS))[0]
    (check,) = doctor.gpu_processes([replace(process, pid=77, user="bob")], where="node worker-1, ")
    assert (check.status, check.text) == ("warn", "node worker-1, GPU 1: python3 (pid 77 of bob) holds 30.3 GiB")
    assert "nothing is stopped" in (check.fix or "")


def test_a_node_shows_its_disk_its_gpus_and_who_is_on_them() -> None:
    gpus = parse_gpus(SMI_GPUS)
    facts = replace(FACTS, gpus=gpus, processes=parse_processes(SMI_PROCESSES, gpus=gpus)[:1])
    node, free, busy, holder = doctor_cluster.describe_node(NODE, facts=facts, error=None)
    assert [check.status for check in (node, free, busy, holder)] == ["pass", "pass", "warn", "warn"]
    assert node.text == "node worker-1: 8 CPU cores, 1 GPUs, 100 GiB free on disk"
    (full,) = doctor_cluster.describe_node(NODE, facts=replace(FACTS, free_bytes=GIB), error=None)
    assert full.status == "warn"
    (absent,) = doctor_cluster.describe_node(NODE, facts=None, error="No module named 'launcher'")
    assert (absent.status, absent.fix) == ("fail", "install unlearn-ties there")


# ---- versions


def compare(**others: dict[str, str | None]) -> list[Any]:
    return list(doctor_cluster.compare_versions({"head": VERSIONS, **others}))


def test_equal_versions_are_one_line() -> None:
    (check,) = compare(worker=VERSIONS)
    assert check.status == "pass"
    assert check.text == "the same versions on 2 nodes: python 3.11.7, torch 2.6.0, ray 2.60.0, cuda 12.4"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"torch": "2.5.1+cu124"}, "torch 2.5.1 (here 2.6.0)"),
        ({"ray": None}, "ray missing (here 2.60.0)"),
        ({"python": "3.11.8", "cuda": "11.8"}, "python 3.11.8 (here 3.11.7), cuda 11.8 (here 12.4)"),
    ],
)
def test_a_node_with_other_versions_fails_and_they_are_named(change: dict[str, str | None], words: str) -> None:
    (check,) = compare(good=VERSIONS, bad=VERSIONS | change)
    assert (check.status, check.text) == ("fail", f"node bad: {words}")


def test_a_node_without_cuda_is_no_fault_but_two_cudas_are() -> None:
    cpu = VERSIONS | {"torch": "2.6.0+cpu", "cuda": None}
    assert [check.status for check in compare(worker=cpu)] == ["pass"]
    checks = list(doctor_cluster.compare_versions({"head": cpu, "a": VERSIONS, "b": VERSIONS | {"cuda": "11.8"}}))
    assert [check.text for check in checks] == ["node b: cuda 11.8 (here 12.4)"]


def test_the_source_hash_follows_every_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed line changes it, a file of another kind does not."""
    from launcher import node_facts

    for package in node_facts.OURS:
        (tmp_path / package).mkdir()
        (tmp_path / package / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(node_facts, "__file__", str(tmp_path / "launcher" / "node_facts.py"))
    before = source_hash()
    (tmp_path / "eval" / "notes.txt").write_text("nothing")
    assert source_hash() == before
    (tmp_path / "eval" / "a.py").write_text("x = 2\n")
    assert source_hash() != before


# ---- network, storage, keys


def test_the_fix_of_a_failed_ping_names_the_interface_that_has_the_nodes_address() -> None:
    fix = doctor_cluster.network_fix("nccl", replace(FACTS, loopback=True))
    assert "NCCL_SOCKET_IFNAME=eth1" in fix
    assert "127.0.0.1" in fix
    assert "127.0.0.1" not in doctor_cluster.network_fix("gloo", FACTS)


def test_one_node_needs_no_network() -> None:
    (check,) = doctor_cluster.check_network([NODE], facts={NODE: FACTS})
    assert (check.status, check.text) == ("pass", "one node: no rank needs the network")


def test_a_folder_that_cannot_hold_runs_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert doctor.check_storage(str(tmp_path / "new" / "runs")).status == "pass"
    assert doctor.check_storage(str(tmp_path / "file" / "runs")).status == "fail"
    assert doctor.check_storage("s3://bucket/runs").status == "warn"
    assert not (tmp_path / "new").exists()


def test_keys_are_yes_or_no(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hf_secret")
    assert "token: yes" in doctor.check_hub({"HF_HOME": str(tmp_path)}).text
    assert "token: yes" in doctor.check_hub({"HF_TOKEN": "hf_secret", "HF_HOME": str(tmp_path / "none")}).text
    absent = doctor.check_hub({"HF_HOME": str(tmp_path / "none")})
    assert "token: no" in absent.text
    assert "hf_secret" not in absent.text


def test_nothing_is_compiled_and_the_compiler_is_found_where_cuda_is(tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("")
    nvcc.chmod(0o755)
    check = doctor.check_compiler({"CUDA_HOME": str(tmp_path), "PATH": ""})
    assert check.status == "pass"
    assert "will compile nothing" in check.text
    assert "nvcc: no" not in check.text


def test_a_cluster_that_wants_a_token_is_told_apart_by_what_lies_here(tmp_path: Path) -> None:
    token = tmp_path / "token"
    given = {"RAY_ADDRESS": "10.0.0.1:6379", "RAY_AUTH_TOKEN_PATH": str(token)}
    assert "RAY_AUTH_MODE" not in doctor_cluster._connect_fix(given)
    token.write_text("x")
    assert "RAY_AUTH_MODE=token" in doctor_cluster._connect_fix(given)
    assert "RAY_AUTH_MODE" not in doctor_cluster._connect_fix(given | {"RAY_AUTH_MODE": "token"})


# ---- two nodes


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of two raylets on this machine, to which this process is connected."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster.address
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.ray
@pytest.mark.slow
def test_two_nodes_agree_reach_each_other_and_share_the_storage(cluster: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "doctor", "--cluster", "--storage", str(tmp_path / "runs")],
        env={**os.environ, "RAY_ADDRESS": cluster, "WANDB_API_KEY": "f" * 40},
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert sum(line.startswith("pass  node ") for line in lines) == 2
    assert any(line.startswith("pass  the same versions on 2 nodes: python ") for line in lines)
    assert any(line.startswith("pass  gloo: 2 nodes summed a number in ") for line in lines)
    assert any(line == f"pass  storage {tmp_path / 'runs'}: 2 nodes wrote there and read what the others wrote" for line in lines)
    assert "f" * 40 not in done.stdout + done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_nodes_that_do_not_reach_each_other_are_told_in_bounded_time(cluster: str) -> None:
    """192.0.2.1 is an address of nobody (RFC 5737): the first rank listens, and nobody gets there."""
    nodes = cluster_nodes()
    answers = ping_nodes(nodes, backend="gloo", timeout_s=3, meet_at=("192.0.2.1", 40123))
    assert len(answers) == 2
    assert all(answer.value is None and answer.error for answer in answers)
    assert all(answer.error is None for answer in ping_nodes(nodes, backend="gloo"))


def test_a_rank_that_waits_alone_gives_up(tmp_path: Path) -> None:
    """The other rank never comes: the process ends by itself, with an error that says so."""
    with tempfile.TemporaryDirectory():
        seat = Seat(backend="gloo", host="127.0.0.1", port=_free_port(), rank=0, world_size=2, timeout_s=1.0)
        done = subprocess.run(
            [sys.executable, "-m", "launcher.ping", json.dumps(asdict(seat))], capture_output=True, text=True, cwd=tmp_path, timeout=120
        )
    assert done.returncode != 0
    assert "Error" in done.stderr


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

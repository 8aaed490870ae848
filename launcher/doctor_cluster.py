"""What a Ray cluster can run: its nodes, whether they agree on versions, reach each other and share the storage."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.check import GIB, Check, first_line
from launcher.doctor import gpu_processes
from launcher.node_facts import NodeFacts, node_facts
from launcher.nodes import Node, ask_nodes, cluster_nodes
from launcher.ping import PING_S, Backend, ping_nodes
from launcher.storage_place import is_uri
from trainers.errors import SetupError

MIN_DISK = 20 * GIB
"""Free on each node: Ray's object store spills there, and so does what trials write in passing."""


def check_cluster(*, storage: str | None = None) -> Iterator[Check]:
    """Every check of the Ray cluster in RAY_ADDRESS, or of the one that runs on this machine.

    Raises:
        SetupError: if there is no cluster.
    """
    import ray

    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        raise SetupError(
            "no Ray cluster to connect to",
            where=f"RAY_ADDRESS = {os.environ.get('RAY_ADDRESS', '(not set)')}",
            why=first_line(error),
            fix=_connect_fix(os.environ),
        ) from None
    try:
        yield from dead_nodes(ray.nodes())
        yield from check_nodes(cluster_nodes(), storage=storage)
    finally:
        ray.shutdown()


def check_nodes(nodes: Sequence[Node], *, storage: str | None = None, ping_s: float = PING_S) -> Iterator[Check]:
    """The living nodes of the connected cluster: facts, versions, network, storage."""
    facts: dict[Node, NodeFacts] = {}
    for answer in ask_nodes(node_facts, nodes=tuple(nodes), gpus=True):
        if answer.error is None:
            facts[answer.node] = answer.value
        yield from describe_node(answer.node, facts=answer.value, error=answer.error)
    yield from compare_versions({node.name: found.versions for node, found in facts.items()})
    yield from check_network(tuple(facts), facts=facts, ping_s=ping_s)
    yield from check_storage(tuple(facts), storage=storage)


def dead_nodes(listed: Sequence[Mapping[str, Any]]) -> Iterator[Check]:
    """A warning for every node that Ray lost."""
    for node in listed:
        if not node["Alive"]:
            name = node.get("NodeManagerHostname") or node["NodeID"][:8]
            fix = "the cluster works without it; restart it with `ray start --address=HEAD:6379`"
            yield Check("warn", f"node {name} is dead", fix)


def describe_node(node: Node, *, facts: NodeFacts | None, error: str | None) -> Iterator[Check]:
    """What a node has, and who else uses its GPUs."""
    text = f"node {node.name}: {node.cpus:g} CPU cores, {node.gpus:g} GPUs"
    if facts is None:
        fix = "install unlearn-ties there" if "No module named" in (error or "") else "restart Ray on that node"
        yield Check("fail", f"{text}; it does not answer: {error}", fix)
        return
    text += f", {facts.free_bytes / GIB:.0f} GiB free on disk"
    if facts.free_bytes < MIN_DISK:
        yield Check("warn", text, f"free some space there, or give Ray another disk: RAY_TMPDIR before `ray start`; {MIN_DISK // GIB} GiB")
    else:
        yield Check("pass", text)
    for gpu in facts.gpus:
        text = f"node {node.name}, GPU {gpu.index}: {gpu.name}, {gpu.free_bytes / GIB:.0f} of {gpu.total_bytes / GIB:.0f} GiB free"
        busy = gpu.free_bytes < 0.9 * gpu.total_bytes
        yield Check("warn", text, "a process holds its memory; trials of a running sweep do, too") if busy else Check("pass", text)
    yield from gpu_processes(facts.processes, where=f"node {node.name}, ")


def compare_versions(found: Mapping[str, Mapping[str, str | None]]) -> Iterator[Check]:
    """Whether all nodes have the versions of the first; a build of torch for another CUDA counts as the same torch.

    CUDA itself is compared among the nodes that have it: a head without GPUs may have a build of torch without CUDA.
    """
    if not found:
        return
    first, *others = found
    expected = {key: _public(value) for key, value in found[first].items()}
    if expected.get("cuda") is None:
        expected["cuda"] = next((versions["cuda"] for versions in found.values() if versions.get("cuda")), None)
    agree = True
    for name in others:
        there = {key: _public(value) for key, value in found[name].items()}
        different = [key for key in expected if there.get(key) != expected[key] and not (key == "cuda" and there.get(key) is None)]
        if different:
            agree = False
            words = ", ".join(f"{key} {there.get(key) or 'missing'} (here {expected[key] or 'missing'})" for key in different)
            yield Check("fail", f"node {name}: {words}", "install the same versions on all nodes: one image, or one constraints file")
    if agree:
        words = ", ".join(f"{key} {value}" for key, value in expected.items() if value)
        yield Check("pass", f"the same versions on {_count(len(found), 'node')}: {words}")


def check_network(nodes: Sequence[Node], *, facts: Mapping[Node, NodeFacts], ping_s: float = PING_S) -> Iterator[Check]:
    """Whether ranks on different nodes can talk: gloo over all nodes, NCCL over those with GPUs."""
    if len(nodes) < 2:
        yield Check("pass", "one node: no rank needs the network")
        return
    with_gpus = [node for node in nodes if facts[node].gpus]
    rings: list[tuple[Backend, Sequence[Node]]] = [("gloo", nodes)]
    if len(with_gpus) > 1:
        rings.append(("nccl", with_gpus))
    for backend, members in rings:
        answers = ping_nodes(members, backend=backend, timeout_s=ping_s)
        silent = [answer for answer in answers if answer.error is not None]
        for answer in silent:
            yield Check("fail", f"{backend}: node {answer.node.name}: {answer.error}", network_fix(backend, facts[answer.node]))
        if not silent:
            slowest = max(answer.value for answer in answers)
            yield Check("pass", f"{backend}: {_count(len(members), 'node')} summed a number in {slowest:.1f} s")


def network_fix(backend: Backend, facts: NodeFacts) -> str:
    """What to do about a node that the others do not reach."""
    setting = f"{backend.upper()}_SOCKET_IFNAME={facts.interface or 'eth0'}"
    why = " (the node's own name stands for 127.0.0.1)" if facts.loopback else ""
    return f"open all ports between the nodes, and set {setting}{why} before `ray start` on this node"


def check_storage(nodes: Sequence[Node], *, storage: str | None) -> Iterator[Check]:
    """Whether every node writes to the storage and reads there what the others wrote."""
    from launcher.storage_probe import probe_storage

    if storage is None:
        yield Check("pass", "storage: not checked; `unlearn doctor --cluster --storage PATH` writes and reads there from every node")
        return
    agree = True
    for seen in probe_storage(storage if is_uri(storage) else Path(storage).expanduser().resolve(), nodes=nodes):
        if seen.error is not None:
            agree = False
            yield Check("fail", f"storage {storage}: node {seen.node.name}: {seen.error}", "mount it there, with permission to write")
        elif seen.missing:
            agree = False
            others = ", ".join(seen.missing)
            yield Check(
                "fail",
                f"storage {storage}: node {seen.node.name} does not see what {others} wrote",
                "name a folder that all nodes mount under the same path, or a URI such as s3://BUCKET/runs",
            )
    if agree:
        yield Check("pass", f"storage {storage}: {_count(len(nodes), 'node')} wrote there and read what the others wrote")


def _public(version: str | None) -> str | None:
    """A version without its local part: 2.6.0 for 2.6.0+cu124."""
    return version.split("+")[0] if version else None


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _connect_fix(environment: Mapping[str, str]) -> str:
    """A cluster that asks for a token says no more than that it cannot be reached, and an address that is given asks for none by itself."""
    start = "start one with `ray start --head` or `ray up cluster.yaml`, or run this on its head node"
    token = Path(environment.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    if environment.get("RAY_ADDRESS") and not environment.get("RAY_AUTH_MODE") and (environment.get("RAY_AUTH_TOKEN") or token.exists()):
        return f"export RAY_AUTH_MODE=token if the cluster was started with a token; else {start}"
    return start

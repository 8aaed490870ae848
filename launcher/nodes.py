"""The machines that a sweep may use: their cores, GPUs and memory, and a way to ask each of them something."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

ANSWER_S = 60.0
"""Seconds that a node has to answer; starting a process there is most of it."""


@dataclass(frozen=True)
class Node:
    """One machine.

    Args:
        name: host name, and the start of its id where Ray has one.
        node_id: Ray's id; empty for this machine without Ray.
        cpus: cores that may be reserved.
        gpus: GPUs that may be reserved.
        gpu_bytes: memory of its smallest GPU; None if it has none or it is not known.
        gpu_name: of its GPUs, as the driver or Ray calls them; None if it has none or it is not known.
    """

    name: str
    node_id: str
    cpus: float
    gpus: float
    gpu_bytes: int | None = None
    gpu_name: str | None = None


@dataclass(frozen=True)
class Answer:
    """What a node said: a value, or why there is none."""

    node: Node
    value: Any = None
    error: str | None = None


def this_machine() -> Node:
    """The machine that this process runs on."""
    import torch

    number = torch.cuda.device_count()
    return Node(
        name="this machine",
        node_id="",
        cpus=float(os.cpu_count() or 1),
        gpus=float(number),
        gpu_bytes=smallest_gpu_bytes(),
        gpu_name=torch.cuda.get_device_name(0) if number else None,
    )


def smallest_gpu_bytes() -> int | None:
    """Memory of this machine's smallest GPU, bytes; None without GPUs."""
    import torch

    sizes = [int(torch.cuda.get_device_properties(index).total_memory) for index in range(torch.cuda.device_count())]
    return min(sizes, default=None)


def cluster_nodes() -> tuple[Node, ...]:
    """The living nodes of the connected Ray cluster, the driver's first; GPU memory is asked of each node that has GPUs."""
    found = living_nodes()
    sizes = {
        answer.node.node_id: answer.value
        for answer in ask_nodes(smallest_gpu_bytes, nodes=[node for node in found if node.gpus], gpus=True)
    }
    return tuple(replace(node, gpu_bytes=sizes.get(node.node_id)) for node in found)


def living_nodes() -> list[Node]:
    """The same without the memory of their GPUs: nothing is asked of them."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    found = [
        Node(
            name=f"{node['NodeManagerHostname']}/{node['NodeID'][:8]}",
            node_id=node["NodeID"],
            cpus=float(node["Resources"].get("CPU", 0)),
            gpus=float(node["Resources"].get("GPU", 0)),
            gpu_name=next((name.partition(":")[2] for name in node["Resources"] if name.startswith("accelerator_type:")), None),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    found.sort(key=lambda node: (node.node_id != here, node.name))
    return found


def ask_nodes(
    question: Callable[..., Any], *arguments: Any, nodes: list[Node] | tuple[Node, ...], gpus: bool = False, timeout_s: float = ANSWER_S
) -> list[Answer]:
    """Call a function once on every node, at the same time; a node that fails or keeps silent is an answer, too.

    It reserves nothing, so that it also runs where trials occupy everything.

    Args:
        question: importable on every node.
        arguments: of it.
        nodes: of the connected Ray cluster.
        gpus: whether the function must see all GPUs of its node.
        timeout_s: seconds until a node that has not answered counts as silent.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Ray hides GPUs from a task that reserves none, unless told to leave their visibility alone.
    environment = {"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}} if gpus else {}
    task: Any = ray.remote(num_cpus=0, max_retries=0)(question)
    calls = {
        task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node.node_id, soft=False),
            **({"runtime_env": environment} if environment else {}),
        ).remote(*arguments): node
        for node in nodes
    }
    if not calls:
        return []
    ready, _ = ray.wait(list(calls), num_returns=len(calls), timeout=timeout_s)
    answers = []
    for call, node in calls.items():
        if call not in ready:
            ray.cancel(call, force=True)
            answers.append(Answer(node, error=f"no answer within {timeout_s:g} s"))
            continue
        try:
            answers.append(Answer(node, value=ray.get(call)))
        except Exception as error:
            cause = getattr(error, "cause", None) or error
            answers.append(Answer(node, error=(str(cause).strip().splitlines() or [type(cause).__name__])[0]))
    return answers

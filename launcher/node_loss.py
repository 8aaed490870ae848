"""Whether a machine of the cluster is gone, which Ray itself may take a while to notice."""

from __future__ import annotations

from collections.abc import Sequence

ANSWER_S = 30.0
"""Seconds after which a machine that does not answer counts as lost; Ray's own health check takes about as long."""


def lost_nodes(node_ids: Sequence[str], *, timeout_s: float = ANSWER_S) -> list[str]:
    """Those of some nodes that are gone: Ray knows, or they do not answer. This process's own node is there.

    Args:
        node_ids: Ray's ids.
        timeout_s: seconds that a node has to answer.
    """
    import ray

    from launcher.nodes import Node, ask_nodes

    here = ray.get_runtime_context().get_node_id()
    asked = sorted(set(node_ids) - {here})
    known = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    gone = [node_id for node_id in asked if node_id not in known]
    if gone or not asked:
        return gone
    answers = ask_nodes(_answer, nodes=[Node(node_id[:8], node_id, cpus=0, gpus=0) for node_id in asked], timeout_s=timeout_s)
    return [answer.node.node_id for answer in answers if answer.error is not None]


def _answer() -> bool:
    return True

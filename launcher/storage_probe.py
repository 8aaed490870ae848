"""Whether all machines of a cluster see the same storage: each writes a file there, and looks for those of the others."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.config import ExperimentConfig
from launcher.nodes import Answer, Node, ask_nodes, living_nodes
from launcher.storage import ask_home, open_filesystem
from launcher.storage_place import cache_root, is_uri, redacted
from trainers.errors import SetupError

PROBE_S = 30.0
"""Seconds that each node has for each of the three questions."""
SEEN_S = 5.0
"""Seconds after which a file that another machine has written counts as not there: shared file systems show it late."""
LOW_BYTES = 5 << 30


@dataclass(frozen=True)
class Seen:
    """What one node found.

    Args:
        node: the node.
        error: why it could not write or read there; None if it could.
        missing: names of the nodes whose files it does not see.
        free_bytes: free on the disk that takes what it writes; of a URI's working copies, if the storage is one.
    """

    node: Node
    error: str | None = None
    missing: tuple[str, ...] = ()
    free_bytes: int | None = None


@dataclass(frozen=True)
class Written:
    """What a node left: its free disk, and the folders that it had to make."""

    free_bytes: int
    made: tuple[str, ...]


def probe_storage(place: str | Path, *, nodes: Sequence[Node], timeout_s: float = PROBE_S) -> tuple[Seen, ...]:
    """Write a file from every node, look for it on every other one, and leave nothing behind.

    Args:
        place: an absolute folder or a URI.
        nodes: of the connected Ray cluster.
        timeout_s: seconds until a node that has not answered a question counts as silent.
    """
    place, token = str(place), uuid.uuid4().hex[:12]
    written = ask_nodes(write_probe, place, token, nodes=list(nodes), timeout_s=timeout_s)
    wrote = [answer for answer in written if answer.error is None]
    names = {answer.node.node_id: answer.node.name for answer in wrote}
    try:
        read = ask_nodes(read_probe, place, token, tuple(names), nodes=[answer.node for answer in wrote], timeout_s=timeout_s)
    finally:
        made = {answer.node.node_id: answer.value.made for answer in wrote}
        ask_nodes(remove_probe, place, token, made, nodes=[answer.node for answer in wrote], timeout_s=timeout_s)
    found: dict[str, Answer] = {answer.node.node_id: answer for answer in read}
    seen = []
    for answer in written:
        second = found.get(answer.node.node_id)
        if second is None or second.error is not None:
            seen.append(Seen(answer.node, error=answer.error or (second.error if second else None)))
        else:
            missing = tuple(names[node] for node in second.value)
            seen.append(Seen(answer.node, missing=missing, free_bytes=answer.value.free_bytes))
    return tuple(seen)


def check_shared(place: str | Path, *, seen: Sequence[Seen]) -> None:
    """Refuse a storage that the nodes do not share.

    Raises:
        SetupError: naming the nodes that do not see it, and the fix.
    """
    where = f"storage_path: {redacted(str(place)) if is_uri(place) else place}"
    unable = [one for one in seen if one.error is not None]
    if unable:
        raise SetupError(
            f"{_names(unable)} cannot use the storage: {unable[0].error}",
            where=where,
            why="trials run on every node, and write their checkpoints and results there",
            fix="give that node its keys through its environment or profile"
            if is_uri(place)
            else "mount it there with permission to write, or name a URI such as s3://BUCKET/runs",
        )
    blind = [one for one in seen if one.missing]
    if blind:
        raise SetupError(
            f"the storage is not shared: {_names(blind)} {'does' if len(blind) == 1 else 'do'} not see what is written there "
            f"on {', '.join(blind[0].missing)}",
            where=where,
            why="trials run on every node, and write their checkpoints and results there",
            fix="name a folder that all nodes mount under the same path, or a URI such as s3://BUCKET/runs",
        )


def probe_before_sweep(config: ExperimentConfig) -> list[str]:
    """On the cluster of RAY_ADDRESS, what ``check_cluster_storage`` says of an experiment; elsewhere nothing."""
    if not os.environ.get("RAY_ADDRESS"):
        return []
    from launcher.ray_session import start_ray, stop_ray

    given = [config.model.model_name_or_path]
    if config.run_uri is None:  # else they travel with the run
        given += [config.data.path, config.data.forget, config.data.retain, config.data.mia, config.data.mmlu]
    paths = [Path(path).expanduser().resolve() for path in given if path is not None]
    start_ray(cpus=os.cpu_count() or 1)
    try:
        return check_cluster_storage(config.run_uri or config.run_folder, needed=[path for path in paths if path.exists()])
    finally:
        stop_ray()


def check_cluster_storage(place: str | Path, *, needed: Sequence[Path] = ()) -> list[str]:
    """Before a sweep on a cluster: whether its nodes share the storage and have the files that trials read.

    Nothing is looked at on a single node.

    Args:
        place: the run's folder, or its URI.
        needed: paths outside of it that every node must have.

    Returns:
        Warnings: nodes with little free disk.

    Raises:
        SetupError: if they do not.
    """
    nodes = living_nodes()
    if len(nodes) < 2:
        return []
    place = place if is_uri(place) else Path(place).resolve()
    seen = probe_storage(place, nodes=nodes)
    check_shared(place, seen=seen)
    for answer in ask_nodes(absent_paths, [str(path) for path in needed], nodes=nodes, timeout_s=PROBE_S) if needed else []:
        if answer.error is not None or answer.value:
            raise SetupError(
                f"{answer.node.name} does not have {answer.value[0]}" if answer.error is None else f"{answer.node.name}: {answer.error}",
                where="every node of the cluster",
                why="trials run on every node, and read it there",
                fix="copy it there, or name a folder that all nodes mount under the same path",
            )
    return [
        f"{one.node.name} has {one.free_bytes / (1 << 30):.1f} GiB of free disk for what trials write"
        for one in seen
        if one.free_bytes is not None and one.free_bytes < LOW_BYTES
    ]


# ---- asked of each node


def write_probe(place: str, token: str) -> Written:
    """Write this node's file."""
    fs, root = _filesystem(place)
    made = [] if is_uri(place) else [str(folder) for folder in (Path(root), *Path(root).parents) if not folder.exists()]

    def write() -> None:
        fs.create_dir(f"{root}/.probe-{token}", recursive=True)
        with fs.open_output_stream(f"{root}/.probe-{token}/{_here()}") as stream:
            stream.write(token.encode())

    _ask(write, place)
    disk = cache_root() if is_uri(place) else Path(root)
    while not disk.exists():
        disk = disk.parent
    return Written(free_bytes=shutil.disk_usage(disk).free, made=tuple(made))


def read_probe(place: str, token: str, others: Sequence[str]) -> list[str]:
    """The nodes whose files are not there, or not as they were written."""
    fs, root = _filesystem(place)

    def absent(nodes: Sequence[str]) -> list[str]:
        found = []
        for node in nodes:
            try:
                with fs.open_input_stream(f"{root}/.probe-{token}/{node}") as stream:
                    if stream.read() != token.encode():
                        found.append(node)
            except FileNotFoundError:
                found.append(node)
        return found

    deadline = time.monotonic() + SEEN_S
    missing = _ask(functools.partial(absent, others), place)
    while missing and time.monotonic() < deadline:
        time.sleep(0.2)
        missing = _ask(functools.partial(absent, missing), place)
    return list(missing)


def remove_probe(place: str, token: str, made: Mapping[str, Sequence[str]]) -> None:
    """Remove the files, and the empty folders that this node had to make for them."""
    fs, root = _filesystem(place)
    with contextlib.suppress(OSError):
        fs.delete_dir(f"{root}/.probe-{token}")
    for folder in made.get(_here(), ()):
        with contextlib.suppress(OSError):
            os.rmdir(folder)


def absent_paths(paths: Sequence[str]) -> list[str]:
    """The paths that this node does not have."""
    return [path for path in paths if not Path(path).exists()]


def _filesystem(place: str) -> tuple[Any, str]:
    if is_uri(place):
        return open_filesystem(place)
    from pyarrow.fs import LocalFileSystem

    return LocalFileSystem(), str(Path(place).expanduser())


def _ask(action: Any, place: str) -> Any:
    return ask_home(action, uri=place) if is_uri(place) else action()


def _here() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


def _names(seen: Sequence[Seen]) -> str:
    return ", ".join(one.node.name for one in seen)

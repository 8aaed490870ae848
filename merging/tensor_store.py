"""Safetensors files as named byte ranges: read one tensor, or rewrite a checkpoint with some tensors replaced.

Format: 8 bytes little-endian header length, a JSON header, then the tensors' bytes.
Source: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from trainers.errors import InputError, RunError
from trainers.files import read_json

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32", "I16": "int16",
          "I8": "int8", "U8": "uint8", "BOOL": "bool"}  # fmt: skip
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
MERGEABLE = ("F32", "F16", "BF16")
"""Stored dtypes that a task vector may change: float32 arithmetic loses nothing on them."""
BLOCK = 1 << 24
MAX_HEADER = 100_000_000
COPY_AGAIN = "copy the file again, or write it again"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: bytes [start, end) of its shard file."""

    name: str
    shard: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Size of the tensor in the file."""
        return self.end - self.start


@dataclass(frozen=True)
class TensorStore:
    """The tensors of a checkpoint, in file order, read one at a time."""

    folder: Path
    shards: tuple[Path, ...]
    tensors: dict[str, StoredTensor]

    @property
    def num_bytes(self) -> int:
        """Size of all shard files."""
        return sum(shard.stat().st_size for shard in self.shards)

    def read(self, name: str) -> Tensor:
        """One tensor in its stored dtype, on the CPU.

        Raises:
            InputError: if the file ends early or the dtype is not supported.
        """
        import torch

        tensor = self.tensors[name]
        if tensor.dtype not in DTYPES:
            raise InputError(f"tensor {name} has the dtype {tensor.dtype}", where=str(tensor.shard), fix=f"use one of {', '.join(DTYPES)}")
        dtype = getattr(torch, DTYPES[tensor.dtype])
        if tensor.start == tensor.end:
            return torch.empty(tensor.shape, dtype=dtype)
        buffer = bytearray(tensor.end - tensor.start)
        with open(tensor.shard, "rb", buffering=0) as file:
            file.seek(tensor.start)
            _fill(file, memoryview(buffer), where=f"{tensor.shard}, tensor {name}")
        return torch.frombuffer(buffer, dtype=dtype).reshape(tensor.shape)


def open_file(path: Path) -> TensorStore:
    """The tensors of one safetensors file.

    Raises:
        InputError: if the file is missing, is not safetensors, or its header does not describe its bytes.
    """
    path = Path(path)
    tensors = {tensor.name: tensor for tensor in _read_header(path)}
    return TensorStore(folder=path.parent, shards=(path,), tensors=tensors)


def open_base(folder: Path) -> TensorStore:
    """The weights of a model folder: ``model.safetensors``, or the shards of its index.

    Raises:
        InputError: if there are none, or index and shards disagree.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError("model folder not found", where=str(folder), fix="give a folder in Hugging Face layout")
    if (folder / SINGLE).exists():
        return open_file(folder / SINGLE)
    if not (folder / INDEX).exists():
        raise InputError(
            f"no {SINGLE} and no {INDEX} in the model folder",
            where=str(folder),
            fix="save the model with save_pretrained; pickled weights must be converted to safetensors first",
        )
    index = read_json(folder / INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError("the index has no weight_map", where=str(folder / INDEX))
    shards = tuple(folder / name for name in sorted(set(weight_map.values())))
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for tensor in _read_header(shard):
            if weight_map.get(tensor.name) != shard.name:
                listed = weight_map.get(tensor.name, "no shard")
                raise InputError(f"tensor {tensor.name} lies in {shard.name}, but the index names {listed}", where=str(folder / INDEX))
            tensors[tensor.name] = tensor
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise InputError(f"{len(missing)} tensors of the index are in no shard, the first is {missing[0]}", where=str(folder / INDEX))
    return TensorStore(folder=folder, shards=shards, tensors=tensors)


@dataclass(frozen=True)
class Rewritten:
    """What a rewrite read and wrote, by SHA-256.

    Args:
        tensors: of the new bytes of each replaced tensor.
        sources: of each shard file that was read.
    """

    tensors: dict[str, str]
    sources: dict[str, str]


def rewrite_shards(
    *, store: TensorStore, folder: Path, names: Sequence[str], replacement: Callable[[str, Tensor], Tensor], workers: int = 1
) -> Rewritten:
    """Write the shards of ``store`` into ``folder`` again, with the bytes of some tensors replaced.

    Header, offsets and every other byte are those of the base file. Every byte of it is read once and hashed on the way.

    Args:
        names: the tensors to replace.
        replacement: called once per name with the stored tensor; returns one of the same dtype and shape. Calls begin in file order.
        workers: calls at the same time, each in a thread of its own; that many tensors and one more are held at most.
    """
    wanted = set(names)
    ordered = sorted((t for t in store.tensors.values() if t.name in wanted), key=lambda t: (store.shards.index(t.shard), t.start))

    def compute(stored: StoredTensor) -> tuple[StoredTensor, memoryview, memoryview, str]:
        before = store.read(stored.name)
        after = _checked_bytes(replacement(stored.name, before), stored)
        return stored, tensor_bytes(before), after, hashlib.sha256(after).hexdigest()

    tensors: dict[str, str] = {}
    sources: dict[str, str] = {}
    with contextlib.closing(_ahead(compute, ordered, workers=workers)) as replaced:
        for shard in store.shards:
            seen = hashlib.sha256()
            with open(shard, "rb", buffering=0) as source, open(folder / shard.name, "wb", buffering=0) as target:
                position = 0
                for _ in range(sum(stored.shard == shard for stored in ordered)):
                    stored, before, after, tensors[stored.name] = next(replaced)
                    _copy_range(source.fileno(), target.fileno(), start=position, end=stored.start, seen=seen)
                    seen.update(before)
                    _write_at(target.fileno(), after, offset=stored.start)
                    position = stored.end
                    del before, after
                _copy_range(source.fileno(), target.fileno(), start=position, end=os.fstat(source.fileno()).st_size, seen=seen)
                os.fsync(target.fileno())
            sources[shard.name] = seen.hexdigest()
    return Rewritten(tensors=tensors, sources=sources)


def _ahead(function: Callable[[T], R], items: Sequence[T], *, workers: int) -> Generator[R, None, None]:
    """``map`` in order, with up to ``workers`` calls under way in threads that use one core each."""
    if workers == 1:
        for item in items:
            yield function(item)
        return
    import torch

    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="merge", initializer=torch.set_num_threads, initargs=(1,))
    try:
        waiting = deque(pool.submit(function, item) for item in items[:workers])
        for index in range(len(items)):
            done = waiting.popleft().result()
            if index + workers < len(items):
                waiting.append(pool.submit(function, items[index + workers]))
            yield done
            del done
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def header_hash(shard: Path) -> str:
    """SHA-256 of a safetensors file's header, with its length field."""
    with open(shard, "rb") as file:
        prefix = file.read(8)
        return hashlib.sha256(prefix + file.read(int.from_bytes(prefix, "little"))).hexdigest()


def _read_header(path: Path) -> list[StoredTensor]:
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > MAX_HEADER or 8 + length > size:
                raise InputError(
                    "not a complete safetensors file", where=str(path), why=f"{size} bytes, header of {length} bytes", fix=COPY_AGAIN
                )
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise InputError("weights file not found", where=str(path), fix="copy it into the folder, or name another folder") from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError("not a safetensors file: its header is not JSON", where=str(path), fix=COPY_AGAIN) from None
    except OSError as error:
        raise InputError(f"the weights cannot be read: {error.strerror}", where=str(path), fix="check the file's permissions") from None
    if not isinstance(header, dict):
        raise InputError("not a safetensors file: its header is not an object", where=str(path), fix=COPY_AGAIN)
    tensors = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            start, end = entry["data_offsets"]
            tensors.append(StoredTensor(name, path, entry["dtype"], tuple(entry["shape"]), 8 + length + start, 8 + length + end))
        except (KeyError, TypeError, ValueError):
            raise InputError(f"the header's entry for tensor {name} is not readable: {entry!r}", where=str(path)) from None
        if entry["dtype"] in ITEM_BYTES and end - start != math.prod(entry["shape"]) * ITEM_BYTES[entry["dtype"]]:
            raise InputError(
                f"tensor {name} has {end - start} bytes, not those of shape {entry['shape']} in {entry['dtype']}", where=str(path)
            )
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    position = 8 + length
    for tensor in tensors:
        if tensor.start != position or tensor.end < tensor.start:
            raise InputError(f"the byte range of tensor {tensor.name} does not follow the one before it", where=str(path))
        position = tensor.end
    if position != size:
        raise InputError(
            f"the file has {size} bytes, but its header describes {position}",
            where=str(path),
            why="it was written or copied incompletely",
            fix=COPY_AGAIN,
        )
    return tensors


def _fill(file, view: memoryview, *, where: str) -> None:
    while view:
        count = file.readinto(view)
        if not count:
            raise InputError("the weights file ends early", where=where)
        view = view[count:]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor as safetensors stores them, without a copy where it is contiguous."""
    import torch

    data: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(data)


def _checked_bytes(tensor: Tensor, stored: StoredTensor) -> memoryview:
    import torch

    assert tensor.dtype == getattr(torch, DTYPES[stored.dtype]), (stored.name, tensor.dtype, stored.dtype)
    assert tuple(tensor.shape) == stored.shape, (stored.name, tensor.shape, stored.shape)
    return tensor_bytes(tensor)


def _write_at(fd: int, data: memoryview, *, offset: int) -> None:
    while data:
        count = os.pwrite(fd, data[:BLOCK], offset)
        offset, data = offset + count, data[count:]


def _copy_range(source: int, target: int, *, start: int, end: int, seen: hashlib._Hash) -> None:
    """Copy bytes through a buffer, and hash them."""
    while start < end:
        block = os.pread(source, min(end - start, BLOCK), start)
        if not block:
            raise RunError("the base file became shorter while it was copied")
        seen.update(block)
        _write_at(target, memoryview(block), offset=start)
        start += len(block)

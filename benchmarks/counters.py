"""What a computation dispatches and what it keeps alive, read from torch's dispatcher: no clock, no allocator."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_NO_KERNEL = frozenset(
    {"_unsafe_view", "_reshape_alias", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh"}
)
"""Operations that only describe memory or take it: views in all but name, and tensors without values."""


class OperationCounter(TorchDispatchMode):
    """Counts dispatched aten operations that compute something: on a GPU each of them is at least one kernel launch.

    Views do not count. Operations of the backward pass and of the optimizer do; what a fused operation does inside does not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.by_name: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and not func.is_view and name not in _NO_KERNEL:
            self.total += 1
            self.by_name[name] = self.by_name.get(name, 0) + 1
        return result


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of all storages that operations return, and remembers the largest sum of those alive together.

    Scratch memory inside an operation is not seen. Storages that existed before count only if ``track`` named them.

    Args:
        tensors: counted from the start, such as parameters.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}
        self._foreign: set[int] = set()
        for tensor in tensors:
            self.track(tensor)

    def track(self, tensor: Tensor) -> None:
        """Count a tensor's storage from now until it is freed; a storage counts once."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._known or size == 0:
            return

        def freed(_: Any) -> None:
            self.live -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What an operation reads without any operation having made it was there before: parameters, inputs.
        outside = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)} - set(self._known)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in outside:
                self.track(leaf)
        return result


def count_operations(work: Any) -> OperationCounter:
    """The operations that ``work()`` dispatches."""
    with OperationCounter() as counter:
        work()
    return counter


def peak_bytes(work: Any, *, tensors: Iterable[Tensor] = ()) -> int:
    """The most bytes alive at once while ``work()`` runs, ``tensors`` included."""
    with LiveBytes(tensors) as tracker, torch.enable_grad():
        work()
    return tracker.peak

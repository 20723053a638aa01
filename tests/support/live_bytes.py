"""How many bytes of tensors are alive while operators run: what a forward pass takes, without an allocator."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the storages that operators make. What a custom operator makes inside, and drops, is not seen.

    Attributes:
        now: bytes that are alive, of storages made since the beginning.
        peak: the most outside of backward passes.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._alive: dict[int, tuple[int, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {own.untyped_storage()._cdata for own in tree_leaves((args, kwargs)) if isinstance(own, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for own in tree_leaves(out):
            if isinstance(own, torch.Tensor):
                storage = own.untyped_storage()
                if storage._cdata not in self._alive and storage._cdata not in given:
                    self._add(storage)
        return out

    def _add(self, storage: Any) -> None:
        key = storage._cdata
        self._alive[key] = storage.nbytes(), weakref.ref(storage, lambda _: self._drop(key))
        self.now += storage.nbytes()
        if torch._C._current_graph_task_id() == -1:  # no backward pass runs
            self.peak = max(self.peak, self.now)

    def _drop(self, key: int) -> None:
        self.now -= self._alive.pop(key)[0]

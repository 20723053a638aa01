"""Memory that was allocated and not yet written, as `torch.empty` gives it.

Within `tracked`, it is filled with a pattern. What still has the pattern, and was stored by no kernel, nobody wrote.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing import reductions


class Fresh:
    """All such memory of a context.

    Args:
        poison: the byte that it is filled with.
    """

    def __init__(self, poison: int) -> None:
        self.poison = poison
        self._known: dict[int, tuple[Any, Any]] = {}

    def add(self, tensor: Tensor) -> None:
        """Fills a tensor that was just allocated, and follows it."""
        storage = tensor.untyped_storage()
        if tensor.device.type == "cpu" and storage.nbytes():
            bytes_of(storage)[:] = self.poison
            reference: Any = reductions.StorageWeakRef
            self._known[storage.data_ptr()] = reference(storage), np.zeros(storage.nbytes(), bool)

    def known(self, storage: Any) -> Any:
        """[bytes] which bytes somebody wrote, to be kept up to date by kernels; None if all."""
        reference, known = self._known.get(storage.data_ptr(), (None, None))
        if reference is None:
            return None
        if reference.cdata != storage._cdata or len(known) != storage.nbytes():
            del self._known[storage.data_ptr()]
            return None
        known |= bytes_of(storage) != self.poison
        return None if known.all() else known


def bytes_of(storage: Any) -> Any:
    """[bytes] uint8, the memory of a storage itself."""
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()


@contextmanager
def tracked(poison: int) -> Iterator[Fresh]:
    """A context in which memory from `torch.empty`, `empty_like` and `new_empty` is followed.

    Args:
        poison: the byte that it is filled with.
    """
    fresh = Fresh(poison)
    plain_empty = torch.empty

    def following(plain: Any) -> Any:
        def allocate(*args: Any, **options: Any) -> Tensor:
            out = plain(*args, **options)
            fresh.add(out.detach())
            return out

        return allocate

    def storage_bytes(storage: Any) -> Any:
        return plain_empty(0, dtype=torch.uint8).set_(storage).numpy()

    with (
        patch.object(torch, "empty", following(torch.empty)),
        patch.object(torch, "empty_like", following(torch.empty_like)),
        patch.object(Tensor, "new_empty", following(Tensor.new_empty)),
        patch.dict(globals(), {"bytes_of": storage_bytes}),
    ):
        yield fresh

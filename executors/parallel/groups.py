"""Process groups, however they are given."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def group_of(mesh_or_group: Any) -> Any:
    """The process group of a mesh of one dimension, of a group, or of None, the default group.

    Raises:
        ValueError, TypeError, RuntimeError: in one line: there is none, or it is something else.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("torch.distributed: must be initialised, by init_process_group or torchrun")
    if mesh_or_group is None:
        return dist.group.WORLD
    if hasattr(mesh_or_group, "get_group"):
        if mesh_or_group.ndim != 1:
            raise ValueError(
                f"mesh_or_group={mesh_or_group!r:.80}: must be a mesh of one dimension, such as mesh['ep']"
            )
        return mesh_or_group.get_group()
    if not isinstance(mesh_or_group, dist.ProcessGroup):
        raise TypeError(
            f"mesh_or_group={mesh_or_group!r:.60}: must be a process group, a mesh of one dimension, or None"
        )
    return mesh_or_group

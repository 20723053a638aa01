"""What ranks tell each other before each call: that they are well, what they pass, and how many rows they send."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from executors._files.text import one_line
from executors.parallel.waiting import RankError, Wire
from moe_ref.types import MoEConfig

STEP = "before a call"


class Call(NamedTuple):
    """What all ranks must pass alike.

    Attributes:
        hidden: H.
        dtype: of x.
        num_experts: E of all ranks.
        top_k: K.
        tokens: T, where all ranks have the same tokens; else -1.
        grad_enabled: whether gradients are on.
        weights_dtype: of topk_weights.
        config: the layer's configuration.
    """

    hidden: int
    dtype: str
    num_experts: int
    top_k: int
    tokens: int
    grad_enabled: bool
    weights_dtype: str
    config: MoEConfig

    def digest(self) -> int:
        """A number that stands for all of it."""
        return int.from_bytes(hashlib.sha256(repr(self).encode()).digest()[:7], "big")


def agreed(wire: Wire, call: Call, sizes: Tensor) -> list[list[int]]:
    """Compares the call with those of all ranks, and exchanges sizes: the one time a host waits.

    Args:
        wire: to the other ranks.
        call: this rank's.
        sizes: [n] int64, to be told to all.

    Returns:
        [W][n] all ranks' sizes.

    Raises:
        RankError: a rank failed before its call, passes something else, or does not come.
    """
    own = torch.cat([sizes.new_tensor([1, call.digest()]), sizes])
    rows = _gathered(wire, own)
    if all(row[0] == 1 and row[1] == rows[0][1] for row in rows):
        return [row[2:] for row in rows]
    _refuse(wire, call._asdict())
    raise AssertionError("ranks that differ have said how")


def failed(wire: Wire, error: BaseException, sizes: int, device: torch.device) -> None:
    """Tells the others, at the place where they compare calls, that this rank raised."""
    if wire.ranks > 1:
        _gathered(wire, torch.zeros(2 + sizes, dtype=torch.int64, device=device))
        try:
            _refuse(wire, {"error": one_line(f"{type(error).__name__}: {error}")})
        except RankError:  # its own error says more
            return


def _gathered(wire: Wire, own: Tensor) -> list[list[int]]:
    out = [own]
    if wire.ranks > 1:
        out = [torch.empty_like(own) for _ in range(wire.ranks)]
        wire.wait(dist.all_gather(out, own, group=wire.group, async_op=True), STEP)
    found: list[list[int]] = torch.stack(out).tolist()
    return found


def _refuse(wire: Wire, own: dict[str, Any]) -> None:
    """Raises for what ranks differ in, with the value of each."""
    found: list[Any] = [None] * wire.ranks
    dist.all_gather_object(
        found, {**own, "config": asdict(own["config"])} if "config" in own else own, group=wire.group
    )
    raised = [f"rank {rank} raised {said['error']}" for rank, said in enumerate(found) if "error" in said]
    if raised:
        raise RankError("; ".join(raised))
    plain = [_flat(said) for said in found]
    for name in plain[0]:
        values = [said[name] for said in plain]
        for rank, value in enumerate(values):
            if value != values[0]:
                raise RankError(
                    f"rank {rank} has {name}={value!r:.60}, but rank 0 has {values[0]!r:.60}: must be equal"
                )


def _flat(said: dict[str, Any]) -> dict[str, Any]:
    """With a line for each field of the configuration."""
    config = {f"config.{key}": value for key, value in said["config"].items()}
    return {key: value for key, value in said.items() if key != "config"} | config

"""What ranks tell each other before each call: that they are well, what they pass, and how many rows they send."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
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
        dispatch: how tokens travel.
        returns: how results do.
        hidden: H.
        dtype: of x.
        num_experts: E of all ranks.
        top_k: K.
        tokens: T, where all ranks have the same tokens; else -1.
        grad_enabled: whether gradients are on.
        weights_dtype: of topk_weights.
        config: the layer's configuration.
    """

    dispatch: str
    returns: str
    hidden: int
    dtype: str
    num_experts: int
    top_k: int
    tokens: int
    grad_enabled: bool
    weights_dtype: str
    config: MoEConfig

    def values(self) -> dict[str, Any]:
        """By name, with a line for each field of the configuration; equal values look alike, as 1 and 1.0."""
        config = {f"config.{name}": value for name, value in asdict(self.config).items()}
        given = {name: value for name, value in self._asdict().items() if name != "config"}
        return given | {name: float(own) if type(own) is int else own for name, own in config.items()}


def agreed(wire: Wire, call: Call, sizes: Tensor) -> list[list[int]]:
    """Compares the call with those of all ranks, and exchanges sizes: the one time a host waits.

    Args:
        wire: to the other ranks.
        call: this rank's.
        sizes: [n] int64 of at most `most` numbers, to be told to all.

    Returns:
        [W][n] all ranks' sizes.

    Raises:
        RankError: a rank failed before its call, passes something else, or does not come.
    """
    said = {"step": f"call {wire.standing.calls}"} | call.values()
    rows: list[list[int]] = _gathered(wire, _row(wire, said, sizes), STEP).tolist()
    _compare(wire, rows, said)
    wire.standing.calls += 1
    return [row[2 : 2 + len(sizes)] for row in rows]


def met(wire: Wire, step: str, device: torch.device) -> None:
    """Compares the step of a backward pass at which ranks are, before gradients travel.

    On a GPU the host does not wait for it: it is asserted there.

    Raises:
        RankError: a rank is at another step, which its order of backward passes or of calls has led to.
    """
    if wire.ranks == 1:
        return
    said = {"step": step}
    on_host = device.type == "cpu"
    rows = _gathered(wire, _row(wire, said, numbers([], device)), f"before {step}", on_host)
    if on_host:
        _compare(wire, rows.tolist(), said)
    else:
        torch._assert_async((rows[:, :2] == rows[0, :2]).all(), f"ranks are not all at {step}")


def failed(wire: Wire, error: BaseException, device: torch.device) -> None:
    """Tells the others, at the place where they compare calls, that this rank raised."""
    if wire.ranks == 1:
        return
    try:
        with wire.together():
            _gathered(wire, torch.zeros(2 + most(wire), dtype=torch.int64, device=device), STEP)
            _refuse(wire, {"error": one_line(f"{type(error).__name__}: {error}")})
    except RankError:  # its own error says more
        return


def most(wire: Wire) -> int:
    """How many sizes a rank may tell: 3 needs, and rows and slots for each rank."""
    return 3 + 2 * wire.ranks


def numbers(values: Sequence[int], device: torch.device) -> Tensor:
    """[n] int64, brought to the device without waiting for it."""
    return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)


def _row(wire: Wire, said: dict[str, Any], sizes: Tensor) -> Tensor:
    """[2 + most] int64: 1 for a rank that is well, a number that stands for what it says, sizes, and zeros.

    It has the same length at every step, so that ranks at different steps meet, too.
    """
    digest = int.from_bytes(hashlib.sha256(repr(said).encode()).digest()[:7], "big")
    return torch.cat([numbers([1, digest], sizes.device), sizes, sizes.new_zeros(most(wire) - len(sizes))])


def _gathered(wire: Wire, own: Tensor, step: str, on_host: bool = True) -> Tensor:
    """[W, n] all ranks' rows [n]."""
    out = [own]
    if wire.ranks > 1:
        out = [torch.empty_like(own) for _ in range(wire.ranks)]
        wire.wait(dist.all_gather(out, own, group=wire.group, async_op=True), step, on_host)
    return torch.stack(out)


def _compare(wire: Wire, rows: list[list[int]], said: dict[str, Any]) -> None:
    if any(row[0] != 1 or row[1] != rows[0][1] for row in rows):
        _refuse(wire, said)


def _refuse(wire: Wire, own: dict[str, Any]) -> None:
    """Raises for what ranks differ in, with the value of each."""
    found: list[Any] = [None] * wire.ranks
    dist.all_gather_object(found, own, group=wire.group)
    raised = [f"rank {rank} raised {said['error']}" for rank, said in enumerate(found) if "error" in said]
    if raised:
        raise RankError("; ".join(raised))
    for name, expected in found[0].items():
        for rank, said in enumerate(found):
            if repr(said[name]) != repr(expected):
                raise RankError(
                    f"rank {rank} has {name}={said[name]!r:.60}, but rank 0 has {expected!r:.60}: must be equal"
                )

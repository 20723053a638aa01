"""What ranks tell each other before each call: that they are well, what they pass, and how many rows they send."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from executors._files.text import one_line
from executors.parallel.waiting import RankError, Wire, on_host
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
        max_slots: how many slots a rank may send to another at most; 0 if sizes are told.
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
    max_slots: int
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
    said = _said(wire, call)
    rows: list[list[int]] = _gathered(wire, _row(wire, said, sizes), STEP).tolist()
    _compare(wire, rows, said)
    wire.standing.calls += 1
    return [row[2 : 2 + len(sizes)] for row in rows]


def same(wire: Wire, call: Call, needs: Sequence[bool], sizes: Tensor) -> None:
    """Compares the call with those of all ranks where a host need know nothing of the others.

    On a GPU the host does not wait for it: it is asserted there.

    Args:
        wire: to the other ranks.
        call: this rank's.
        needs: what gradients this rank needs, which must be those that the others need.
        sizes: [W] int64, how many slots this rank sends to each, if they have a bound.

    Raises:
        RankError: as `agreed`, or a rank sends more slots to another than ``call.max_slots``.
    """
    names = ("needs_x_grad", "needs_weights_grad", "needs_any_grad")
    said = _said(wire, call) | dict(zip(names, needs, strict=True))
    watched = on_host(sizes)
    rows = _gathered(wire, _row(wire, said, sizes), STEP, watched)
    wire.standing.calls += 1
    if not watched:
        _assert_alike(rows, "ranks do not pass the same to a call")
        torch._assert_async((rows[:, 2 : 2 + len(sizes)] <= call.max_slots).all(), f"max_slots={call.max_slots}")
        return
    told = rows.tolist()
    try:
        _compare(wire, told, said)
    except RankError:
        wire.standing.calls -= 1
        raise
    for rank, row in enumerate(told):
        for other, count in enumerate(row[2 : 2 + len(sizes)]):
            if count > call.max_slots:
                wire.standing.calls -= 1
                allowed = f"must be at most max_slots={call.max_slots}"
                raise RankError(f"rank {rank} sends {count} slots to rank {other}: {allowed}")


def _said(wire: Wire, call: Call) -> dict[str, Any]:
    return {"step": f"call {wire.standing.calls}"} | call.values()


def met(wire: Wire, step: str, device: torch.device) -> None:
    """Compares the step of a backward pass at which ranks are, before gradients travel.

    On a GPU the host does not wait for it: it is asserted there.

    Raises:
        RankError: a rank is at another step, which its order of backward passes or of calls has led to.
    """
    if wire.ranks == 1:
        return
    said = {"step": step}
    own = _row(wire, said, numbers([], device))
    watched = on_host(own)
    rows = _gathered(wire, own, f"before {step}", watched)
    if watched:
        _compare(wire, rows.tolist(), said)
    else:
        _assert_alike(rows, f"ranks are not all at {step}")


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


def _gathered(wire: Wire, own: Tensor, step: str, watched: bool = True) -> Tensor:
    """[W, n] all ranks' rows [n]."""
    out = [own]
    if wire.ranks > 1:
        out = [torch.empty_like(own) for _ in range(wire.ranks)]
        wire.wait(dist.all_gather(out, own, group=wire.group, async_op=True), step, watched)
    return torch.stack(out)


def _assert_alike(rows: Tensor, said: str) -> None:
    torch._assert_async((rows[:, :2] == rows[0, :2]).all(), said)


def _compare(wire: Wire, rows: list[list[int]], said: dict[str, Any]) -> None:
    if any(row[0] != 1 or row[1] != rows[0][1] for row in rows):
        _refuse(wire, said)


def _refuse(wire: Wire, own: dict[str, Any]) -> None:
    """Raises for what ranks differ in, with the value of each."""
    found = told(wire, {name: repr(value) for name, value in own.items()} if "error" not in own else own, STEP)
    raised = [f"rank {rank} raised {said['error']}" for rank, said in enumerate(found) if "error" in said]
    if raised:
        raise RankError("; ".join(raised))
    for name, expected in found[0].items():
        for rank, said in enumerate(found):
            if said[name] != expected:
                raise RankError(
                    f"rank {rank} has {name}={said[name]:.60}, but rank 0 has {expected:.60}: must be equal"
                )


def told(wire: Wire, own: Any, step: str) -> list[Any]:
    """What each rank tells all others, in words that JSON has.

    Raises:
        RankError: a rank does not come.
    """
    words = torch.frombuffer(bytearray(json.dumps(own), "utf-8"), dtype=torch.uint8)
    device = wire.device
    lengths = _gathered(wire, numbers([len(words)], device), step)[:, 0].tolist()
    filled = torch.zeros(max(lengths), dtype=torch.uint8)
    filled[: len(words)] = words
    rows = _gathered(wire, filled.to(device), step).cpu()
    return [json.loads(bytes(row[:length].tolist())) for row, length in zip(rows, lengths, strict=True)]

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
HEAD = ("well", "digest", "needs_x", "needs_weights", "needs_any")  # of a message: the digest stands for what is said


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


class Sizes(NamedTuple):
    """What ranks have told each other.

    Attributes:
        needs: the gradients of x, of weights, of anything: whether any rank needs them.
        rows: ([W], [W]) how many rows this rank sends to each, and gets.
        slots: ([W], [W]) how many slots.
    """

    needs: tuple[bool, bool, bool]
    rows: tuple[list[int], list[int]]
    slots: tuple[list[int], list[int]]


def agreed(wire: Wire, call: Call, needs: Sequence[bool], rows: Tensor, slots: Tensor) -> Sizes:
    """Compares the call with those of all ranks, and exchanges sizes: the one time a host waits.

    Args:
        wire: to the other ranks.
        call: this rank's.
        needs: what gradients this rank needs.
        rows: [W] int64, how many this rank sends to each.
        slots: [W] int64, how many of these.

    Raises:
        RankError: a rank failed before its call, passes something else, or does not come.
    """
    said = _said(wire, call)
    own = torch.stack([rows, slots], dim=1)
    arrived = _exchanged(wire, _messages(wire, said, needs, own), STEP, on_host(rows))
    table = torch.cat([arrived[:, : len(HEAD) + 2], own], dim=1).tolist()
    _compare(wire, table, said)
    wire.standing.calls += 1
    columns = [[row[place] for row in table] for place in range(2, len(HEAD) + 4)]
    any_needs = bool(any(columns[0])), bool(any(columns[1])), bool(any(columns[2]))
    return Sizes(any_needs, (columns[5], columns[3]), (columns[6], columns[4]))


def same(wire: Wire, call: Call, needs: Sequence[bool], slots: Tensor) -> None:
    """Compares the call with those of all ranks where a host need know nothing of the others.

    On a GPU the host does not wait for it: it is asserted there.

    Args:
        wire: to the other ranks.
        call: this rank's.
        needs: what gradients this rank needs, which must be those that the others need.
        slots: [W] int64, how many this rank sends to each, if they have a bound; else [0].

    Raises:
        RankError: as `agreed`, or a rank sends more slots to another than ``call.max_slots``.
    """
    names = ("needs_x_grad", "needs_weights_grad", "needs_any_grad")
    said = _said(wire, call) | dict(zip(names, needs, strict=True))
    largest = torch.stack([slots.max(), slots.argmax()]) if len(slots) else slots.new_zeros(2)
    watched = on_host(slots)
    rows = _exchanged(wire, _messages(wire, said, needs, largest.expand(wire.ranks, 2)), STEP, watched)
    if not watched:
        _assert_alike(rows, "ranks do not pass the same to a call")
        torch._assert_async((rows[:, len(HEAD)] <= call.max_slots).all(), f"max_slots={call.max_slots}")
    else:
        table = rows.tolist()
        _compare(wire, table, said)
        for rank, row in enumerate(table):
            if row[len(HEAD)] > call.max_slots:
                sends = f"rank {rank} sends {row[len(HEAD)]} slots to rank {row[len(HEAD) + 1]}"
                raise RankError(f"{sends}: must be at most max_slots={call.max_slots}")
    wire.standing.calls += 1


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
    nothing = numbers([0, 0], device).expand(wire.ranks, 2)
    watched = on_host(nothing)
    rows = _exchanged(wire, _messages(wire, said, (False,) * 3, nothing), f"before {step}", watched)
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
            empty = torch.zeros(wire.ranks, len(HEAD) + 2, dtype=torch.int64, device=device)
            _exchanged(wire, empty, STEP, on_host(empty))
            _refuse(wire, {"error": one_line(f"{type(error).__name__}: {error}")})
    except RankError:  # its own error says more
        return


def numbers(values: Sequence[int], device: torch.device) -> Tensor:
    """[n] int64, brought to the device without waiting for it."""
    return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)


def _messages(wire: Wire, said: dict[str, Any], needs: Sequence[bool], own: Tensor) -> Tensor:
    """[W, 7] int64, a message to each rank: `HEAD`, and two numbers of its own [W, 2].

    It has the same length at every step, so that ranks at different steps meet, too.
    """
    digest = int.from_bytes(hashlib.sha256(repr(said).encode()).digest()[:7], "big")
    head = numbers([1, digest, *needs], own.device).expand(wire.ranks, len(HEAD))
    return torch.cat([head, own], dim=1)


def _exchanged(wire: Wire, messages: Tensor, step: str, watched: bool) -> Tensor:
    """[W, 7] what each rank says to this one, of what this one says to each."""
    if wire.ranks == 1:
        return messages
    out, one = torch.empty_like(messages), [1] * wire.ranks
    wire.wait(dist.all_to_all_single(out, messages, one, one, group=wire.group, async_op=True), step, watched)
    return out


def _gathered(wire: Wire, own: Tensor, step: str) -> Tensor:
    """[W, n] all ranks' rows [n]."""
    out = [own]
    if wire.ranks > 1:
        out = [torch.empty_like(own) for _ in range(wire.ranks)]
        wire.wait(dist.all_gather(out, own, group=wire.group, async_op=True), step)
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

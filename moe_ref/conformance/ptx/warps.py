"""Instructions of a warp or of all threads: ``shfl``, ``vote``, ``redux``, ``bar``, ``mma``.

PTX ISA 9.2: "Data Movement and Conversion Instructions: shfl.sync", "Parallel Synchronization and Communication
Instructions", and "Multiply-and-Accumulate Instruction: mma" with the figures of its fragments.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_ref.conformance.ptx.emit import Emitter, plain
from moe_ref.conformance.ptx.integers import Handler
from moe_ref.conformance.ptx.text import Imm, Instruction, Operand, Unreadable

LANES = np.arange(32)
REDUCE: dict[str, Any] = {
    "add": lambda v: v.sum(axis=1, dtype=v.dtype),
    "min": lambda v: v.min(axis=1),
    "max": lambda v: v.max(axis=1),
    "and": lambda v: np.bitwise_and.reduce(v, axis=1),
    "or": lambda v: np.bitwise_or.reduce(v, axis=1),
    "xor": lambda v: np.bitwise_xor.reduce(v, axis=1),
}


def _whole(e: Emitter, own: Instruction, members: Operand) -> None:
    """All lanes of a warp must run it, and be named; others are not supported."""
    if not isinstance(members, Imm):
        e.line(f"m.all_lanes({e.name(own, 'i')}, {e.read(members, 'u32')}, {e.threads(own)})")
    elif members.value & 0xFFFFFFFF != 0xFFFFFFFF:
        raise Unreadable(f"{own.name}: must name all 32 lanes")
    if e.masked or own.guard is not None:
        e.line(f"m.whole_warps({e.name(own, 'i')}, {e.threads(own)})")


def shuffle(e: Emitter, own: Instruction) -> None:
    """``shfl.sync``."""
    _, _, mode, kind = own.opcode
    _whole(e, own, own.operands[-1])
    target, source, by, clamp = own.operands[:4]
    names = target if isinstance(target, tuple) else (target,)
    assert isinstance(clamp, Imm), f"{own.name}: must have a constant mask"
    value = e.read(source, plain(kind))
    pair = e.let(f"shuffled({value}, {e.read(by, 'u32')}, {clamp.value}, {mode!r})")
    e.write(names[0], plain(kind), f"{pair}[0]", own)
    if len(names) > 1:
        e.write(names[1], "p", f"{pair}[1]", own)


def shuffled(value: Any, by: Any, clamp: int, mode: str) -> tuple[Any, Any]:
    """What each thread gets from another of its warp, and whether that one was in its segment."""
    lanes = value.reshape(-1, 32)
    by = np.broadcast_to(by, value.shape).reshape(-1, 32).astype(np.int64) & 31
    bound, mask = clamp & 31, clamp >> 8 & 31
    least, most = LANES & mask, (LANES & mask) | (bound & ~mask)
    if mode == "up":
        source, inside = LANES - by, LANES - by >= most
    elif mode == "down":
        source, inside = LANES + by, LANES + by <= most
    elif mode == "bfly":
        source, inside = LANES ^ by, (LANES ^ by) <= most
    else:
        source = least | (by & ~mask)
        inside = source <= most
    source = np.where(inside, source, LANES)
    return np.take_along_axis(lanes, source, axis=1).reshape(-1), np.broadcast_to(inside, lanes.shape).reshape(-1)


def vote(e: Emitter, own: Instruction) -> None:
    """``vote.sync``."""
    _whole(e, own, own.operands[-1])
    mode = own.opcode[2]
    given = own.operands[1]
    holds = e.read(given, "p")
    if mode == "ballot":
        e.write(own.operands[0], "u32", f"ballot({holds})", own)
    elif mode in ("any", "all"):
        e.write(own.operands[0], "p", f"{holds}.reshape(-1, 32).{mode}(axis=1).repeat(32)", own)
    else:
        raise Unreadable(f"{own.name}: unknown form")


def ballot(holds: Any) -> Any:
    """A bit for each lane."""
    return np.packbits(holds.reshape(-1, 32), axis=1, bitorder="little").view(np.uint32)[:, 0].repeat(32)


def reduce(e: Emitter, own: Instruction) -> None:
    """``redux.sync``."""
    _whole(e, own, own.operands[-1])
    operation, kind = own.opcode[2], plain(own.opcode[3])
    if operation not in REDUCE or len(own.opcode) != 4:
        raise Unreadable(f"{own.name}: unknown form")
    value = e.read(own.operands[1], kind)
    e.write(own.operands[0], kind, f"REDUCE[{operation!r}]({value}.reshape(-1, 32)).repeat(32)", own)


def barrier(e: Emitter, own: Instruction) -> None:
    """``bar.sync`` of all threads, ``bar.warp.sync`` of a warp's."""
    if own.opcode[:3] == ("bar", "warp", "sync"):
        _whole(e, own, own.operands[0])
        e.line(f"m.warp_barrier({e.threads(own)})")
    elif own.opcode in (("bar", "sync"), ("barrier", "sync"), ("barrier", "cta", "sync")) and len(own.operands) == 1:
        e.line(f"m.barrier({e.name(own, 'i')}, {e.threads(own)})")
    else:
        raise Unreadable(f"{own.name}: unknown form")


def fence(e: Emitter, own: Instruction) -> None:
    """Orders memory; here all accesses are in order, but for those of the async proxy."""
    if own.opcode[:3] == ("fence", "proxy", "async"):
        e.line(f"m.fence_proxy({e.threads(own)})")


def elect(e: Emitter, own: Instruction) -> None:
    """``elect.sync``: one lane of a warp, here the first (PTX ISA, "elect.sync")."""
    _whole(e, own, own.operands[1])
    assert isinstance(own.operands[0], tuple)
    leader, chosen = own.operands[0]
    e.write(leader, "u32", "full(m.threads, 0, U32)", own)
    e.write(chosen, "p", "m.special['%laneid'] == 0", own)


def multiply(e: Emitter, own: Instruction) -> None:
    """``mma.sync`` into fp32: products are exact, sums in fp32 in an order that is not specified."""
    if own.guard is not None:
        raise Unreadable(f"{own.name}: must have no guard")
    shape, kind = own.opcode[3], own.opcode[7]
    if own.opcode[:3] != ("mma", "sync", "aligned") or (shape, kind) not in FRAGMENTS or own.opcode[6] != "f32":
        raise Unreadable(f"{own.name}: unknown form")
    if e.masked:
        e.line(f"m.whole_warps({e.name(own, 'i')}, M)")
    targets, *operands = own.operands
    a, b, c = (
        [e.read(o, "f32" if n == 2 else "u32") for o in own_operands]  # type: ignore[union-attr]
        for n, own_operands in enumerate(operands)
    )
    left = e.once(f"left_{kind}({', '.join(a)})")
    right = e.once(f"right_{kind}({', '.join(b)})")
    out = e.let(f"multiplied({left}, {right}, {', '.join(c)})")
    assert isinstance(targets, tuple)
    for place, target in enumerate(targets):
        e.write(target, "f32", f"{out}[{place}]", own)


FRAGMENTS = {("m16n8k16", "bf16"), ("m16n8k16", "f16"), ("m16n8k8", "tf32")}


def _halves(word: Any, kind: str) -> Any:
    """[warps, 8, 8] fp32: two neighbours in each thread's word."""
    if kind == "f16":
        return word.view(np.float16).astype(np.float32).reshape(-1, 8, 8)
    out = np.empty((word.size, 2), np.uint32)
    np.left_shift(word, 16, out=out[:, 0])
    np.bitwise_and(word, np.uint32(0xFFFF0000), out=out[:, 1])
    return out.view(np.float32).reshape(-1, 8, 8)


def _left(kind: str) -> Any:
    def left(a0: Any, a1: Any, a2: Any, a3: Any) -> Any:
        """[warps, 16, 16]: rows of a lane's group and 8 below, columns and 8 further."""
        out = np.empty((a0.size // 32, 16, 16), np.float32)
        out[:, :8, :8], out[:, 8:, :8] = _halves(a0, kind), _halves(a1, kind)
        out[:, :8, 8:], out[:, 8:, 8:] = _halves(a2, kind), _halves(a3, kind)
        return out

    return left


def _right(kind: str) -> Any:
    def right(b0: Any, b1: Any) -> Any:
        """[warps, 16, 8]: columns of a lane's group."""
        out = np.empty((b0.size // 32, 8, 16), np.float32)
        out[:, :, :8], out[:, :, 8:] = _halves(b0, kind), _halves(b1, kind)
        return out.transpose(0, 2, 1)

    return right


def _truncated(word: Any) -> Any:
    """TF32: the low 13 bits of a word are not read (the ISA leaves its layout to devices, which cut them off)."""
    return (word & np.uint32(0xFFFFE000)).view(np.float32).reshape(-1, 8, 4)


def left_tf32(a0: Any, a1: Any, a2: Any, a3: Any) -> Any:
    """[warps, 16, 8]."""
    out = np.empty((a0.size // 32, 16, 8), np.float32)
    out[:, :8, :4], out[:, 8:, :4] = _truncated(a0), _truncated(a1)
    out[:, :8, 4:], out[:, 8:, 4:] = _truncated(a2), _truncated(a3)
    return out


def left_of(kind: str) -> Any:
    """What makes [warps, 16, k] in fp32 of the four words that each thread has of a left operand."""
    return left_tf32 if kind == "tf32" else _left(kind)


def right_tf32(b0: Any, b1: Any) -> Any:
    """[warps, 8, 8]."""
    out = np.empty((b0.size // 32, 8, 8), np.float32)
    out[:, :, :4], out[:, :, 4:] = _truncated(b0), _truncated(b1)
    return out.transpose(0, 2, 1)


def multiplied(left: Any, right: Any, c0: Any, c1: Any, c2: Any, c3: Any) -> tuple[Any, Any, Any, Any]:
    """The four numbers of each thread: two neighbours in its group's row, and 8 rows below."""
    out = np.matmul(left, right).reshape(-1, 2, 8, 4, 2)
    upper, lower = out[:, 0].reshape(-1, 2), out[:, 1].reshape(-1, 2)
    return upper[:, 0] + c0, upper[:, 1] + c1, lower[:, 0] + c2, lower[:, 1] + c3


HANDLERS: dict[str, Handler] = {"shfl": shuffle, "vote": vote, "redux": reduce, "bar": barrier, "barrier": barrier}
HANDLERS |= {"mma": multiply, "membar": fence, "fence": fence, "elect": elect}
HELPERS: dict[str, Any] = {
    "shuffled": shuffled,
    "ballot": ballot,
    "REDUCE": REDUCE,
    "multiplied": multiplied,
    "left_tf32": left_tf32,
    "right_tf32": right_tf32,
}
HELPERS |= {f"left_{kind}": _left(kind) for kind in ("bf16", "f16")}
HELPERS |= {f"right_{kind}": _right(kind) for kind in ("bf16", "f16")}

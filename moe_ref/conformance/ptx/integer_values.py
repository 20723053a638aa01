"""What instructions on integers compute, for all threads: no Python of a block is written here."""

from __future__ import annotations

from typing import Any

import numpy as np


def spread(value: Any, threads: int) -> Any:
    """A scalar for all threads."""
    return value if getattr(value, "ndim", 0) else np.full(threads, value)


def high(a: Any, b: Any) -> Any:
    """The upper 64 bits of products."""
    wide = a.astype(object) * b.astype(object)
    return np.array([int(w) >> 64 for w in np.atleast_1d(wide)]).astype(a.dtype)


def quotient(a: Any, b: Any) -> Any:
    """Towards zero, in the operands' own dtype."""
    a, b = np.broadcast_arrays(a, b)
    none = b == 0
    down = np.floor_divide(a, np.where(none, b.dtype.type(1), b))
    inexact = (down * b != a) & (down < 0) if a.dtype.kind == "i" else False
    return np.where(none, ~b.dtype.type(0), down + np.where(inexact, a.dtype.type(1), a.dtype.type(0)))


def remainder(a: Any, b: Any) -> Any:
    """What `quotient` leaves, with the sign of a."""
    return a - quotient(a, b) * b


def shifted_shl(a: Any, amount: Any) -> Any:
    """To the left, 0 for amounts beyond the width."""
    bits = a.dtype.itemsize * 8
    return np.where(amount >= bits, a.dtype.type(0), a << np.minimum(amount, bits - 1).astype(a.dtype))


def shifted_shr(a: Any, amount: Any) -> Any:
    """To the right, with the sign; amounts beyond the width are the width."""
    bits = a.dtype.itemsize * 8
    within = a >> np.minimum(amount, bits - 1).astype(a.dtype)
    return within if a.dtype.kind == "i" else np.where(amount >= bits, a.dtype.type(0), within)


def funnel(low: Any, high: Any, amount: Any, form: tuple[str, str]) -> Any:
    """A shift over two words."""
    direction, mode = form
    by = (amount & np.uint32(31) if mode == "wrap" else np.minimum(amount, np.uint32(32))).astype(np.uint64)
    both = (high.astype(np.uint64) << np.uint64(32)) | low.astype(np.uint64)
    if direction == "r":
        return (both >> by).astype(np.uint32)
    return ((both << by) >> np.uint64(32)).astype(np.uint32)


def extracted(a: Any, place: Any, length: Any) -> Any:
    """Bits of a, from a place on; the sign of signed ones is the last of them, within the word."""
    bits = a.dtype.itemsize * 8
    pos, size = (np.asarray(o, np.int64) & 0xFF for o in (place, length))
    out = shifted_shr(a, np.asarray(pos).astype(np.uint32))
    pad = np.clip(bits - size, 0, bits).astype(np.uint32)
    if a.dtype.kind == "i":
        pad = np.minimum(pad, np.uint32(bits))
        end = np.minimum(pos + size - 1, bits - 1)
        sign = (shifted_shr(a, end.astype(np.uint32)) & a.dtype.type(1)) != 0
        one = np.where(
            size >= bits, a.dtype.type(-1), (a.dtype.type(1) << np.minimum(size, bits - 1).astype(a.dtype)) - 1
        )
        out = np.where(sign, out | ~one, out & one)
        return np.where(size == 0, a.dtype.type(0), out).astype(a.dtype)
    return shifted_shr(shifted_shl(out, pad), pad)


def inserted(a: Any, b: Any, place: Any, length: Any) -> Any:
    """b, with the low bits of a at a place."""
    pos, size = (np.asarray(o).astype(np.uint32) & np.uint32(0xFF) for o in (place, length))
    ones = ~shifted_shl(np.full(np.broadcast(a, pos).shape, ~a.dtype.type(0)), size)
    mask = shifted_shl(ones, pos)
    return (b & ~mask) | (shifted_shl(a, pos) & mask)


def permuted(a: Any, b: Any, selector: int) -> Any:
    """Four bytes, each one of the eight of a and b, or its sign."""
    words, out = (a, b), None
    for byte in range(4):
        choice = selector >> (4 * byte) & 15
        own = (words[choice >> 2 & 1] >> np.uint32(8 * (choice & 3))) & np.uint32(0xFF)
        if choice & 8:
            own = np.where(own & np.uint32(0x80), np.uint32(0xFF), np.uint32(0))
        own = own << np.uint32(8 * byte)
        out = own if out is None else out | own
    return out


def permuted_by(a: Any, b: Any, selector: Any) -> Any:
    """`permuted` with a selector of each thread."""
    both = (b.astype(np.uint64) << np.uint64(32)) | a.astype(np.uint64)
    out = np.zeros(np.broadcast(both, selector).shape, np.uint32)
    for byte in range(4):
        choice = selector >> np.uint32(4 * byte)
        own = ((both >> (8 * (choice & np.uint32(7))).astype(np.uint64)) & np.uint64(0xFF)).astype(np.uint32)
        own = np.where(choice & np.uint32(8), np.where(own & 0x80, np.uint32(0xFF), np.uint32(0)), own)
        out = out | (own << np.uint32(8 * byte))
    return out


def three_inputs_of(a: Any, b: Any, c: Any, table: int) -> Any:
    """Any function of three bits."""
    out = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
    for case in range(8):
        if table >> case & 1:
            out = out | ((a if case & 4 else ~a) & (b if case & 2 else ~b) & (c if case & 1 else ~c))
    return out


def clz(a: Any) -> Any:
    """Zeros before the first one."""
    bits = a.dtype.itemsize * 8
    filled = a
    for step in (1, 2, 4, 8, 16, 32)[: bits.bit_length() - 1]:
        filled = filled | (filled >> a.dtype.type(step))
    return bits - np.bitwise_count(filled).astype(np.uint32)


def brev(a: Any) -> Any:
    """Bits in reverse."""
    bits, out = a.dtype.itemsize * 8, np.zeros_like(a)
    for bit in range(bits):
        out = out | (((a >> a.dtype.type(bit)) & a.dtype.type(1)) << a.dtype.type(bits - 1 - bit))
    return out


HELPERS: dict[str, Any] = {
    "spread": spread,
    "high": high,
    "quotient": quotient,
    "remainder": remainder,
    "shifted_shl": shifted_shl,
    "shifted_shr": shifted_shr,
    "funnel": funnel,
    "extracted": extracted,
    "inserted": inserted,
    "permuted": permuted,
    "permuted_by": permuted_by,
    "three_inputs": three_inputs_of,
    "clz": clz,
    "brev": brev,
    "popc": np.bitwise_count,
}

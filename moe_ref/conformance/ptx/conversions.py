"""``cvt``: between integers, between floats, and from one to the other (9.7.9.21)."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_ref.conformance.ptx.emit import DTYPES, Emitter, plain
from moe_ref.conformance.ptx.floats import FLOATS, from_bf16, to_bf16
from moe_ref.conformance.ptx.integers import Handler
from moe_ref.conformance.ptx.text import Instruction, Unreadable

ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
KNOWN = {"rn", "rna", "rz", "ftz", "sat", *ROUND}


def convert(e: Emitter, own: Instruction) -> None:
    """Any conversion."""
    _, *modifiers, to, kind = own.opcode
    if not set(modifiers) <= KNOWN:
        raise Unreadable(f"{own.name}: unknown form")
    if to in ("bf16x2", "f16x2") and kind == "f32":
        high, low = (f"packed_half({e.read(o, 'f32')}, {to[:-2]!r})" for o in own.operands[1:])
        e.write(own.operands[0], "u32", f"({high} << U32(16)) | {low}", own)
        return
    if to == "tf32" and "rna" in modifiers:
        e.write(own.operands[0], "u32", f"to_tf32({e.read(own.operands[1], 'u32')})", own)
        return
    if to not in FLOATS and kind not in FLOATS:
        _of_integers(e, own, to, kind, modifiers)
        return
    source = e.read(own.operands[1], plain(kind))
    result = plain(to)
    if kind == "bf16":
        source = f"from_bf16({source})"
    if to == "bf16":
        e.write(own.operands[0], "u16", f"to_bf16(({source}).astype(F32))", own)
    elif to in FLOATS:
        rounding = next((own_mode for own_mode in modifiers if own_mode in ROUND), "")
        value = f"round_{rounding}({source})" if rounding else source
        if "ftz" in modifiers:
            value = f"flushed({value})"
        if "sat" in modifiers or "rz" in modifiers:
            raise Unreadable(f"{own.name}: unknown form")
        e.write(own.operands[0], result, f"{value}.astype({result.upper()})", own)
    else:
        (rounding,) = [own_mode for own_mode in modifiers if own_mode in ROUND]
        e.write(own.operands[0], result, f"to_integer({source}, {rounding!r}, {result.upper()})", own)


def _of_integers(e: Emitter, own: Instruction, to: str, kind: str, modifiers: list[str]) -> None:
    source, result = e.read(own.operands[1], plain(kind)), plain(to)
    if "sat" in modifiers:
        e.write(own.operands[0], result, f"saturated({source}, {result.upper()})", own)
        return
    e.write(own.operands[0], result, f"{source}.astype({result.upper()})", own)


def packed_half(value: Any, kind: str) -> Any:
    """Fp32 in 16 bits, as the low half of a word."""
    bits = to_bf16(value) if kind == "bf16" else value.astype(np.float16).view(np.uint16)
    return bits.astype(np.uint32)


def to_tf32(bits: Any) -> Any:
    """Fp32 rounded to 10 bits of fraction, ties away from zero; the low bits are zeros."""
    value = bits.view(np.float32)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(value), rounded, bits)


def to_integer(value: Any, rounding: str, dtype: Any) -> Any:
    """Rounded and clamped; NaN is 0."""
    limits = np.iinfo(dtype)
    whole = ROUND[rounding](value.astype(np.float64))
    whole = np.where(np.isnan(whole), 0.0, whole)
    top = np.float64(limits.max)
    inside = np.clip(whole, np.float64(limits.min), np.nextafter(top, 0) if top > 2.0**52 else top)
    return np.where(whole >= top, dtype(limits.max), inside.astype(dtype))


def saturated(value: Any, dtype: Any) -> Any:
    """An integer clamped to another's range."""
    limits = np.iinfo(dtype)
    own = np.iinfo(value.dtype)
    low, high = max(limits.min, own.min), min(limits.max, own.max)
    return np.clip(value, value.dtype.type(low), value.dtype.type(high)).astype(dtype)


HANDLERS: dict[str, Handler] = {"cvt": convert}
HELPERS: dict[str, Any] = {name.upper(): dtype.type for name, dtype in DTYPES.items()}
HELPERS |= {f"round_{name}": function for name, function in ROUND.items()}
HELPERS |= {
    "packed_half": packed_half,
    "to_tf32": to_tf32,
    "to_integer": to_integer,
    "saturated": saturated,
    "from_bf16": from_bf16,
}

"""``cvt``: PTX ISA 9.2, "Data Movement and Conversion Instructions: cvt"."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_ref.conformance.ptx.bfloat16 import from_bf16, to_bf16
from moe_ref.conformance.ptx.emit import DTYPES, Emitter, plain
from moe_ref.conformance.ptx.floats import FLOATS
from moe_ref.conformance.ptx.integers import Handler
from moe_ref.conformance.ptx.text import Instruction, Unreadable

ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
MODIFIERS = {"rn", "ftz", "sat", *ROUND}


def convert(e: Emitter, own: Instruction) -> None:
    """Any conversion."""
    _, *modifiers, to, kind = own.opcode
    packs = to in ("bf16x2", "f16x2") and kind == "f32"
    if packs and modifiers == ["rn"]:
        high, low = (f"packed_half({e.read(o, 'f32')}, {to[:-2]!r})" for o in own.operands[1:])
        e.write(own.operands[0], "u32", f"({high} << U32(16)) | {low}", own)
    elif to == "tf32" and modifiers == ["rna"]:
        e.write(own.operands[0], "u32", f"to_tf32({e.read(own.operands[1], 'u32')})", own)
    elif packs or to == "tf32" or not set(modifiers) <= MODIFIERS:
        raise Unreadable(f"{own.name}: unknown form")
    elif to not in FLOATS and kind not in FLOATS:
        _of_integers(e, own, to, kind, modifiers)
    else:
        _of_floats(e, own, to, kind, modifiers)


def _of_floats(e: Emitter, own: Instruction, to: str, kind: str, modifiers: list[str]) -> None:
    """To a float, from a float, or both; subnormal numbers are flushed only in fp32."""
    source, result = e.read(own.operands[1], plain(kind)), plain(to)
    if kind == "bf16":
        source = f"from_bf16({source})"
    if "ftz" in modifiers and kind == "f32":
        source = f"flushed({source})"
    rounding = next((mode for mode in modifiers if mode in ROUND), "")
    if to not in FLOATS:
        if not rounding:
            raise Unreadable(f"{own.name}: must say how it rounds")
        nan = kind == "f64" or to in ("s64", "u64")
        e.write(own.operands[0], result, f"to_integer({source}, {rounding!r}, {result.upper()}, {nan})", own)
        return
    value = f"round_{rounding}({source})" if rounding else source
    if "sat" in modifiers or (to == "bf16" and kind not in ("f32", "f16")):  # from others it would round twice
        raise Unreadable(f"{own.name}: unknown form")
    if to == "bf16":
        e.write(own.operands[0], "u16", f"to_bf16(({value}).astype(F32))", own)
        return
    value = f"{value}.astype({result.upper()})"
    e.write(own.operands[0], result, f"flushed({value})" if "ftz" in modifiers and to == "f32" else value, own)


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


def to_integer(value: Any, rounding: str, dtype: Any, nan: bool) -> Any:
    """Rounded and clamped; NaN is 0, or if ``nan`` the integer with only its highest bit set."""
    limits = np.iinfo(dtype)
    whole = ROUND[rounding](value.astype(np.float64))
    undefined = np.isnan(whole)
    whole = np.where(undefined, 0.0, whole)
    top = np.float64(limits.max)
    inside = np.clip(whole, np.float64(limits.min), np.nextafter(top, 0) if top > 2.0**52 else top)
    out = np.where(whole >= top, dtype(limits.max), inside.astype(dtype))
    return np.where(undefined & nan, dtype(limits.min or limits.max // 2 + 1), out)


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

"""Instructions on floats: rounded to nearest even, unless they are approximations.

A result is what PTX ISA 9.2 specifies in "Floating-Point Instructions" and "Half Precision Floating-Point
Instructions", bit for bit, except for NaN payloads and for `approximations`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_ref.conformance.ptx.approximations import BOUNDS
from moe_ref.conformance.ptx.bfloat16 import from_bf16, to_bf16
from moe_ref.conformance.ptx.emit import Emitter, plain
from moe_ref.conformance.ptx.integers import Handler
from moe_ref.conformance.ptx.text import Instruction, Unreadable

FLOATS = {"f16", "f32", "f64", "bf16", "f16x2", "bf16x2"}
MODIFIERS = {"rn", "ftz", "approx", "full", "NaN"}
BINARY = {"add": "+", "sub": "-", "mul": "*"}


def is_float(own: Instruction) -> bool:
    """Whether an instruction is on floats."""
    return own.opcode[-1] in FLOATS


def handle(e: Emitter, own: Instruction) -> None:
    """Any instruction on floats."""
    name, *modifiers, kind = own.opcode
    if not set(modifiers) <= MODIFIERS:
        raise Unreadable(f"{own.name}: unknown form")
    if kind in ("f16x2", "bf16x2"):
        _packed(e, own, name, kind)
        return
    ftz = "ftz" in modifiers

    def read(operand: Any) -> str:
        if kind == "bf16":
            return f"from_bf16({e.read(operand, 'u16')})"
        value = e.read(operand, plain(kind))
        return e.once(f"flushed({value})") if ftz else value

    values = [read(operand) for operand in own.operands[1:]]
    value = _expression(name, modifiers, values, kind, own)
    free = e.contracts and kind in ("f32", "f64") and not modifiers and name in BINARY
    if free and name != "mul":
        value = _contracted(e, name, kind, values) or value
    if kind == "bf16":
        e.write(own.operands[0], "u16", f"to_bf16({value})", own)
        return
    e.write(own.operands[0], plain(kind), f"flushed({value})" if ftz else value, own)
    if free and name == "mul" and own.guard is None:
        e.products[e.read(own.operands[0], kind)] = values[0], values[1]


def _contracted(e: Emitter, name: str, kind: str, values: list[str]) -> str:
    """An fma in place of a sum with a product.

    Without a rounding mode both may become one: "Floating Point Instructions: add", "sub" and "mul".
    """
    left, right = values
    if left in e.products:
        a, b = e.products[left]
        return f"fma_{kind}({a}, {b}, {right if name == 'add' else f'negative({right})'})"
    if right in e.products:
        a, b = e.products[right]
        return f"fma_{kind}({a if name == 'add' else f'negative({a})'}, {b}, {left})"
    return ""


def _expression(name: str, modifiers: list[str], values: list[str], kind: str, own: Instruction) -> str:
    if name in BINARY:
        return f"{values[0]} {BINARY[name]} {values[1]}"
    if name in ("fma", "mad"):
        single = kind in ("f32", "f64")
        return f"{'fma' if single else 'fma16'}_{kind if single else 'f'}({', '.join(values)})"
    if name in ("min", "max"):
        return f"{name}_of({values[0]}, {values[1]}, {'NaN' in modifiers})"
    if name == "neg":
        return f"negative({values[0]})"
    if name == "abs":
        return f"absolute({values[0]})"
    if "rn" in modifiers:
        if name == "div":
            return f"{values[0]} / {values[1]}"
        if name == "sqrt":
            return f"sqrt({values[0]})"
        if name == "rcp":
            return f"np.{plain(kind).replace('f', 'float')}(1) / {values[0]}"
    elif (name, kind) in BOUNDS and ("approx" in modifiers or (name == "div" and "full" in modifiers)):
        value = f"m.approximate({name!r}, {kind!r}, {', '.join(values)})"
        return f"fast_quotient({value}, {', '.join(values)})" if name == "div" and "approx" in modifiers else value
    raise Unreadable(f"{own.name}: unknown form")


def _packed(e: Emitter, own: Instruction, name: str, kind: str) -> None:
    """Two floats of 16 bits side by side."""
    halves = []
    ftz = "ftz" in own.opcode
    for part in (0, 16):
        values = []
        for operand in own.operands[1:]:
            bits = f"({e.read(operand, 'u32')} >> U32({part})).astype(U16)"
            value = f"from_bf16({bits})" if kind == "bf16x2" else f"{bits}.view(F16)"
            values.append(f"flushed({value})" if ftz else value)
        value = _expression(name, list(own.opcode[1:-1]), values, kind[:-2], own)
        value = f"flushed({value})" if ftz else value
        halves.append(f"to_bf16({value})" if kind == "bf16x2" else f"({value}).view(U16)")
    low, high = halves
    e.write(own.operands[0], "u32", f"{low}.astype(U32) | ({high}.astype(U32) << U32(16))", own)


HANDLERS: dict[str, Handler] = dict.fromkeys(
    ("fma", "sqrt", "rcp", "ex2", "lg2", "rsqrt", "sin", "cos", "tanh"), handle
)


def flushed(value: Any) -> Any:
    """Subnormal numbers as zeros of their sign (.ftz)."""
    small = np.abs(value) < np.finfo(value.dtype).smallest_normal
    return np.where(small, np.copysign(value.dtype.type(0), value), value)


def fma_f32(a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once.

    The product is exact in fp64, and the sum there has 29 bits more than fp32. Rounding twice differs from rounding
    once only where those bits are half a unit, or where the result is subnormal.
    """
    product = np.multiply(a, b, dtype=np.float64)
    total = product + c
    out = total.astype(np.float32)
    tail = total.view(np.int64) & 0x1FFFFFFF
    doubtful = (tail == 0x10000000) | (np.abs(out) < np.float32(2**-125))
    if doubtful.any():
        out[doubtful] = _once(product[doubtful], np.broadcast_to(c, out.shape)[doubtful])
    return out


def _once(product: Any, c: Any) -> Any:
    """The sum rounded to odd in fp64, then to fp32 (Boldo and Melquiond, 2008)."""
    return _odd_sum(product, c.astype(np.float64)).astype(np.float32)


def _odd_sum(a: Any, b: Any) -> Any:
    total = a + b
    virtual = total - a
    error = (a - (total - virtual)) + (b - virtual)
    bits = total.view(np.int64)
    inexact = (error != 0) & np.isfinite(total) & (bits & 1 == 0)
    away = (error > 0) == (total > 0)
    return np.where(inexact, bits + np.where(away, 1, -1), bits).view(np.float64)


def fma_f64(a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once (Boldo and Melquiond, 2008), but for products near the ends of fp64's range."""
    a, b, c = (np.broadcast_to(o, np.broadcast(a, b, c).shape) for o in (a, b, c))
    product = a * b
    plain_sum = product + c
    split = [(o * 134217729.0) - ((o * 134217729.0) - o) for o in (a, b)]
    rest = [a - split[0], b - split[1]]
    error = ((split[0] * split[1] - product) + split[0] * rest[1] + rest[0] * split[1]) + rest[0] * rest[1]
    high = c + error
    virtual = high - c
    low = (c - (high - virtual)) + (error - virtual)
    total = product + high
    virtual = total - product
    second = (product - (total - virtual)) + (high - virtual)
    out = total + _odd_sum(low, second)
    return np.where(np.isfinite(out), out, plain_sum)


def fma16_f(a: Any, b: Any, c: Any) -> Any:
    """In 16 bits: exact in fp64 but for sums of numbers far apart, which one rounding hides."""
    wide = _odd_sum(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64))
    if a.dtype == np.float16:
        return wide.astype(np.float16)
    narrow = wide.astype(np.float32)  # odd once more, so that to_bf16 rounds once
    back = narrow.astype(np.float64)
    bits = narrow.view(np.int32)
    inexact = (back != wide) & np.isfinite(narrow) & (bits & 1 == 0)
    step = np.where(np.abs(back) < np.abs(wide), np.int32(1), np.int32(-1))
    return np.where(inexact, bits + step, bits).view(np.float32)


def min_of(a: Any, b: Any, keep: bool) -> Any:
    """The lesser; of a NaN and a number the number, unless NaN are kept; -0 is less than +0."""
    return _extremum(a, b, keep, np.fmin, np.bitwise_or)


def max_of(a: Any, b: Any, keep: bool) -> Any:
    """The greater, likewise."""
    return _extremum(a, b, keep, np.fmax, np.bitwise_and)


def _extremum(a: Any, b: Any, keep: bool, choose: Any, zeros: Any) -> Any:
    out = choose(a, b)
    both = (a == 0) & (b == 0)
    if np.any(both):
        bits = np.dtype(f"u{out.dtype.itemsize}")
        out = np.where(both, zeros(np.asarray(a).view(bits), np.asarray(b).view(bits)).view(out.dtype), out)
    if keep:
        nan = out.dtype.type(np.nan)
        out = np.where(np.isnan(a) | np.isnan(b), nan, out)
    return out


HELPERS: dict[str, Any] = {
    "flushed": flushed,
    "from_bf16": from_bf16,
    "to_bf16": to_bf16,
    "fma_f32": fma_f32,
    "fma_f64": fma_f64,
    "fma16_f": fma16_f,
    "min_of": min_of,
    "max_of": max_of,
}

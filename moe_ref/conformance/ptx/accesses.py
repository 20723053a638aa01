"""Instructions that touch memory: ``ld``, ``st``, ``cp.async``, ``ldmatrix``, ``atom``.

PTX ISA 9.2: "Data Movement and Conversion Instructions", there "Asynchronous copy"; "Warp-level matrix load
instruction: ldmatrix"; "Parallel Synchronization and Communication Instructions: atom".
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_ref.conformance.ptx.emit import DTYPES, Emitter, plain, unsigned, width
from moe_ref.conformance.ptx.floats import max_of, min_of
from moe_ref.conformance.ptx.integers import Handler
from moe_ref.conformance.ptx.text import Address, Imm, Instruction, Operand, Reg, Symbol, Unreadable

VECTORS = {"v2": 2, "v4": 4, "v8": 8}
HINTS = {"relaxed", "acquire", "release", "acq_rel", "gpu", "cta", "sys", "volatile", "weak", "nc", "ca", "cg", "cs"}
HINTS |= {"lu", "cv", "wb", "wt", "L1::evict_first", "L1::evict_last", "L1::no_allocate", "L1::evict_normal"}
HINTS |= {"L2::64B", "L2::128B", "L2::256B", "L1::evict_unchanged", "L2::cache_hint"}


def _form(own: Instruction) -> tuple[str, int, str]:
    """Space, numbers of a vector, and type."""
    space, vector, rest = "global", 1, []
    for word in own.opcode[1:-1]:
        if word in ("global", "shared", "param", "shared::cta"):
            space = word.split("::")[0]
        elif word in VECTORS:
            vector = VECTORS[word]
        elif word not in HINTS:
            rest.append(word)
    if rest:
        raise Unreadable(f"{own.name}: unknown form")
    return space, vector, own.opcode[-1]


def address(e: Emitter, operand: Operand) -> str:
    """An expression for an address in signed 64 bits."""
    if not isinstance(operand, Address):
        raise Unreadable(f"{operand}: must be an address")
    if isinstance(operand.base, str):
        return f"full(m.threads, {operand.offset}, S64)"
    bits = e.bits[operand.base.name]
    base = e.read(operand.base, f"s{bits}") if bits == 64 else f"{e.read(operand.base, 'u32')}.astype(S64)"
    return e.once(f"{base} + S64({operand.offset})") if operand.offset else e.once(base)


def load(e: Emitter, own: Instruction) -> None:
    """``ld``: with a guard, registers of other threads stay as they were."""
    space, vector, kind = _form(own)
    targets = own.operands[0] if isinstance(own.operands[0], tuple) else (own.operands[0],)
    if space == "param":
        _load_parameter(e, own, kind)
        return
    own_kind = plain(kind)
    signed = own_kind if own_kind[0] == "s" else f"u{width(own_kind)}"
    loaded = e.let(
        f"m.load_{space}({e.name(own, 'i')}, {address(e, own.operands[1])}, {signed.upper()}, {vector}, "
        f"{e.threads(own)})"
    )
    for place, target in enumerate(targets):
        e.write(target, signed, f"{loaded}[{place}]", own)


def _load_parameter(e: Emitter, own: Instruction, kind: str) -> None:
    source = own.operands[1]
    assert isinstance(source, Address)
    e.write(own.operands[0], plain(kind), f"m.parameter({source.base!r}, {source.offset}, {plain(kind).upper()})", own)


def store(e: Emitter, own: Instruction) -> None:
    """``st``."""
    space, _, kind = _form(own)
    values = own.operands[1] if isinstance(own.operands[1], tuple) else (own.operands[1],)
    bits = unsigned(width(plain(kind)))
    given = ", ".join(e.read(value, bits) for value in values)
    unit = "shared" if space == "shared" else "memory"
    e.line(f"m.{unit}.store({e.name(own, 'i')}, {address(e, own.operands[0])}, [{given}], {e.threads(own)})")


def copy(e: Emitter, own: Instruction) -> None:
    """``cp.async``: copies of 4, 8 or 16 bytes, with zeros behind the source's size."""
    if own.opcode[:3] == ("cp", "async", "commit_group"):
        e.line(f"m.shared.commit({e.threads(own)})")
        return
    if own.opcode[:3] in (("cp", "async", "wait_group"), ("cp", "async", "wait_all")):
        pending = own.operands[0] if own.operands else Imm(0)
        assert isinstance(pending, Imm)
        if own.opcode[2] == "wait_all":
            e.line(f"m.shared.commit({e.threads(own)})")
        e.line(f"m.shared.wait({pending.value}, {e.threads(own)})")
        return
    known = {"ca", "cg", "shared", "global", "shared::cta"} | HINTS
    if own.opcode[:2] != ("cp", "async") or not set(own.opcode[2:]) <= known:
        raise Unreadable(f"{own.name}: unknown form")
    target, source, size, *rest = own.operands
    assert isinstance(size, Imm)
    given = e.read(rest[0], "u32") if rest else f"U32({size.value})"
    where = f"{address(e, target)}, {address(e, source)}, {size.value}, {given}"
    e.line(f"m.copy({e.name(own, 'i')}, {where}, {e.threads(own)})")


def matrices(e: Emitter, own: Instruction) -> None:
    """``ldmatrix``: 1, 2 or 4 matrices of 8 rows of 16 bytes."""
    words = own.opcode[1:]
    trans = "trans" in words
    expected = {"sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta", "b16"}
    if not set(words) <= expected:
        raise Unreadable(f"{own.name}: unknown form")
    targets = own.operands[0] if isinstance(own.operands[0], tuple) else (own.operands[0],)
    where = address(e, own.operands[1])
    loaded = e.let(f"m.load_matrices({e.name(own, 'i')}, {where}, {len(targets)}, {trans}, {e.threads(own)})")
    for place, target in enumerate(targets):
        e.write(target, "u32", f"{loaded}[{place}]", own)


def store_matrices(e: Emitter, own: Instruction) -> None:
    """``stmatrix``: 1, 2 or 4 matrices of 8 rows of 16 bytes (PTX ISA, "stmatrix")."""
    words = own.opcode[1:]
    expected = {"sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta", "b16"}
    values = own.operands[1]
    if not set(words) <= expected or own.guard is not None or not isinstance(values, tuple):
        raise Unreadable(f"{own.name}: unknown form")
    given = ", ".join(e.read(value, "u32") for value in values)
    where = f"{address(e, own.operands[0])}, [{given}], {'trans' in words}"
    e.line(f"m.store_matrices({e.name(own, 'i')}, {where}, {e.threads(own)})")


def convert_address(e: Emitter, own: Instruction) -> None:
    """``cvta.param``: of a parameter, whose address is one of all addresses here."""
    if own.opcode != ("cvta", "param", "u64"):
        raise Unreadable(f"{own.name}: unknown form")
    e.write(own.operands[0], "u64", e.read(own.operands[1], "u64"), own)


def atomic(e: Emitter, own: Instruction) -> None:
    """``atom`` and ``red``, thread after thread."""
    words = [word for word in own.opcode[1:] if word not in HINTS and word != "shared::cta"]
    space = words.pop(0) if words[0] in ("global", "shared") else "global"
    operation, kind = words[0], words[-1]
    if len(words) > 3 or operation not in ATOMICS or kind in ("f16x2", "bf16x2", "bf16"):
        raise Unreadable(f"{own.name}: unknown form")
    returns = own.opcode[0] == "atom"
    target, *values = own.operands[1:] if returns else own.operands
    given = ", ".join(e.read(value, plain(kind)) for value in values)
    call = f"m.atomic({e.name(own, 'i')}, {space!r}, {operation!r}, {address(e, target)}, [{given}], {e.threads(own)})"
    if returns and isinstance(own.operands[0], (Reg, Symbol)):
        e.write(own.operands[0], plain(kind), e.let(call), own)
    else:
        e.line(call)


ATOMICS: dict[str, Any] = {
    "add": lambda old, new: old + new,
    "min": lambda old, new: np.minimum(old, new) if old.dtype.kind != "f" else min_of(old, new, False),
    "max": lambda old, new: np.maximum(old, new) if old.dtype.kind != "f" else max_of(old, new, False),
    "and": lambda old, new: old & new,
    "or": lambda old, new: old | new,
    "xor": lambda old, new: old ^ new,
    "exch": lambda _, new: new,
    "cas": lambda old, compare, new: np.where(old == compare, new, old),
}
HANDLERS: dict[str, Handler] = {"ld": load, "st": store, "cp": copy, "ldmatrix": matrices}
HANDLERS |= {"atom": atomic, "red": atomic, "stmatrix": store_matrices, "cvta": convert_address}
HELPERS: dict[str, Any] = {"DTYPES": DTYPES}

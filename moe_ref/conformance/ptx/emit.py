"""Writes the Python of one basic block, instruction by instruction, for all threads at once.

Each register is an array with an element for each thread. A block's function takes those it reads from the machine,
computes new ones, and gives back those that a later block reads. Nothing is changed in place.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_ref.conformance.ptx.text import Imm, Instruction, Operand, Reg, Special, Symbol, Unreadable

DTYPES: dict[str, Any] = {}
for _letter, _numpy, _widths in (("u", "u", (8, 16, 32, 64)), ("s", "i", (8, 16, 32, 64)), ("f", "f", (16, 32, 64))):
    DTYPES |= {f"{_letter}{bits}": np.dtype(f"{_numpy}{bits // 8}") for bits in _widths}
DTYPES["p"] = np.dtype(bool)


def width(kind: str) -> int:
    """Bits of a kind: of "f32" 32, of "p", a predicate, 1."""
    return 1 if kind == "p" else int(kind[1:])


def plain(kind: str) -> str:
    """The kind for a type of PTX: bits without a meaning are unsigned."""
    if kind == "pred":
        return "p"
    return "u16" if kind == "bf16" else "u32" if kind in ("f16x2", "bf16x2") else kind.replace("b", "u")


class Emitter:
    """The lines of a block's function.

    Attributes:
        lines: of Python.
        names: what the lines refer to beside the machine ``m`` and the registers ``R``.
        masked: whether some threads are elsewhere; then ``M`` says which are here.
        contracts: whether a product and a sum without a rounding mode become one fma.
        products: the factors of variables that hold such products.
        addresses: of parameters, by name.
    """

    def __init__(self, bits: dict[str, int], names: dict[str, Any], masked: bool, contracts: bool = False) -> None:
        self.lines: list[str] = []
        self.names = names
        self.masked = masked
        self.bits = bits
        self.written: set[str] = set()
        self.contracts = contracts
        self.products: dict[str, tuple[str, str]] = {}
        self.addresses: dict[str, int] = {}
        self.carry = ""  # the variable that holds it
        self._at: dict[str, dict[str, str]] = {}  # the variables that hold a register, by kind
        self._memo: dict[str, tuple[str, tuple[str, ...]]] = {}
        self._count = 0

    def new(self) -> str:
        """A new variable."""
        self._count += 1
        return f"v{self._count}"

    def line(self, text: str) -> None:
        """Adds a line."""
        self.lines.append(text)

    def name(self, value: Any, prefix: str = "c") -> str:
        """A name for a value that is known now."""
        key = f"{prefix}{len(self.names)}"
        self.names[key] = value
        return key

    def let(self, expression: str) -> str:
        """A variable that holds an expression."""
        variable = self.new()
        self.line(f"{variable} = {expression}")
        return variable

    def constant(self, value: Any) -> str:
        """A name for a NumPy scalar, the same for the same bits."""
        key = f"k_{value.dtype.name}_{value.tobytes().hex()}"
        self.names[key] = value
        return key

    def read(self, operand: Operand, kind: str) -> str:
        """An expression for an operand's numbers; a wider register is cut off."""
        if isinstance(operand, Imm):
            return self.constant(number(operand, kind))
        if isinstance(operand, Special):
            return f"m.special[{operand.name!r}]"
        if isinstance(operand, Symbol):
            if operand.name in self.bits:
                return self.read(Reg(operand.name), kind)
            return self.constant(DTYPES[kind].type(self.addresses.get(operand.name, 0)))  # shared memory begins at 0
        if not isinstance(operand, Reg) or operand.name not in self.bits:
            raise Unreadable(f"{operand}: must be a register or a number")
        bits = self.bits[operand.name]
        own = self._at.setdefault(operand.name, {})
        if not own:
            own[unsigned(bits)] = self.let(f"R[{operand.name!r}]")
        if kind not in own:
            if width(kind) > bits:
                raise Unreadable(f"{operand.name}: must have {width(kind)} bits, has {bits}")
            some = next(iter(own))
            variable = own[some]
            if width(kind) < bits:
                variable = own.get(unsigned(bits)) or self.let(f"{variable}.view(U{bits})")
                return self.let(f"{variable}.astype({kind.upper()})")
            own[kind] = self.let(f"{variable}.view({kind.upper()})")
        return own[kind]

    def write(self, operand: Operand, kind: str, expression: str, own: Instruction) -> None:
        """Gives a register its value, where the guard of the instruction holds; a wider register is extended."""
        if isinstance(operand, Symbol) and operand.name == "_":
            return
        name = operand.name if isinstance(operand, (Reg, Symbol)) else ""
        if name not in self.bits:
            raise Unreadable(f"{operand}: must be a register")
        bits = self.bits[name]
        if width(kind) < bits:
            kind, expression = (wide := f"{kind[0]}{bits}"), f"({expression}).astype({wide.upper()})"
        elif width(kind) > bits:
            raise Unreadable(f"{name}: must have {width(kind)} bits, has {bits}")
        if own.guard is not None:
            expression = f"where({self.guard(own)}, {expression}, {self.read(Reg(name), kind)})"
        self.put(name, kind, self.let(expression))

    def put(self, name: str, kind: str, variable: str) -> None:
        """Says that a variable holds a register from here on."""
        self._at[name] = {kind: variable}
        self.written.add(name)

    def guard(self, own: Instruction) -> str:
        """The threads for which a guard holds, of those that are here or not."""
        assert own.guard is not None
        guard = self.read(own.guard, "p")
        return self.once(f"~{guard}", guard) if own.negated else guard

    def threads(self, own: Instruction) -> str:
        """The threads that run an instruction, "None" for all."""
        if own.guard is None:
            return "M" if self.masked else "None"
        guard = self.guard(own)
        return self.once(f"M & {guard}", guard) if self.masked else guard

    def once(self, expression: str, *of: str) -> str:
        """A variable for an expression over variables, which never change: computed once in a block."""
        if expression not in self._memo:
            self._memo[expression] = self.let(expression), of
        return self._memo[expression][0]

    def finish(self, live: set[str]) -> None:
        """Gives back what later blocks read."""
        for name in sorted(self.written & live):
            kind = unsigned(self.bits[name])
            variable = self.read(Reg(name), kind)
            self.line(
                f"R[{name!r}] = where(M, {variable}, R[{name!r}])" if self.masked else f"R[{name!r}] = {variable}"
            )


def unsigned(bits: int) -> str:
    """The kind in which a register of so many bits is kept."""
    return "p" if bits == 1 else f"u{bits}"


def number(operand: Imm, kind: str) -> Any:
    """A number of the text as a NumPy scalar."""
    if operand.float_bits:
        value = np.array(operand.value, f"u{operand.float_bits // 8}").view(f"f{operand.float_bits // 8}")
        if kind[0] == "f":
            return DTYPES[kind].type(value)
        return value.view(DTYPES[f"u{operand.float_bits}"])[()].view(DTYPES[kind])
    if kind == "p":
        return np.bool_(operand.value != 0)
    bits = width(kind)
    raw = np.array(operand.value & ((1 << bits) - 1), f"u{bits // 8}")
    return raw.view(DTYPES[kind])[()]

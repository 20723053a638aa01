"""Translates a kernel once: each basic block becomes two functions of Python, for all threads and for some."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from moe_ref.conformance.ptx import (
    accesses,
    approximations,
    conversions,
    floats,
    integer_values,
    integers,
    mbarrier,
    tensor_map,
    warps,
    wgmma,
)
from moe_ref.conformance.ptx.emit import Emitter
from moe_ref.conformance.ptx.flow import Block, blocks_of, read_by, registers_of, written
from moe_ref.conformance.ptx.integers import Handler
from moe_ref.conformance.ptx.text import BITS, Address, Imm, Instruction, Reg, Text, Unreadable, read

Run = Callable[..., Any]  # (machine, registers, mask) -> whether the branch is taken, or None

HANDLERS: dict[str, Handler] = {
    **integers.HANDLERS,
    **floats.HANDLERS,
    **conversions.HANDLERS,
    **accesses.HANDLERS,
    **warps.HANDLERS,
    **mbarrier.HANDLERS,
    **wgmma.HANDLERS,
}
HELPERS: dict[str, Any] = {
    **integer_values.HELPERS,
    **floats.HELPERS,
    **approximations.HELPERS,
    **conversions.HELPERS,
    **accesses.HELPERS,
    **warps.HELPERS,
    **tensor_map.HELPERS,
}
HELPERS |= {own: getattr(np, own) for own in ("where", "negative", "absolute", "minimum", "maximum", "zeros_like")}
HELPERS |= {own: getattr(np, own) for own in ("multiply", "isnan", "sqrt", "full")} | {"np": np}


@dataclass
class Translated:
    """A kernel that can run.

    Attributes:
        text: as it was read.
        blocks: its blocks.
        contracts: whether a product and a sum without a rounding mode are one fma.
        runs: functions of blocks, by number and by whether only some threads run them; made when they are asked for.
        initial: bits of the registers that some block reads before it writes them.
        shared_unit: the fewest bytes of an access to shared memory.
        memory_unit: the same for global memory.
        outputs: names of the parameters through which it may store.
        in_products: names of the registers that products of warp groups use.
        asynchronous: whether it has wgmma, TMA or mbarriers.
    """

    text: Text
    blocks: list[Block]
    contracts: bool
    runs: dict[tuple[int, bool], Run]
    initial: dict[str, int]
    shared_unit: int
    memory_unit: int
    outputs: set[str]
    in_products: list[str]
    asynchronous: bool

    def run_of(self, number: int, masked: bool) -> Run:
        """The function of a block, for all threads or for some."""
        key = number, masked
        if key not in self.runs:
            self.runs[key] = _compiled(self.text, self.blocks[number], masked, self.contracts)
        return self.runs[key]


@lru_cache(maxsize=512)
def translated(ptx: str, contracts: bool = False) -> Translated:
    """Reads and translates a kernel, once for each text.

    Args:
        ptx: the text.
        contracts: whether a product and a sum in one block, both without a rounding mode, are one fma, as an assembler
            may have it; else each rounds.

    Raises:
        Unreadable: an instruction is not known, or not in this form; the message names it and its line.
    """
    text = read(ptx)
    blocks = blocks_of(text)
    for block in blocks:
        _python_of(text, block, False)  # stops at what is not known, even if it would never run
    initial: set[str] = set()
    for block in blocks:
        kill: set[str] = set()
        for own in [*block.instructions, *([block.branch] if block.branch else [])]:
            initial |= set(read_by(own)) - kill
            kill |= set(written(own))
        initial |= block.live
    bits = {name: text.bits[name] for name in sorted(initial)}
    units = {space: _unit(text, space) for space in ("shared", "global")}
    beside = any(own.opcode[0] in ("wgmma", "mbarrier") or "bulk" in own.opcode for own in text.instructions)
    return Translated(
        text,
        blocks,
        contracts,
        {},
        bits,
        units["shared"],
        units["global"],
        _outputs(text),
        wgmma.registers_in(text),
        beside,
    )


def handler_of(own: Instruction) -> Handler:
    """What translates an instruction.

    Raises:
        Unreadable: nothing does.
    """
    name = own.opcode[0]
    if name in integers.SHARED:
        return floats.handle if floats.is_float(own) else integers.SHARED[name]
    if own.opcode[:4] == ("cp", "async", "bulk", "tensor"):
        return tensor_map.handle
    if name not in HANDLERS:
        raise Unreadable(f"{own.name}: unknown instruction")
    return HANDLERS[name]


def _compiled(text: Text, block: Block, masked: bool, contracts: bool) -> Run:
    code, names = _python_of(text, block, masked, contracts)
    exec(compile(code, f"<{text.name}, block {block.number}>", "exec"), names)
    return names["run"]


def _python_of(text: Text, block: Block, masked: bool, contracts: bool = False) -> tuple[str, dict[str, Any]]:
    """The text of a block's function, and the names that it refers to."""
    names = dict(HELPERS)
    e = Emitter(text.bits, names, masked, contracts)
    e.addresses = text.addresses
    touches = wgmma.Touches(text, e)
    for own in block.instructions:
        try:
            touches.before(own)
            handler_of(own)(e, own)
        except (Unreadable, KeyError, ValueError, AssertionError) as error:
            raise Unreadable(f"line {own.line}: {own.name} ({own.source}): {error}") from error
    touches.flush()
    result = "None"
    if block.branch is not None and block.branch.guard is not None:
        result = e.guard(block.branch)
    e.finish(block.live)
    body = "\n    ".join([*e.lines, f"return {result}"])
    return f"def run(m, R, M):\n    {body}\n", names


def _unit(text: Text, space: str) -> int:
    """The fewest bytes that one number of an access takes."""
    sizes = [16]
    for own in text.instructions:
        if own.opcode[0] in ("ld", "st", "atom", "red") and space in own.opcode:
            sizes.append(BITS[own.opcode[-1]] // 8)
        elif own.opcode[0] == "mbarrier":
            sizes.append(8)
        elif own.opcode[:2] == ("cp", "async") and own.opcode[2] != "bulk" and len(own.operands) > 2:
            assert isinstance(own.operands[2], Imm)
            sizes.append(4)
        elif own.opcode[0] == "ldmatrix":
            sizes.append(16)
    return min(sizes)


def _outputs(text: Text) -> set[str]:
    """Parameters from which the address of some store comes, over any chain of registers but through no load."""
    roots: dict[str, set[str]] = {}
    steps: list[tuple[list[str], list[str]]] = []  # registers to registers
    for own in text.instructions:
        if own.opcode[0] not in ("ld", "ldmatrix", "atom"):
            steps.append((read_by(own), written(own)))
        elif own.opcode[1] == "param" and isinstance(own.operands[1], Address):
            for name in written(own):
                roots.setdefault(name, set()).add(str(own.operands[1].base))
    changed = True
    while changed:
        changed = False
        for sources, targets in steps:
            new = {root for name in sources if name in roots for root in roots[name]}
            for name in targets if new else ():
                if not new <= roots.setdefault(name, set()):
                    roots[name] |= new
                    changed = True
    out: set[str] = set()
    for own in text.instructions:
        if own.opcode[0] in ("st", "red", "atom") and "shared" not in own.opcode:
            target = own.operands[0 if own.opcode[0] != "atom" else 1]
            for name in registers_of(target):
                out |= roots.get(name, set())
            if isinstance(target, Address) and isinstance(target.base, Reg):
                out |= roots.get(target.base.name, set())
    return out

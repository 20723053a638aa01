"""Sums over lanes whose lanes would differ: a product fused into the sum with what another lane sent (clause C1)."""

from __future__ import annotations

import re
from collections.abc import Iterator

from executors._triton.inspect.disassembly import Instruction

FUSED = re.compile(r"[FD]FMA|FFMA2|v_(pk_)?(fma|fmac|mad|mac)_f(32|64)")
ACCUMULATES = re.compile(r"v_(pk_)?(fmac|mac)_")  # into its first operand
SENT = re.compile(r"SHFL|ds_(bpermute|permute|swizzle)|v_mov_\w+_dpp|v_permlane")
MOVED = re.compile(r"MOV\b|v_mov_b32\b|v_mov_b64\b")
STORES = re.compile(r"ST|RED|BAR|BRA|EXIT|ds_write|(global|buffer|flat|scratch)_store|s_")  # write no vector register
NVIDIA_REGISTER = re.compile(r"\bR(\d+)")
AMD_REGISTER = re.compile(r"\bv(?:(\d+)\b|\[(\d+):(\d+)\])")


def uneven_sums(code: list[Instruction]) -> int:
    """Fused multiply-adds that add what another lane sent.

    If lanes exchange products and add, each lane has the same sum. If the product is fused into the sum, a lane's own
    term is not rounded and the other lane's is: their sums differ in the last bit, and the lane that stores last
    decides. Registers are followed in the order of the text, since exchange and sum stand in one block.
    """
    written: dict[str, str] = {}  # the instruction that wrote a register last
    found = 0
    for opcode, _, operands in code:
        if not operands or STORES.match(opcode):
            continue
        if FUSED.match(opcode):
            addend = operands[0] if ACCUMULATES.match(opcode) else operands[3]
            found += any(SENT.match(written.get(register, "")) for register in registers(addend, opcode))
        moved = MOVED.match(opcode) and len(operands) > 1 and list(registers(operands[1], opcode))
        source = written.get(moved[0], "") if moved else opcode
        target = next((operand for operand in operands if list(registers(operand, opcode))), "")
        for register in registers(target, opcode):
            written[register] = source
    return found


def registers(operand: str, opcode: str) -> Iterator[str]:
    """The vector registers of an operand; both of a number of 64 bits."""
    for own in NVIDIA_REGISTER.findall(operand):
        yield f"R{own}"
        if re.match(r"D(FMA|ADD|MUL)|FFMA2", opcode):
            yield f"R{int(own) + 1}"
    for own, first, last in AMD_REGISTER.findall(operand):
        yield from (f"v{place}" for place in (range(int(first), int(last) + 1) if first else (int(own),)))

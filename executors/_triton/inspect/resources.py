"""What compiled kernels take: registers, spills, shared memory, instructions."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from executors._triton.inspect.disassembly import Instruction, disassemble_amd, disassemble_nvidia, run_tool
from executors._triton.inspect.lanes import uneven_sums
from executors._triton.inspect.rounding import unrounded_operands

REGISTER = 4  # bytes
TENSOR_CORE = re.compile(r"(HMMA|HGMMA|UTC\w*MMA|v_mfma)")
MULTIPLY = re.compile(r"HMMA|HGMMA|UTC\w*MMA|FFMA|HFMA2|v_mfma|v_(pk_)?fma")
MULTIPLY_ADD = re.compile(r"FFMA|v_(pk_)?(fma|fmac|mad|mac)_f32")
LOAD = re.compile(r"LDG\.|LDGSTS|UTMALDG|(global|buffer|flat)_load")
WIDE = re.compile(r"LDG\S*\.(128|256)|UTMALDG|\w+_dwordx4")
LOCAL = re.compile(r"(LDL|STL)\b|scratch_(load|store)")


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes.

    Attributes:
        registers: of a thread.
        spilled: bytes of a thread's registers that did not fit and are in memory.
        scalars_moved: scalar registers that did not fit and are in vector registers; AMD only, and no spill.
        local: instructions that load and store spilled registers.
        shared: bytes of shared memory of a program.
        tensor_core: instructions that multiply matrices.
        tensor_core_kind: which: HMMA, HGMMA (wgmma), UTCHMMA (tcgen05), v_mfma, or "" for none.
        loads, wide_loads: instructions that load from global memory; those of 16 bytes of a thread or a whole tile.
        inner_loads, inner_wide_loads: the same in the innermost loop that multiplies, the one over k.
        instructions: in all, without padding.
        multiply_adds: instructions in fp32 that round a product and a sum once.
        inner_instructions: of the innermost loop that multiplies, without padding.
        uneven_sums: sums over lanes whose lanes may differ in the last bit; none if the kernel is repeatable.
        unrounded_operands: of products in TF32.
    """

    registers: int
    spilled: int
    scalars_moved: int
    local: int
    shared: int
    tensor_core: int
    tensor_core_kind: str
    loads: int
    wide_loads: int
    inner_loads: int
    inner_wide_loads: int
    instructions: int
    inner_instructions: int
    multiply_adds: int
    uneven_sums: int
    unrounded_operands: int

    @property
    def spills(self) -> bool:
        """Whether the registers did not suffice."""
        return bool(self.spilled or self.local)


def resources_of(compiled: Sequence[Any]) -> list[Resources]:
    """The resources of each kernel.

    Args:
        compiled: Triton's compiled kernels, all for one device.
    """
    if not compiled:
        return []
    target = compiled[0].metadata.target
    if target.backend == "hip":
        return [_of_amd(kernel) for kernel in compiled]
    cubins = [kernel.asm["cubin"] for kernel in compiled]
    codes = disassemble_nvidia(cubins, target.arch)
    return [
        _counted(kernel, code, *registers_and_stack(cubin), 0)
        for kernel, cubin, code in zip(compiled, cubins, codes, strict=True)
    ]


def registers_and_stack(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and the bytes of its stack, which these kernels use only for spills."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = run_tool("cuobjdump", "--dump-resource-usage", str(path))
    ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", text)
    return int(registers), int(stack)


def _of_amd(kernel: Any) -> Resources:
    assembly = kernel.asm["amdgcn"]

    def field(name: str) -> int:
        (value,) = re.findall(rf"^ +\.{name}: +(\d+)$", assembly, re.MULTILINE)
        return int(value)

    spilled = max(REGISTER * field("vgpr_spill_count"), field("private_segment_fixed_size"))
    code = disassemble_amd(assembly)
    return _counted(kernel, code, field("vgpr_count"), spilled, field("sgpr_spill_count"))


def _counted(kernel: Any, code: list[Instruction], registers: int, spilled: int, scalars_moved: int) -> Resources:
    loop = inner_loop(code)
    kinds = [found[1] for i in code if (found := TENSOR_CORE.match(i.opcode))]
    return Resources(
        registers=registers,
        spilled=spilled,
        scalars_moved=scalars_moved,
        local=_number(LOCAL, code),
        shared=kernel.metadata.shared,
        tensor_core=len(kinds),
        tensor_core_kind=kinds[0] if kinds else "",
        loads=_number(LOAD, code),
        wide_loads=_number(WIDE, code, LOAD),
        inner_loads=_number(LOAD, loop),
        inner_wide_loads=_number(WIDE, loop, LOAD),
        instructions=_without_padding(code),
        inner_instructions=_without_padding(loop),
        multiply_adds=_number(MULTIPLY_ADD, code),
        uneven_sums=uneven_sums(code) if kernel.metadata.enable_fp_fusion else 0,
        unrounded_operands=unrounded_operands(kernel.asm["ttir"]),
    )


def inner_loop(code: list[Instruction]) -> list[Instruction]:
    """The shortest loop that multiplies: from a place to the last branch back to it; empty where there is none."""
    ends = {i.target: end for end, i in enumerate(code) if i.target is not None and i.target <= end}
    for start, end in sorted(ends.items(), key=lambda span: span[1] - span[0]):
        loop = code[start : end + 1]
        if _number(MULTIPLY, loop):
            return loop
    return []


def _without_padding(code: list[Instruction]) -> int:
    return sum(i.opcode not in ("NOP", "s_nop", "s_code_end") for i in code)


def _number(pattern: re.Pattern[str], code: list[Instruction], other: re.Pattern[str] = re.compile("")) -> int:
    return sum(bool(pattern.match(i.opcode) and other.match(i.opcode)) for i in code)

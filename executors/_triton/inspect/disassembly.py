"""Compiled kernels as lists of instructions, in one form for NVIDIA and AMD."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from triton import knobs

from executors._protocol import Unavailable

NVIDIA_LINE = re.compile(r"/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);")
NVIDIA_ADDRESS = re.compile(r"0x[0-9a-f]+")
AMD_LABEL = re.compile(r"(\.LBB\w+):")
AMD_LINE = re.compile(r"\t([a-z]\w+)(?: ([^;]*))?")


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        opcode: with its suffixes.
        target: the index of the instruction that a branch within the kernel goes to.
        operands: as they are written.
    """

    opcode: str
    target: int | None = None
    operands: tuple[str, ...] = ()


def disassemble_nvidia(cubins: Sequence[bytes], arch: int) -> list[list[Instruction]]:
    """The instructions of each cubin.

    The tool takes a third of a second to start, so it gets the code of all of them at once.

    Args:
        cubins: of one architecture.
        arch: of theirs, such as 90.
    """
    codes = [code_of(cubin) for cubin in cubins]
    letter = "a" if arch >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "code"
        path.write_bytes(b"".join(codes))
        listing = run_tool("nvdisasm", "--binary", f"SM{arch}{letter}", str(path))
    starts = list(accumulate(map(len, codes), initial=0))
    lines: list[list[tuple[int, str, str]]] = [[] for _ in codes]
    for address, opcode, rest in NVIDIA_LINE.findall(listing):
        place = int(address, 16)
        lines[bisect_right(starts, place) - 1].append((place, opcode, rest))
    return [_linked(own) for own in lines]


def run_tool(name: str, *arguments: str) -> str:
    """The output of a tool that comes with Triton.

    Raises:
        Unavailable: this Triton has no such tool.
    """
    try:
        tool = getattr(knobs.nvidia, name)
    except RuntimeError as error:  # Triton's own: "Cannot find nvdisasm"
        raise Unavailable(f"{name} must come with triton to look into kernels for NVIDIA: {error}") from error
    return subprocess.run([tool.path, *arguments], capture_output=True, text=True, check=True).stdout


def _linked(lines: list[tuple[int, str, str]]) -> list[Instruction]:
    places = {address: place for place, (address, _, _) in enumerate(lines)}
    out = []
    for _, opcode, rest in lines:
        found = NVIDIA_ADDRESS.findall(rest) if opcode.startswith("BRA") else []
        out.append(Instruction(opcode, places.get(int(found[-1], 16)) if found else None, _operands(rest)))
    return out


def _operands(text: str) -> tuple[str, ...]:
    return tuple(operand.strip() for operand in text.split(",")) if text else ()


def code_of(cubin: bytes) -> bytes:
    """The machine code in a cubin, an ELF file: the sections that are named .text."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, number, of_names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(number)]
    names = sections[of_names][4]
    return b"".join(
        cubin[start : start + length]
        for name, _, _, _, start, length in sections
        if cubin.startswith(b".text.", names + name)
    )


def disassemble_amd(assembly: str) -> list[Instruction]:
    """The instructions of one kernel, from Triton's own assembly text."""
    opcodes: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in assembly.partition("\n.Lfunc_end")[0].splitlines():
        if label := AMD_LABEL.match(line):
            labels[label[1]] = len(opcodes)
        elif found := AMD_LINE.match(line):
            opcodes.append((found[1], (found[2] or "").strip()))
    return [Instruction(o, labels.get(rest) if "branch" in o else None, _operands(rest)) for o, rest in opcodes]

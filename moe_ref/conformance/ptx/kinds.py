"""Classes of instructions, by the unit of a GPU that runs them."""

from __future__ import annotations

from moe_ref.conformance.ptx.floats import is_float
from moe_ref.conformance.ptx.text import Instruction

KINDS = {
    "tensor": "products of matrices: mma",
    "integer": "integers, bits and addresses, prmt and lop3 too; and selections",
    "float": "fp64 to fp16, and approximations of exponentials",
    "convert": "cvt",
    "predicate": "comparisons",
    "branch": "branches, ret and exit",
    "shared": "loads, stores and atomics of shared memory",
    "ldmatrix": "ldmatrix",
    "global": "loads, stores and atomics of global memory",
    "copy": "cp.async, and what commits and waits for it",
    "barrier": "barriers of a program",
    "lanes": "exchanges between the lanes of a warp",
    "move": "mov and cvta, most of which an assembler folds",
    "parameter": "loads of parameters, which an assembler makes operands",
    "other": "all else",
}
BY_NAME = {
    "mma": "tensor",
    "cvt": "convert",
    "setp": "predicate",
    "ldmatrix": "ldmatrix",
    "cp": "copy",
    "mov": "move",
    "cvta": "move",
}
BY_NAME |= dict.fromkeys(("bra", "ret", "exit"), "branch")
BY_NAME |= dict.fromkeys(("shfl", "vote", "redux", "match", "activemask"), "lanes")
BY_NAME |= dict.fromkeys(("add", "sub", "mul", "mad", "addc", "madc", "div", "rem", "neg", "abs", "min"), "integer")
BY_NAME |= dict.fromkeys(("max", "and", "or", "xor", "not", "shl", "shr", "shf", "bfe", "bfi", "prmt"), "integer")
BY_NAME |= dict.fromkeys(("lop3", "popc", "clz", "brev", "selp", "sad"), "integer")
MEMORY = ("ld", "st", "atom", "red")


def kind_of(own: Instruction) -> str:
    """The name of an instruction's class, a key of `KINDS`."""
    name = own.opcode[0]
    if name in MEMORY:
        spaces = {word.split("::")[0] for word in own.opcode[1:]}
        return "parameter" if "param" in spaces else "shared" if "shared" in spaces else "global"
    if name in ("bar", "barrier"):
        return "lanes" if "warp" in own.opcode else "barrier"
    found = BY_NAME.get(name, "other")
    if found in ("integer", "other") and name != "selp" and is_float(own):
        return "float"
    return found

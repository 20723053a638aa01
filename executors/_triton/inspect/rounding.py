"""Operands of TF32 that nothing rounds before they are multiplied (ADR 14)."""

from __future__ import annotations

import re

DEFINED = re.compile(r"^ *(%[\w.]+)(?::\d+)? = ([\w.]+)(.*)$", re.MULTILINE)
NAME = re.compile(r"%[\w.]+")
MOVES = ("tt.trans", "tt.reshape", "ttg.convert_layout")
FP32_OPERANDS = "xf32> * tensor"  # the precision of other operands means nothing
MASK = "<-8192>"  # the last 13 bits


def unrounded_operands(ttir: str) -> int:
    """How many operands of products in TF32 are not bits without their last 13.

    Args:
        ttir: a kernel in Triton's first form, before a target is known. Loops side by side may use a name twice.
    """
    defined: dict[str, tuple[str, str]] = {}
    found = 0
    for name, op, rest in DEFINED.findall(ttir):
        if op == "tt.dot" and "inputPrecision = tf32" in rest and FP32_OPERANDS in rest:
            found += sum(not _is_rounded(operand, defined) for operand in NAME.findall(rest)[:2])
        defined[name] = op, rest
    return found


def _is_rounded(name: str, defined: dict[str, tuple[str, str]]) -> bool:
    op, rest = defined.get(name, ("", ""))
    operands = NAME.findall(rest)
    if op in MOVES:
        return _is_rounded(operands[0], defined)
    if op != "tt.bitcast":
        return False
    op, rest = defined.get(operands[0], ("", ""))
    return op == "arith.andi" and any(MASK in defined.get(own, ("", ""))[1] for own in NAME.findall(rest))

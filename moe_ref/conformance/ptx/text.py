"""Reads the text of one kernel: parameters, registers, instructions with their labels and lines of source."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache

REGISTER = re.compile(r"\.reg\s+\.(\w+)\s+(.*)")
SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid)\.[xyz]|%laneid|%warpid")
BITS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64, "b128": 128}
BITS |= {f"{kind}{bits}": bits for kind in "usf" for bits in (8, 16, 32, 64)} | {"bf16": 16}
PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(.*?)(\w+)(?:\[(\d+)\])?$")
PARAMETERS = 1 << 56  # where parameters are, among addresses; no tensor is there


class Unreadable(ValueError):
    """Text that is not what Triton's compiler writes for an NVIDIA GPU, or an instruction that is not known."""


@dataclass(frozen=True)
class Reg:
    """A register, by its name."""

    name: str


@dataclass(frozen=True)
class Imm:
    """A number in the text; one of a float has its bits, and how many."""

    value: int
    float_bits: int = 0


@dataclass(frozen=True)
class Address:
    """``[base + offset]``: base is a register, the name of a parameter or of shared memory, or "" for none."""

    base: Reg | str
    offset: int


@dataclass(frozen=True)
class Special:
    """A special register, such as ``%tid.x``."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """The name of a label or of a variable, or ``_``."""

    name: str


Operand = Reg | Imm | Address | Special | Symbol | tuple["Operand", ...]


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: its parts: ("ld", "global", "v4", "b32").
        operands: the first is the destination, if it has one; vectors are tuples.
        guard: the predicate's register, or None.
        negated: whether the guard is negated.
        line: of the PTX text, from 1.
        source: the line of the kernel's own text, as ``.loc`` has it, or "".
    """

    opcode: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Reg | None
    negated: bool
    line: int
    source: str

    @property
    def name(self) -> str:
        """The opcode as it is written."""
        return ".".join(self.opcode)


@dataclass(frozen=True)
class Parameter:
    """A parameter: its type, such as "u64", and whether it is a pointer; of an array of bytes how many, else 0."""

    name: str
    kind: str
    pointer: bool
    size: int = 0


@dataclass
class Text:
    """A kernel that was read.

    Attributes:
        name: of the kernel.
        parameters: in order.
        threads: of a program.
        bits: of each register, by name; 1 for a predicate.
        instructions: in order.
        labels: the index of the instruction that follows each label.
        target: such as "sm_80".
    """

    name: str
    parameters: list[Parameter]
    threads: int
    bits: dict[str, int]
    instructions: list[Instruction]
    labels: dict[str, int]
    target: str

    @property
    def addresses(self) -> dict[str, int]:
        """Where each parameter is, by its name."""
        return {own.name: PARAMETERS + 4096 * number for number, own in enumerate(self.parameters)}


def read(text: str) -> Text:
    """Reads the PTX of one kernel.

    Raises:
        Unreadable: there is no kernel, or a line cannot be read; it names the line.
    """
    lines = text.splitlines()
    target = next((m[1] for line in lines if (m := re.match(r"\.target\s+(\w+)", line))), "")
    entry = next((n for n, line in enumerate(lines) if re.match(r"(\.visible\s+)?\.entry\s", line)), None)
    if entry is None:
        raise Unreadable("no .entry: the text must have a kernel")
    name = lines[entry].split(".entry")[1].strip().rstrip("(").strip()
    start = next(n for n in range(entry, len(lines)) if lines[n].strip() == "{")
    head = " ".join(lines[entry:start])
    (threads,) = re.findall(r"\.(?:req|max)ntid\s+(\d+)", head) or ["0"]
    parameters = [
        _parameter(own.strip()) for own in head[head.index("(") + 1 : head.rindex(")")].split(",") if own.strip()
    ]
    out = Text(name, parameters, int(threads), {}, [], {}, target)
    _body(out, lines, start + 1)
    return out


def _parameter(text: str) -> Parameter:
    match = PARAMETER.match(text)
    if match is None:
        raise Unreadable(f"{text!r}: not a parameter")
    return Parameter(match[3], match[1], ".ptr" in match[2], int(match[4] or 0))


def _body(out: Text, lines: list[str], start: int) -> None:
    source, waiting = "", ""
    depth, first, inner = 0, 0, set[str]()  # of a scope in inline assembly: its first instruction, its own labels
    for number in range(start, len(lines)):
        line = lines[number]
        if line.lstrip().startswith(".loc"):
            source = _source(line, source)
            continue
        line = line.split("//")[0].strip()
        before, depth = depth, depth + line.count("{") - line.count("}")
        if depth < 0:
            return
        if depth == 0 and before > 0:
            _own_labels(out, first, inner)
        if before == 0:
            first, inner = len(out.instructions), set()
        label = re.match(r"([$\w]+):$", line)
        if label:
            out.labels[label[1]] = len(out.instructions)
            inner.add(label[1])
            continue
        if not line or line.startswith((".pragma", ".section", ".file")) or line in "{}":
            continue
        *statements, waiting = (waiting + " " + line).split(";")
        for statement in map(str.strip, statements):
            statement = statement.lstrip("{} \t")  # of a scope in inline assembly
            if statement.startswith(".reg"):
                _declare(out, statement)
            elif statement:
                out.instructions.append(instruction(statement, number + 1, source))


def _own_labels(out: Text, first: int, inner: set[str]) -> None:
    """Labels of a scope hide those of others: they get names of their own."""
    for label in inner:
        out.labels[f"{label}@{first}"] = out.labels.pop(label)
    for number in range(first, len(out.instructions)):
        own = out.instructions[number]
        target = own.operands[0] if own.operands else None
        if own.opcode[0] == "bra" and isinstance(target, Symbol) and target.name in inner:
            out.instructions[number] = replace(own, operands=(Symbol(f"{target.name}@{first}"),))


def _source(line: str, before: str) -> str:
    """``file:line:column`` and where it was inlined, from the comment behind ``.loc``; line 0 is the line before."""
    comment = line.partition("//")[2].strip()
    return before if not comment or re.match(r"[^:]*:0:", comment) else comment


def _declare(out: Text, statement: str) -> None:
    match = REGISTER.match(statement)
    assert match is not None, statement
    for own in match[2].split(","):
        ranged = re.match(r"\s*(%?\w+)<(\d+)>", own)
        names = [f"{ranged[1]}{n}" for n in range(int(ranged[2]))] if ranged else [own.strip()]
        out.bits |= dict.fromkeys(names, BITS[match[1]])


def instruction(statement: str, line: int = 0, source: str = "") -> Instruction:
    """Reads one instruction, without its semicolon."""
    guard, negated = None, False
    if statement.startswith("@"):
        word, _, statement = statement.partition(" ")
        negated, guard = word[1] == "!", Reg(word.lstrip("@!"))
    opcode, _, rest = statement.strip().replace("\t", " ").partition(" ")
    try:
        operands = tuple(_operand(own) for own in _split(rest))
    except ValueError as error:
        raise Unreadable(f"line {line}: {statement!r}: {error}") from None
    return Instruction(tuple(opcode.split(".")), operands, guard, negated, line, source)


def _split(rest: str) -> list[str]:
    """At commas outside of braces and brackets."""
    parts, depth, begun = [], 0, ""
    for letter in rest:
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            parts.append(begun)
            begun = ""
        else:
            begun += letter
    return [own for own in map(str.strip, [*parts, begun]) if own]


@lru_cache(maxsize=1 << 16)
def _operand(text: str) -> Operand:
    if text[0] == "{":
        return tuple(_operand(own) for own in _split(text[1:-1]))
    if text[0] == "[" and "," in text:  # of a tensor map: its address, and coordinates
        return tuple(_operand(f"[{own}]" if own[0] != "{" else own) for own in _split(text[1:-1]))
    if text[0] == "[":
        base, sign, offset = text[1:-1].strip().partition("+")
        base, offset = base.strip(), offset.strip() if sign else "0"
        return Address(Reg(base) if base.startswith("%") else base, int(offset, 0))
    if SPECIAL.fullmatch(text):
        return Special(text)
    if "|" in text:
        return tuple(_operand(own.strip()) for own in text.split("|"))
    if text[0] == "%":
        return Reg(text)
    if re.match(r"0[fFdD][0-9a-fA-F]+$", text):
        return Imm(int(text[2:], 16), 32 if text[1] in "fF" else 64)
    if re.match(r"-?(0x[0-9a-fA-F]+|\d+)U?$", text):
        return Imm(int(text.rstrip("U"), 0))
    if re.match(r"[$\w.]+$", text):
        return Symbol(text)
    raise ValueError(f"{text!r}: not an operand")

"""Instructions on integers, bits and predicates, and moves.

PTX ISA 9.2: "Integer Arithmetic Instructions", "Extended-Precision Integer Arithmetic Instructions", "Comparison and
Selection Instructions", "Logic and Shift Instructions", and "Data Movement and Conversion Instructions: mov" and
"prmt".
"""

from __future__ import annotations

from collections.abc import Callable

from moe_ref.conformance.ptx.emit import Emitter, plain, unsigned, width
from moe_ref.conformance.ptx.text import Imm, Instruction, Operand, Reg, Symbol, Unreadable

Handler = Callable[[Emitter, Instruction], None]

OPERATORS = {"add": "+", "sub": "-", "and": "&", "or": "|", "xor": "^"}
LOGIC = {"and", "or", "xor", "not"}
COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
UNSIGNED_COMPARE = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}


def arithmetic(e: Emitter, own: Instruction) -> None:
    """``add``, ``sub``, ``and``, ``or``, ``xor``: wrap."""
    kind = plain(own.opcode[-1])
    if own.opcode[1] == "cc" or own.opcode[0] == "addc":
        _with_carry(e, own)
        return
    if len(own.opcode) != 2:
        raise Unreadable(f"{own.name}: unknown form")
    _, a, b = own.operands
    e.write(own.operands[0], kind, f"{e.read(a, kind)} {OPERATORS[own.opcode[0]]} {e.read(b, kind)}", own)


def unary(e: Emitter, own: Instruction) -> None:
    """``not``, ``neg``, ``abs``, ``popc``, ``clz``, ``brev``, ``bfind``."""
    name, kind = own.opcode[0], plain(own.opcode[-1])
    value = e.read(own.operands[1], kind)
    if name in ("popc", "clz", "brev"):
        result = "u32" if name != "brev" else kind
        e.write(own.operands[0], result, f"{name}({value}).astype({result.upper()})", own)
        return
    form = {"not": "~{}", "neg": "negative({})", "abs": "absolute({})"}[name]
    e.write(own.operands[0], kind, form.format(value), own)


def multiply(e: Emitter, own: Instruction) -> None:
    """``mul`` and ``mad``: ``lo``, ``hi``, ``wide``."""
    name, form, kind = own.opcode[0], own.opcode[1], plain(own.opcode[-1])
    if "cc" in own.opcode or name == "madc":
        _with_carry(e, own)
        return
    result = f"{kind[0]}{2 * width(kind)}" if form == "wide" else kind
    a, b = (e.read(o, kind) for o in own.operands[1:3])
    if form == "lo":
        value = f"{a} * {b}"
    elif form == "wide":
        value = f"multiply({a}, {b}, dtype={result.upper()})"
    elif form == "hi" and width(kind) == 32:
        wide = f"{kind[0]}64".upper()
        value = f"(multiply({a}, {b}, dtype={wide}) >> {wide}(32)).astype({kind.upper()})"
    elif form == "hi" and width(kind) == 64:
        value = f"high({a}, {b})"
    else:
        raise Unreadable(f"{own.name}: unknown form")
    if name == "mad":
        value = f"{value} + {e.read(own.operands[3], result)}"
    e.write(own.operands[0], result, value, own)


def _with_carry(e: Emitter, own: Instruction) -> None:
    """``add`` and ``mad`` that read or write the carry, within a block."""
    name, kind = own.opcode[0], plain(own.opcode[-1])
    if name not in ("add", "addc", "mad", "madc") or kind != "u32":
        raise Unreadable(f"{own.name}: unknown form")
    parts = [f"{e.read(o, kind)}.astype(U64)" for o in own.operands[1:]]
    if name[:3] == "mad":
        whole = f"({parts[0]} * {parts[1]})"
        parts = [f"({whole} & U64(0xFFFFFFFF))" if own.opcode[1] == "lo" else f"({whole} >> U64(32))", parts[2]]
    if name[-1] == "c":
        if not e.carry:
            raise Unreadable(f"{own.name}: must follow what sets the carry, in one block")
        parts.append(e.carry)
    total = e.let(" + ".join(parts))
    if "cc" in own.opcode:
        e.carry = e.let(f"{total} >> U64(32)")
    e.write(own.operands[0], kind, f"{total}.astype(U32)", own)


def divide(e: Emitter, own: Instruction) -> None:
    """``div`` and ``rem``, towards zero; the result of a division by zero is not specified, here all bits are set."""
    kind = plain(own.opcode[-1])
    _, a, b = own.operands
    helper = {"div": "quotient", "rem": "remainder"}[own.opcode[0]]
    e.write(own.operands[0], kind, f"{helper}({e.read(a, kind)}, {e.read(b, kind)})", own)


def shift(e: Emitter, own: Instruction) -> None:
    """``shl`` and ``shr``: amounts beyond the width are the width; ``shf.l`` and ``shf.r`` over two words."""
    kind = plain(own.opcode[-1])
    if own.opcode[0] == "shf":
        words = ", ".join(e.read(o, "u32") for o in own.operands[1:])
        e.write(own.operands[0], "u32", f"funnel({words}, {own.opcode[1:3]!r})", own)
        return
    _, a, amount = own.operands
    if isinstance(amount, Imm):
        many = min(amount.value & 0xFFFFFFFF, width(kind))
        by = e.read(Imm(min(many, width(kind) - 1)), kind)
        if many == width(kind) and not (own.opcode[0] == "shr" and kind[0] == "s"):
            e.write(own.operands[0], kind, f"zeros_like({e.read(a, kind)})", own)
            return
        sign = "<<" if own.opcode[0] == "shl" else ">>"
        e.write(own.operands[0], kind, f"{e.read(a, kind)} {sign} {by}", own)
        return
    e.write(own.operands[0], kind, f"shifted_{own.opcode[0]}({e.read(a, kind)}, {e.read(amount, 'u32')})", own)


def extremum(e: Emitter, own: Instruction) -> None:
    """``min`` and ``max``."""
    kind = plain(own.opcode[-1])
    _, a, b = own.operands
    e.write(own.operands[0], kind, f"{own.opcode[0]}imum({e.read(a, kind)}, {e.read(b, kind)})", own)


def field(e: Emitter, own: Instruction) -> None:
    """``bfe``: bits from a place on; ``bfi``: bits put there."""
    kind = plain(own.opcode[-1])
    if own.opcode[0] == "bfi":
        a, b = (e.read(o, kind) for o in own.operands[1:3])
        place, length = (e.read(o, "u32") for o in own.operands[3:])
        e.write(own.operands[0], kind, f"inserted({a}, {b}, {place}, {length})", own)
        return
    if all(isinstance(o, Imm) for o in own.operands[2:]):
        pos, size = (o.value & 0xFF for o in own.operands[2:] if isinstance(o, Imm))
        bits, cast = width(kind), kind.upper()
        if size > 0 and pos + size <= bits:
            value = f"(({e.read(own.operands[1], kind)} << {cast}({bits - pos - size})) >> {cast}({bits - size}))"
            e.write(own.operands[0], kind, value, own)
            return
    place, length = (e.read(o, "u32") for o in own.operands[2:])
    e.write(own.operands[0], kind, f"extracted({e.read(own.operands[1], kind)}, {place}, {length})", own)


def permute(e: Emitter, own: Instruction) -> None:
    """``prmt`` in its default mode."""
    if own.opcode != ("prmt", "b32"):
        raise Unreadable(f"{own.name}: unknown form")
    a, b = (e.read(o, "u32") for o in own.operands[1:3])
    selector = own.operands[3]
    if isinstance(selector, Imm):
        e.write(own.operands[0], "u32", f"permuted({a}, {b}, {selector.value})", own)
    else:
        e.write(own.operands[0], "u32", f"permuted_by({a}, {b}, {e.read(selector, 'u32')})", own)


def three_inputs(e: Emitter, own: Instruction) -> None:
    """``lop3``."""
    a, b, c = (e.read(o, "u32") for o in own.operands[1:4])
    table = own.operands[4]
    assert isinstance(table, Imm)
    e.write(own.operands[0], "u32", f"three_inputs({a}, {b}, {c}, {table.value})", own)


def compare(e: Emitter, own: Instruction) -> None:
    """``setp`` on integers and on floats, where a NaN is only unordered; of bits only equality."""
    _, relation, *middle, kind = own.opcode
    target, a, b = own.operands
    if middle not in ([], ["ftz"]):
        raise Unreadable(f"{own.name}: unknown form")
    if kind in ("f16x2", "bf16x2"):
        targets = target if isinstance(target, tuple) else (target, Symbol("_"))
        for own_target, part in zip(targets, (0, 16), strict=True):
            left, right = (_half(e, o, kind, part) for o in (a, b))
            e.write(own_target, "p", _relation(own, relation, left, right, "f"), own)
        return
    read = {"bf16": "from_bf16({})"}.get(kind, "flushed({})" if middle else "{}")
    left, right = (read.format(e.read(o, plain(kind))) for o in (a, b))
    value = _relation(own, relation, left, right, "f" if kind == "bf16" else plain(kind)[0])
    if isinstance(target, tuple):
        value = e.let(value)
        e.write(target[1], "p", f"~{value}", own)
    e.write(target[0] if isinstance(target, tuple) else target, "p", value, own)


def _half(e: Emitter, operand: Operand, kind: str, part: int) -> str:
    """One of two floats in a word."""
    bits = f"({e.read(operand, 'u32')} >> U32({part})).astype(U16)"
    return f"from_bf16({bits})" if kind == "bf16x2" else f"{bits}.view(F16)"


def _relation(own: Instruction, relation: str, left: str, right: str, letter: str) -> str:
    """A comparison; NumPy's ``!=`` is true for a NaN, the ISA's ``ne`` is not."""
    unordered = f"isnan({left}) | isnan({right})"
    if letter == "f":
        if relation == "nan":
            return unordered
        if relation == "num":
            return f"~({unordered})"
        if relation == "ne":
            return f"({left} != {right}) & ~({unordered})"
        if relation[:-1] in COMPARE and relation[-1] == "u":
            return f"({left} {COMPARE[relation[:-1]]} {right}) | {unordered}"
    if relation in COMPARE:
        return f"{left} {COMPARE[relation]} {right}"
    if relation in UNSIGNED_COMPARE and letter == "u":
        return f"{left} {UNSIGNED_COMPARE[relation]} {right}"
    raise Unreadable(f"{own.name}: unknown form")


def select(e: Emitter, own: Instruction) -> None:
    """``selp``."""
    kind = plain(own.opcode[-1])
    if kind[0] == "f":  # bits, so that a NaN keeps its own
        kind = f"u{kind[1:]}"
    a, b = (e.read(o, kind) for o in own.operands[1:3])
    e.write(own.operands[0], kind, f"where({e.read(own.operands[3], 'p')}, {a}, {b})", own)


def move(e: Emitter, own: Instruction) -> None:
    """``mov``: also between a register and its parts."""
    target, source = own.operands
    kind = plain(own.opcode[-1])
    kind = kind if kind == "p" else unsigned(width(kind))
    if isinstance(target, tuple):
        part = width(kind) // len(target)
        whole = e.read(source, kind)
        for place, own_target in enumerate(target):
            if isinstance(own_target, Reg):
                shifted = f"({whole} >> {kind.upper()}({place * part}))" if place else whole
                e.write(own_target, f"u{part}", f"{shifted}.astype(U{part})", own)
        return
    if isinstance(source, tuple):
        part = width(kind) // len(source)
        parts = [f"{e.read(o, f'u{part}')}.astype({kind.upper()})" for o in source]
        moved = [f"({own_part} << {kind.upper()}({n * part}))" if n else own_part for n, own_part in enumerate(parts)]
        e.write(target, kind, " | ".join(moved), own)
        return
    value = e.read(source, kind)
    e.write(target, kind, value if isinstance(source, Reg) else f"spread({value}, m.threads)", own)


HANDLERS: dict[str, Handler] = dict.fromkeys(("and", "or", "xor"), arithmetic)
HANDLERS |= {"not": unary, "popc": unary, "clz": unary, "brev": unary, "shl": shift, "shr": shift, "shf": shift}
HANDLERS |= {"bfe": field, "bfi": field, "prmt": permute, "lop3": three_inputs, "setp": compare, "selp": select}
HANDLERS |= {"mov": move, "rem": divide, "addc": arithmetic, "madc": multiply}
SHARED: dict[str, Handler] = dict.fromkeys(("add", "sub"), arithmetic)  # names that floats have too
SHARED |= {"neg": unary, "abs": unary, "mul": multiply, "mad": multiply, "div": divide}
SHARED |= dict.fromkeys(("min", "max"), extremum)

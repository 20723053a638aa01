"""Basic blocks of a kernel: where they branch to, where branches meet again, and which registers live on."""

from __future__ import annotations

from dataclasses import dataclass, field

from moe_ref.conformance.ptx.text import Address, Instruction, Operand, Reg, Symbol, Text, Unreadable

WITHOUT_DESTINATION = {"st", "bar", "barrier", "bra", "ret", "exit", "cp", "red", "membar", "fence", "trap", "stmatrix"}


@dataclass
class Block:
    """Instructions that run one after the other.

    Attributes:
        number: of the block; one past the last block is the exit.
        instructions: without the branch at the end.
        branch: that branch, or None.
        taken: the block it goes to; the exit for ``ret``.
        next: the block that follows, or None if the branch is always taken.
        meets: the block where all ways from here meet: the immediate post-dominator.
        live: registers that some later block reads before it writes them.
    """

    number: int
    instructions: list[Instruction]
    branch: Instruction | None = None
    taken: int | None = None
    next: int | None = None
    meets: int = -1
    live: set[str] = field(default_factory=set)

    @property
    def after(self) -> list[int]:
        """The blocks that can follow."""
        return [number for number in (self.taken, self.next) if number is not None]


def registers_of(operand: Operand) -> list[str]:
    """Names of the registers in an operand."""
    if isinstance(operand, tuple):
        return [name for own in operand for name in registers_of(own)]
    if isinstance(operand, Address):
        return registers_of(operand.base) if isinstance(operand.base, Reg) else []
    return [operand.name] if isinstance(operand, Reg) else []


def _has_destination(own: Instruction) -> bool:
    if own.opcode[0] == "mbarrier":
        return own.opcode[1] not in ("init", "inval")
    return own.opcode[0] not in WITHOUT_DESTINATION


def written(own: Instruction) -> list[str]:
    """Names of the registers that an instruction writes."""
    return registers_of(own.operands[0]) if own.operands and _has_destination(own) else []


def read_by(own: Instruction) -> list[str]:
    """Names of the registers that it reads; with a guard, also those it writes, which may stay as they were."""
    first = 1 if _has_destination(own) and own.opcode[0] != "wgmma" else 0  # wgmma adds to its destination
    names = [name for operand in own.operands[first:] for name in registers_of(operand)]
    if own.guard is not None:
        names += [own.guard.name, *written(own)]
    return names


def blocks_of(text: Text) -> list[Block]:
    """The blocks of a kernel, in the order of its text."""
    ends = {n + 1 for n, own in enumerate(text.instructions) if own.opcode[0] in ("bra", "ret", "exit")}
    reached = {_goal(text, own) for own in text.instructions if own.opcode[0] == "bra"}
    starts = sorted(({0} | ends | reached) - {len(text.instructions)})
    number_at = {start: number for number, start in enumerate(starts)}
    number_at[len(text.instructions)] = len(starts)
    blocks = []
    for number, start in enumerate(starts):
        end = starts[number + 1] if number + 1 < len(starts) else len(text.instructions)
        block = Block(number, list(text.instructions[start:end]), next=number + 1)
        last = block.instructions[-1]
        if last.opcode[0] in ("bra", "ret", "exit"):
            block.branch = block.instructions.pop()
            block.taken = len(starts) if last.opcode[0] != "bra" else number_at[_goal(text, last)]
            block.next = number + 1 if last.guard is not None else None
        blocks.append(block)
    _meeting_points(blocks)
    _liveness(blocks)
    return blocks


def _goal(text: Text, branch: Instruction) -> int:
    """The instruction that a branch goes to."""
    target = branch.operands[0]
    if not isinstance(target, Symbol) or target.name not in text.labels:
        raise Unreadable(f"line {branch.line}: {branch.name}: must go to a label of the kernel")
    return text.labels[target.name]


def _meeting_points(blocks: list[Block]) -> None:
    """Immediate post-dominators, by sets; kernels have few blocks."""
    leave = len(blocks)
    everything = set(range(leave + 1))
    dominators = dict.fromkeys(range(leave), everything) | {leave: {leave}}
    changed = True
    while changed:
        changed = False
        for block in reversed(blocks):
            after = [dominators[number] for number in block.after]
            new = {block.number} | set.intersection(*after)
            if new != dominators[block.number]:
                dominators[block.number], changed = new, True
    for block in blocks:  # the nearest has most post-dominators of its own
        others = dominators[block.number] - {block.number}
        block.meets = max(others, key=lambda number: len(dominators[number]))


def _liveness(blocks: list[Block]) -> None:
    needs, kills = {}, {}
    for block in blocks:
        need: set[str] = set()
        kill: set[str] = set()
        for own in block.instructions + ([block.branch] if block.branch else []):
            need |= set(read_by(own)) - kill
            kill |= set(written(own))
        needs[block.number], kills[block.number] = need, kill
    entering: dict[int, set[str]] = {number: set() for number in range(len(blocks) + 1)}
    changed = True
    while changed:
        changed = False
        for block in reversed(blocks):
            block.live = set().union(*(entering[number] for number in block.after))
            new = needs[block.number] | (block.live - kills[block.number])
            if new != entering[block.number]:
                entering[block.number], changed = new, True

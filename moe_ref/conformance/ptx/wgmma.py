"""``wgmma``: products of a warp group, which run beside its threads until they are waited for.

PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions". A product is computed when it is
issued. Until its group is waited for, nobody may touch its sums, or write what it reads in shared memory. An operand in
registers may be written before, although the ISA forbids it: Triton does so, and leaves it to ptxas.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from moe_ref.conformance.ptx.emit import Emitter
from moe_ref.conformance.ptx.faults import Faults
from moe_ref.conformance.ptx.flow import read_by, registers_of, written
from moe_ref.conformance.ptx.integers import Handler
from moe_ref.conformance.ptx.matrix_layout import columns_of, rows_of
from moe_ref.conformance.ptx.proxies import AsyncProxy
from moe_ref.conformance.ptx.shared import SharedMemory
from moe_ref.conformance.ptx.text import Imm, Instruction, Text, Unreadable
from moe_ref.conformance.ptx.warps import left_of

GROUP = 128  # threads of a warp group


class Read(NamedTuple):
    """What one product reads of shared memory: its group's number for each warp group, and [groups, units]."""

    numbers: Any
    groups: Any
    units: Any


class Products:
    """Products in flight, of programs side by side.

    Args:
        names: of registers that products use.
        shared: memory.
        proxy: its shadow.
        faults: what is wrong is noted there.
    """

    def __init__(self, names: list[str], shared: SharedMemory, proxy: AsyncProxy, faults: Faults) -> None:
        self.place = {name: place for place, name in enumerate(names)}
        self.shared, self.proxy, self.faults = shared, proxy, faults
        warps = shared.count // 32
        self._fences = np.zeros(warps, np.int32)
        self._needs = np.ones((len(names), warps), np.int32)  # fences before a product may use a register
        self._used = np.zeros((len(names), warps), np.int32)  # the last group that uses a register, from 1
        self._groups, self._over = np.zeros(warps, np.int32), np.zeros(warps, np.int32)  # committed; waited for
        self._reads: list[Read] = []

    def touch(self, touched: list[tuple[Instruction, list[str]]], threads: Any) -> None:
        """Instructions that are not wgmma's touch registers that products use."""
        warps = self.proxy.warps(threads)
        places = [self.place[name] for _, names in touched for name in names]
        busy = self._used[places][:, warps] > self._over[warps]
        if busy.any():
            first, warp = np.argwhere(busy)[0]
            owns = [own for own, names in touched for _ in names]
            labels = self.shared.labels(32 * int(warps[warp]))
            self.faults.add(owns[first], "touches a register of a wgmma in flight", labels)
        self._needs[np.ix_(places, warps)] = self._fences[warps] + 1

    def fence(self, threads: Any) -> None:
        """``wgmma.fence``."""
        self._fences[self.proxy.warps(threads)] += 1

    def commit(self, threads: Any) -> None:
        """``wgmma.commit_group``."""
        self._groups[self.proxy.warps(threads)] += 1

    def wait(self, pending: int, threads: Any) -> None:
        """``wgmma.wait_group``: all groups are over but the newest ``pending``."""
        warps = self.proxy.warps(threads)
        self._over[warps] = np.maximum(self._over[warps], self._groups[warps] - pending)
        over = self._over.reshape(-1, 4).min(axis=1)
        kept = []
        for read in self._reads:
            done = over[read.groups] >= read.numbers
            if done.any():
                self.proxy.release(read.groups[done], read.units[done])
            if not done.all():
                kept.append(Read(*(part[~done] for part in read)))
        self._reads = kept

    def multiply(
        self, own: Instruction, form: Form, left: Any, right: Any, addend: list[Any], scale: Any, threads: Any
    ) -> Any:
        """``wgmma.mma_async``: [registers, threads] of D; of warp groups that do not run it, any numbers."""
        groups = self._groups_of(own, threads)
        self._use(own, form, groups)
        if isinstance(left, list):
            words = [word.reshape(-1, GROUP)[groups].reshape(-1) for word in left]
            a = left_of(form.kind)(*words).reshape(len(groups), 64, form.inner)
        else:
            a = self._operand(own, form, left, 64, form.across_a, groups)
        b = self._operand(own, form, right, form.columns, form.across_b, groups)
        product = np.matmul(a * form.signs[0], (b * form.signs[1]).transpose(0, 2, 1))
        out = self._spread(product, form.columns, groups)
        for row, own_addend in zip(out, addend, strict=True):
            np.add(row, own_addend, out=row, where=scale)
        return out

    def _use(self, own: Instruction, form: Form, groups: Any) -> None:
        """Checks fences before a product uses its registers, and notes that it does."""
        warps = (4 * groups[:, None] + np.arange(4)).reshape(-1)
        places = [self.place[name] for name in form.registers]
        late = (self._needs[places][:, warps] > self._fences[warps]).any(axis=0)
        if late.any():
            labels = self.shared.labels(32 * int(warps[np.argmax(late)]))
            self.faults.add(own, "no wgmma.fence since its registers were touched", labels)
        self._used[np.ix_(places[: form.columns // 2], warps)] = self._groups[warps] + 1

    def _spread(self, product: Any, columns: int, groups: Any) -> Any:
        """[columns / 2, threads] of products [groups, 64, columns].

        A warp has 16 rows; a lane two neighbours in its group's row, 8 rows below, and so on 8 columns further
        ("Register Fragments for wgmma.mma_async.m64nNk16", D).
        """
        parts = product.reshape(len(groups), 4, 2, 8, columns // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5)
        out = parts.reshape(columns // 2, -1)
        if len(groups) * GROUP < self.shared.count:
            some, out = out, np.zeros((columns // 2, self.shared.count), np.float32)
            out[:, (GROUP * groups[:, None] + np.arange(GROUP)).reshape(-1)] = some
        return out

    def _groups_of(self, own: Instruction, threads: Any) -> Any:
        """The warp groups that run an instruction: all of their threads must."""
        if threads is None:
            return np.arange(self.shared.count // GROUP)
        lanes = threads.reshape(-1, GROUP)
        some = lanes.any(axis=1)
        part = some & ~lanes.all(axis=1)
        if part.any():
            labels = self.shared.labels(GROUP * int(np.argmax(part)))
            self.faults.add(own, "only some threads of a warp group run it", labels)
        return np.flatnonzero(some)

    def _operand(self, own: Instruction, form: Form, descriptor: Any, rows: int, across: bool, groups: Any) -> Any:
        """[groups, rows, k] fp32 of an operand in shared memory."""
        lanes = descriptor.reshape(-1, GROUP)[groups]
        if (lanes != lanes[:, :1]).any():
            self.faults.add(own, "threads of a warp group have different descriptors", self.shared.labels(0))
        values = lanes[:, 0].astype(np.int64)
        chunks = (columns_of if across else rows_of)(values, rows)
        outside = chunks.max(axis=1) + 16 > self.shared.size
        if outside.any():
            labels = self.shared.labels(GROUP * int(groups[np.argmax(outside)]))
            self.faults.add(own, "shared memory out of bounds", labels, f"byte {chunks.max()} of {self.shared.size}")
            chunks = np.minimum(chunks, self.shared.size // 16 * 16 - 16)
        places = chunks + self.shared.base[GROUP * groups][:, None]
        units = self.shared._units(places.reshape(-1), 16).reshape(len(groups), -1)
        self.proxy.see_matrix(own, groups, units)
        self._reads.append(Read(self._groups[4 * groups] + 1, groups, units))
        words = self.shared.data.view(np.complex128)[places // 16].view(f"u{form.item}")
        if across:
            words = words.reshape(len(groups), form.inner, rows).transpose(0, 2, 1)
        return form.number(words.reshape(len(groups), rows, form.inner))


class Form:
    """One form of ``wgmma.mma_async``.

    Attributes:
        columns: of D.
        kind: of the operands: "bf16", "f16", "tf32".
        inner: elements of the inner dimension; item: bytes of one.
        across_a, across_b: whether an operand in shared memory has the inner dimension last but one in memory.
        signs: of A and B.
        registers: names of those of D, and of A where it is in registers.
    """

    def __init__(self, own: Instruction) -> None:
        shape, total, kind, other = own.opcode[4:8]
        in_registers = isinstance(own.operands[1], tuple)
        narrow = kind in ("bf16", "f16")
        numbers = [o.value for o in own.operands[4:] if isinstance(o, Imm)]
        columns, _, inner = shape.removeprefix("m64n").partition("k")
        expected = 2 + (2 - in_registers if narrow else 0)
        if own.opcode[:4] != ("wgmma", "mma_async", "sync", "aligned") or len(own.opcode) != 8:
            raise Unreadable(f"{own.name}: unknown form")
        if kind != other or kind not in ("bf16", "f16", "tf32") or total != "f32" or own.guard is not None:
            raise Unreadable(f"{own.name}: unknown form")
        if int(inner) != (16 if narrow else 8) or len(numbers) != expected or len(own.operands) != 4 + expected:
            raise Unreadable(f"{own.name}: unknown form")
        self.columns, self.kind, self.inner, self.item = int(columns), kind, int(inner), 2 if narrow else 4
        self.signs = np.float32(numbers[0]), np.float32(numbers[1])
        across = [bool(o) for o in numbers[2:]]
        self.across_a, self.across_b = ([False] * 2 + across)[-2:] if not in_registers else (False, any(across))
        self.registers = registers_of(own.operands[0]) + (registers_of(own.operands[1]) if in_registers else [])

    def number(self, words: Any) -> Any:
        """Elements as fp32; of TF32 the low 13 bits are not read."""
        if self.kind == "f16":
            return words.view(np.float16).astype(np.float32)
        if self.kind == "bf16":
            return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return (words & np.uint32(0xFFFFE000)).view(np.float32)


@lru_cache(maxsize=512)
def _registers(instructions: tuple[Instruction, ...]) -> list[str]:
    return sorted({name for own in instructions for name in Form(own).registers})


def registers_in(text: Text) -> list[str]:
    """Names of the registers that products of a kernel use."""
    return _registers(tuple(own for own in text.instructions if own.opcode[:2] == ("wgmma", "mma_async")))


class Touches:
    """Writes, into a block's function, what other instructions do with registers that products use."""

    def __init__(self, text: Text, e: Emitter) -> None:
        self._names, self._e = set(registers_in(text)), e
        self._touched: list[tuple[Instruction, list[str]]] = []

    def before(self, own: Instruction) -> None:
        """An instruction comes next."""
        if own.opcode[0] == "wgmma":
            self.flush()
        elif self._names:
            names = sorted(self._names.intersection(read_by(own) + written(own)))
            if names:
                self._touched.append((own, names))

    def flush(self) -> None:
        """Writes what was noted since the last of wgmma's instructions."""
        if self._touched:
            e = self._e
            e.line(f"m.products.touch({e.name(self._touched, 't')}, {'M' if e.masked else 'None'})")
            self._touched = []


def handle(e: Emitter, own: Instruction) -> None:
    """``wgmma.fence``, ``commit_group``, ``wait_group``, ``mma_async``."""
    threads = e.threads(own)
    if own.guard is not None or own.opcode[2:4] != ("sync", "aligned"):
        raise Unreadable(f"{own.name}: unknown form")
    if e.masked:
        e.line(f"m.whole_warps({e.name(own, 'i')}, M)")
    if own.opcode[1] == "wait_group" and isinstance(own.operands[0], Imm):
        e.line(f"m.products.wait({own.operands[0].value}, {threads})")
    elif own.opcode[1] in ("fence", "commit_group"):
        e.line(f"m.products.{own.opcode[1].removesuffix('_group')}({threads})")
    elif own.opcode[1] == "mma_async":
        _multiply(e, own, threads)
    else:
        raise Unreadable(f"{own.name}: unknown form")


def _multiply(e: Emitter, own: Instruction, threads: str) -> None:
    targets, left, right, scale = own.operands[:4]
    assert isinstance(targets, tuple)
    words = [e.read(o, "u32") for o in left] if isinstance(left, tuple) else []
    a = f"[{', '.join(words)}]" if words else e.read(left, "u64")
    addend = ", ".join(e.read(o, "f32") for o in targets)
    form = e.name(Form(own), "f")
    given = f"{e.name(own, 'i')}, {form}, {a}, {e.read(right, 'u64')}, [{addend}], {e.read(scale, 'p')}, {threads}"
    out = e.let(f"m.products.multiply({given})")
    for place, target in enumerate(targets):
        e.write(target, "f32", f"{out}[{place}]", own)


HANDLERS: dict[str, Handler] = {"wgmma": handle}

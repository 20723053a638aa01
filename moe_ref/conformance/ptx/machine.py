"""Runs a translated kernel: some of its programs side by side, all their threads at once.

Threads that branch apart run one side after the other, and meet at the branch's immediate post-dominator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_ref.conformance.ptx.accesses import ATOMICS
from moe_ref.conformance.ptx.approximations import Approximate
from moe_ref.conformance.ptx.counters import Counting
from moe_ref.conformance.ptx.device_memory import DeviceMemory, Segment
from moe_ref.conformance.ptx.faults import Faults, chosen
from moe_ref.conformance.ptx.flow import Block
from moe_ref.conformance.ptx.mbarrier import Barriers
from moe_ref.conformance.ptx.proxies import AsyncProxy
from moe_ref.conformance.ptx.shared import ATOMIC, EPOCH, SharedMemory
from moe_ref.conformance.ptx.tensor_map import TensorMap
from moe_ref.conformance.ptx.text import Instruction, Unreadable
from moe_ref.conformance.ptx.translate import Translated
from moe_ref.conformance.ptx.wgmma import Products

MOST_STEPS = 2_000_000  # blocks that a batch of programs may run


class Machine:
    """Programs of one launch that run side by side.

    Args:
        kernel: what they run.
        programs: [programs, 3] their places in the grid.
        grid: its sizes.
        parameters: the bytes of each parameter, by name.
        segments: all memory.
        shared: bytes of shared memory of a program.
        faults: what is wrong is noted there.
        approximate: makes approximations.
        poison: a byte, which stands where nobody wrote.
        maps: tensor maps, by the address of their parameter.
        counting: counts what they do, if given.
    """

    def __init__(
        self,
        kernel: Translated,
        programs: Any,
        grid: Sequence[int],
        parameters: dict[str, bytes],
        segments: list[Segment],
        shared: int,
        faults: Faults,
        approximate: Approximate,
        poison: int,
        maps: dict[int, TensorMap],
        counting: Counting | None = None,
    ) -> None:
        self.kernel, self.faults, self.approximate, self.poison = kernel, faults, approximate, poison
        self.each = kernel.text.threads
        self.programs = programs
        self.threads = len(programs) * self.each
        self._parameters, self._read = parameters, {}  # type: ignore[var-annotated]
        thread = np.tile(np.arange(self.each, dtype=np.uint32), len(programs))
        zero = np.zeros(self.threads, np.uint32)
        self.special = {"%tid.x": thread, "%tid.y": zero, "%tid.z": zero, "%laneid": thread % 32}
        for place, axis in enumerate("xyz"):
            self.special[f"%ctaid.{axis}"] = np.repeat(programs[:, place].astype(np.uint32), self.each)
            self.special[f"%nctaid.{axis}"] = zero + np.uint32(grid[place])
            self.special[f"%ntid.{axis}"] = zero + np.uint32(self.each if axis == "x" else 1)
        x, y, z = programs.astype(np.int32).T
        number = 1 + x + grid[0] * (y + grid[1] * z)
        self.memory = DeviceMemory(
            segments, kernel.memory_unit, faults, self.labels, np.repeat(number, self.each).astype(np.int32)
        )
        self.shared = SharedMemory(len(programs), self.each, shared, kernel.shared_unit, poison, faults, self.labels)
        self.counting = self.memory.counting = self.shared.counting = counting
        self.maps, self._gave_way = maps, -1
        if kernel.asynchronous:
            self.shared.proxy = proxy = AsyncProxy(self.shared)
            self.barriers = Barriers(self.shared, proxy, faults, self.warp_barrier)
            self.products = Products(kernel.in_products, self.shared, proxy, faults)
        self.registers = {
            name: self._nothing(np.dtype(f"u{bits // 8}") if bits > 1 else np.dtype(bool))
            for name, bits in kernel.initial.items()
        }

    def labels(self, index: int) -> tuple[tuple[int, ...], int]:
        """Program and thread of an index."""
        return tuple(map(int, self.programs[index // self.each])), int(index % self.each)

    def _nothing(self, dtype: Any) -> Any:
        """Registers that nobody wrote."""
        if dtype.kind == "b":
            return np.full(self.threads, bool(self.poison & 1))
        return np.frombuffer(bytes([self.poison]) * (self.threads * dtype.itemsize), dtype)

    def run(self) -> None:
        """Runs all programs to their end."""
        blocks, leave = self.kernel.blocks, len(self.kernel.blocks)
        waiting: list[tuple[int, Any, int]] = [(0, None, leave)]  # block, threads, block at which they stop
        steps = 0
        with np.errstate(all="ignore"):
            while waiting:
                number, threads, stop = waiting.pop()
                while number != stop and number != leave:
                    steps += 1
                    if steps > MOST_STEPS:
                        raise Unreadable(f"{self.kernel.text.name}: more than {MOST_STEPS} blocks: must come to an end")
                    block = blocks[number]
                    if self.counting is not None:
                        self.counting.block(number, threads, self.threads)
                    taken = self.kernel.run_of(number, threads is not None)(self, self.registers, threads)
                    if self.kernel.asynchronous and self._stands(block, taken, threads, waiting):
                        waiting.insert(-1, (number, threads, stop))
                        break
                    if taken is None:
                        number = block.next if block.taken is None else block.taken  # type: ignore[assignment]
                        continue
                    assert block.taken is not None
                    assert block.next is not None
                    go = taken if threads is None else taken & threads
                    stay = ~taken if threads is None else ~taken & threads
                    if not stay.any():
                        number = block.taken
                    elif not go.any():
                        number = block.next
                    else:
                        if block.meets != stop:
                            waiting.append((block.meets, threads, stop))
                        sides = [(block.taken, go), (block.next, stay)]
                        waiting += [(side, own, block.meets) for side, own in sides if side != block.meets]
                        break
            if self.kernel.asynchronous:
                self.barriers.finish()

    def _stands(self, block: Block, taken: Any, threads: Any, waiting: list[tuple[int, Any, int]]) -> bool:
        """Whether a block waits for an mbarrier on which the other side of a branch must act first.

        Raises:
            KernelFault: nobody else can act.
            Unreadable: threads that waited no longer could, which is not supported.
        """
        stuck, self.barriers.stuck = self.barriers.stuck, None
        if stuck is None or block.taken != block.number:
            return False
        if not (taken.all() if threads is None else taken[threads].all()):
            return False
        if waiting and threads is not None and self.barriers.events != self._gave_way:
            number, others, stop = waiting[-1]
            if number != stop and others is not None and not (others & threads).any():
                self._gave_way = self.barriers.events
                return True
        own, thread, what = stuck
        program = slice(thread // self.each * self.each, (thread // self.each + 1) * self.each)
        if threads is not None and not threads[program].all() and self.barriers.events != self._gave_way:
            raise Unreadable(
                f"line {own.line}: {own.name}: all threads of a program must wait, or one side of a branch"
            )
        self.faults.add(own, "waits for an mbarrier that never completes", self.labels(thread), what)
        self.faults.check()
        return False

    def fence_proxy(self, threads: Any) -> None:
        """``fence.proxy.async``."""
        if self.shared.proxy is not None:
            self.shared.proxy.fence(threads)

    def parameter(self, name: str, offset: int, dtype: Any) -> Any:
        """A parameter's number, for each thread."""
        key = name, offset, dtype
        if key not in self._read:
            value = np.frombuffer(self._parameters[name], dtype, 1, offset)[0]
            self._read[key] = np.full(self.threads, value)
        return self._read[key]

    def _spread(self, parts: list[tuple[Any, Any]], dtype: Any, vector: int) -> list[Any]:
        """Loaded numbers, for each thread; poison where nobody loads."""
        if len(parts) == 1 and len(parts[0][0]) == self.threads:
            return list(np.ascontiguousarray(parts[0][1].T))
        out = np.stack([self._nothing(np.dtype(dtype))] * vector)
        for who, numbers in parts:
            out[:, who] = numbers.T
        return list(out)

    def load_global(self, own: Instruction, address: Any, dtype: Any, vector: int, threads: Any) -> list[Any]:
        """A load from memory: an array for each number of the vector."""
        return self._spread(self.memory.load(own, address, dtype, vector, threads), dtype, vector)

    def load_shared(self, own: Instruction, address: Any, dtype: Any, vector: int, threads: Any) -> list[Any]:
        """A load from shared memory."""
        return self._spread([self.shared.load(own, address, dtype, vector, threads)], dtype, vector)

    def copy(self, own: Instruction, target: Any, source: Any, size: int, given: Any, threads: Any) -> None:
        """``cp.async``: reads now what lands when it is waited for."""
        given = np.broadcast_to(given, self.threads)
        who = chosen(threads, self.threads)
        if not np.isin(given[who], (0, size)).all():
            raise Unreadable(f"line {own.line}: {own.name}: must copy all {size} bytes or none")
        reads = given == size if threads is None else (given == size) & threads
        words = np.zeros((self.threads, size // 4), np.uint32)
        for own_who, numbers in self.memory.load(own, source, np.uint32, size // 4, reads):
            words[own_who] = numbers
        self.shared.copy(own, target, words[who], who, threads)

    def load_matrices(self, own: Instruction, address: Any, count: int, trans: bool, threads: Any) -> list[Any]:
        """``ldmatrix``: rows come from the addresses of the first lanes."""
        self.whole_warps(own, threads)
        lanes = self.special["%laneid"] < 8 * count
        who, places = self.shared.locate(own, address, 16, lanes if threads is None else lanes & threads)
        self.shared.see_read(own, who, places, 16)
        rows = np.full((self.threads, 8), self.poison * 257, np.uint16)
        rows[who] = self.shared.data.view(np.uint16)[(places // 2)[:, None] + np.arange(8)]
        square = rows.reshape(-1, 32, 8)[:, : 8 * count].reshape(-1, count, 8, 8)
        if trans:
            square = square.transpose(0, 1, 3, 2)
        words = np.ascontiguousarray(square).view(np.uint32)
        return [np.ascontiguousarray(words[:, matrix]).reshape(-1) for matrix in range(count)]

    def store_matrices(self, own: Instruction, address: Any, values: list[Any], trans: bool, threads: Any) -> None:
        """``stmatrix``: rows go to the addresses of the first lanes."""
        self.whole_warps(own, threads)
        count = len(values)
        words = np.stack([np.broadcast_to(value, self.threads) for value in values]).reshape(count, -1, 8, 4)
        if trans:
            halves = np.ascontiguousarray(words).view(np.uint16).transpose(0, 1, 3, 2)
            words = np.ascontiguousarray(halves).view(np.uint32)
        rows = np.zeros((self.threads // 32, 32, 4), np.uint32)
        rows[:, : 8 * count] = words.transpose(1, 0, 2, 3).reshape(-1, 8 * count, 4)
        lanes = self.special["%laneid"] < 8 * count
        own_threads = lanes if threads is None else lanes & threads
        self.shared.store(own, address, list(np.ascontiguousarray(rows.reshape(-1, 4).T)), own_threads)

    def atomic(
        self, own: Instruction, space: str, operation: str, address: Any, values: list[Any], threads: Any
    ) -> Any:
        """One thread after the other; gives what was there before."""
        values = [np.broadcast_to(value, self.threads) for value in values]
        dtype = values[0].dtype
        size, out = dtype.itemsize, self._nothing(dtype).copy()
        if space == "shared":
            who, places = self.shared.locate(own, address, size, threads)
            self._see_atomic(own, who, places, size)
            parts = [(self.shared.data, who, places)]
        else:
            parts = []
            for segment, who, all_places in self.memory._access(own, address, size, 1, threads):
                self.memory.see_write(own, segment, who, all_places, size, None)
                parts.append((segment.data, who, all_places[:, 0]))
        for data, who, places in parts:
            for thread, place in zip(who, places, strict=True):
                cell = data[place : place + size].view(dtype)
                out[thread] = cell[0]
                cell[:] = ATOMICS[operation](cell[:], *(value[thread : thread + 1] for value in values))
        return out

    def _see_atomic(self, own: Instruction, who: Any, places: Any, size: int) -> None:
        """Atomics race with no other atomic, but with all else."""
        shared = self.shared
        units = shared._units(places, size)
        epoch = shared.epoch[who][:, None]
        tag, writer = epoch + shared.warp[who][:, None], shared.writer[units]
        shared._note(own, "reads shared memory that nobody wrote", writer == 0, who)
        recent = (writer >= epoch) & (writer != tag) & (writer % EPOCH != ATOMIC)
        shared._note(own, "race: changes shared memory that another warp wrote since the last barrier", recent, who)
        reader = shared.reader[units]
        recent = (reader >= epoch) & (reader != tag)
        shared._note(own, "race: changes shared memory that another warp read since the last barrier", recent, who)
        shared.writer[units] = np.broadcast_to(epoch + ATOMIC, units.shape)

    def whole_warps(self, own: Instruction, threads: Any) -> None:
        """All lanes of a warp must run the instruction, or none."""
        if threads is not None:
            lanes = threads.reshape(-1, 32)
            some = lanes.any(axis=1) & ~lanes.all(axis=1)
            if some.any():
                first = 32 * int(np.argmax(some))
                self.faults.add(own, "only some lanes of a warp run it", self.labels(first))

    def all_lanes(self, own: Instruction, members: Any, threads: Any) -> None:
        """Members must be all lanes."""
        who = chosen(threads, self.threads)
        wrong = np.broadcast_to(members, self.threads)[who] != 0xFFFFFFFF
        if wrong.any():
            self.faults.add(own, "names only some lanes of a warp", self.labels(who[int(np.argmax(wrong))]))

    def barrier(self, own: Instruction, threads: Any) -> None:
        """``bar.sync``: all threads of a program must come."""
        if threads is not None:
            own_threads = threads.reshape(len(self.programs), -1)
            some = own_threads.any(axis=1) & ~own_threads.all(axis=1)
            if some.any():
                first = self.each * int(np.argmax(some))
                self.faults.add(own, "a barrier that only some threads of a program reach", self.labels(first))
        self.shared.barrier(threads)
        self.memory.moments.meet(threads)

    def warp_barrier(self, threads: Any) -> None:
        """``bar.warp.sync``, or the end of an mbarrier's phase.

        In global memory these threads race with no other of their program until they meet it.
        """
        self.shared.lanes.meet(threads)
        self.memory.moments.meet(threads)

"""Slots sorted stably by expert, and the row tiles that the products work through (clauses G1, R7).

Slots are split into chunks. Each chunk counts its experts, the counts are summed over chunks, and each chunk places its
slots. If one chunk holds every slot, one program does all of it.
"""

import triton
import triton.language as tl


@triton.jit
def experts_of(topk_ids, slots, num_slots, num_experts):
    """Each slot's expert, and whether it has one; the id of an empty slot may be any integer."""
    ids = tl.load(topk_ids + slots, mask=slots < num_slots, other=-1)
    full = (ids >= 0) & (ids < num_experts)
    return tl.where(full, ids, 0).to(tl.int32), full


@triton.jit
def count(topk_ids, start, num_slots, num_experts, CHUNK, BLOCK_S, BLOCK_E):
    """[BLOCK_E] How many slots of a chunk name each expert."""
    counts = tl.zeros((BLOCK_E,), tl.int32)
    for first in range(0, CHUNK, BLOCK_S):
        ids, full = experts_of(topk_ids, start + first + tl.arange(0, BLOCK_S), num_slots, num_experts)
        counts += tl.histogram(ids, BLOCK_E, full)
    return counts


@triton.jit
def place(topk_ids, order, rows, start, num_slots, num_experts, CHUNK, BLOCK_S, BLOCK_E):
    """Writes each slot of a chunk into the next free row of its expert; ``rows`` [BLOCK_E] are the first free ones."""
    earlier = tl.arange(0, BLOCK_S)[None, :] < tl.arange(0, BLOCK_S)[:, None]
    for first in range(0, CHUNK, BLOCK_S):
        slots = start + first + tl.arange(0, BLOCK_S)
        ids, full = experts_of(topk_ids, slots, num_slots, num_experts)
        same = (ids[:, None] == ids[None, :]) & full[None, :] & earlier
        row = tl.gather(rows, ids, 0) + tl.sum(same.to(tl.int32), axis=1)
        tl.store(order + row, slots, mask=full)
        rows += tl.histogram(ids, BLOCK_E, full)


@triton.jit
def schedule_tiles(tiles, sizes, offsets, first, step, BLOCK_M, BLOCK_TILES, BLOCK_E):
    """Writes how many row tiles there are, then (expert, first row, end of rows) of each, BLOCK_TILES at a time."""
    counts = (sizes + (BLOCK_M - 1)) // BLOCK_M
    ends = tl.cumsum(counts, 0)
    total = tl.sum(counts, 0)
    tl.store(tiles, total)
    for start in range(first * BLOCK_TILES, total, step * BLOCK_TILES):
        tile = start + tl.arange(0, BLOCK_TILES)
        expert = tl.sum((ends[None, :] <= tile[:, None]).to(tl.int32), axis=1)
        expert = tl.minimum(expert, BLOCK_E - 1)
        row = tl.gather(offsets, expert, 0) + (tile - tl.gather(ends - counts, expert, 0)) * BLOCK_M
        end = tl.gather(offsets + sizes, expert, 0)
        record = tiles + 3 * (tile + 1)
        tl.store(record, expert, mask=tile < total)
        tl.store(record + 1, row, mask=tile < total)
        tl.store(record + 2, tl.minimum(row + BLOCK_M, end), mask=tile < total)


@triton.jit
def group_kernel(
    topk_ids,  # [S] int32 or int64
    order,  # [S] int32 out
    group_offsets,  # [E + 1] int32 out
    tiles,  # [1 + tiles, 3] int32 out
    num_slots,
    num_experts,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """Counts, places and lists, for slots that one chunk holds."""
    sizes = count(topk_ids, 0, num_slots, num_experts, CHUNK, BLOCK_S, BLOCK_E)
    ends = tl.cumsum(sizes, 0)
    experts = tl.arange(0, BLOCK_E)
    tl.store(group_offsets, 0)
    tl.store(group_offsets + 1 + experts, ends, mask=experts < num_experts)
    schedule_tiles(tiles, sizes, ends - sizes, 0, 1, BLOCK_M, BLOCK_TILES, BLOCK_E)
    place(topk_ids, order, ends - sizes, 0, num_slots, num_experts, CHUNK, BLOCK_S, BLOCK_E)


@triton.jit
def count_kernel(
    topk_ids,  # [S] int32 or int64
    counts,  # [chunks, E] int32 out
    num_slots,
    num_experts,
    CHUNK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Counts one chunk's experts."""
    chunk = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    found = count(topk_ids, chunk * CHUNK, num_slots, num_experts, CHUNK, BLOCK_S, BLOCK_E)
    tl.store(counts + chunk.to(tl.int64) * num_experts + experts, found, mask=experts < num_experts)


@triton.jit
def scan_kernel(
    counts,  # [chunks, E] int32, in: of each chunk; out: of all chunks before it
    sizes,  # [E] int32 out
    chunks,
    num_experts,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Sums the counts of some experts over the chunks."""
    experts = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_E,), tl.int32)
    for first in range(0, chunks, BLOCK_C):
        rows = first + tl.arange(0, BLOCK_C)
        pointers = counts + rows.to(tl.int64)[:, None] * num_experts + experts[None, :]
        mask = (rows < chunks)[:, None] & (experts < num_experts)[None, :]
        found = tl.load(pointers, mask=mask, other=0)
        tl.store(pointers, total[None, :] + tl.cumsum(found, 0) - found, mask=mask)
        total += tl.sum(found, 0)
    tl.store(sizes + experts, total, mask=experts < num_experts)


@triton.jit
def place_kernel(
    topk_ids,  # [S] int32 or int64
    counts,  # [chunks, E] int32: of all chunks before each
    sizes,  # [E] int32
    order,  # [S] int32 out
    group_offsets,  # [E + 1] int32 out
    tiles,  # [1 + tiles, 3] int32 out
    num_slots,
    num_experts,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """Places one chunk's slots, and writes a share of the row tiles."""
    chunk = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    mask = experts < num_experts
    counted = tl.load(sizes + experts, mask=mask, other=0)
    ends = tl.cumsum(counted, 0)
    if chunk == 0:
        tl.store(group_offsets, 0)
        tl.store(group_offsets + 1 + experts, ends, mask=mask)
    schedule_tiles(tiles, counted, ends - counted, chunk, tl.num_programs(0), BLOCK_M, BLOCK_TILES, BLOCK_E)
    before = tl.load(counts + chunk.to(tl.int64) * num_experts + experts, mask=mask, other=0)
    rows = ends - counted + before
    place(topk_ids, order, rows, chunk * CHUNK, num_slots, num_experts, CHUNK, BLOCK_S, BLOCK_E)

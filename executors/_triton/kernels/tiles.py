"""Which row tiles and column tiles a program of the products takes, from the list of `kernels.grouping`."""

import triton
import triton.language as tl


@triton.jit
def tile_at(tile, tiles, num_row_tiles, num_column_tiles, GROUP_M):
    """The expert, first row, end of rows and column tile of a tile.

    GROUP_M row tiles take a column tile before the next one is taken, so its weights stay in the L2 cache.
    """
    per_group = GROUP_M * num_column_tiles
    first = tile // per_group * GROUP_M
    height = tl.minimum(num_row_tiles - first, GROUP_M)
    row_tile = first + tile % per_group % height
    record = tiles + 3 * (row_tile + 1)
    return tl.load(record), tl.load(record + 1), tl.load(record + 2), tile % per_group // height


@triton.jit
def part_of(tiles, bounds, first_expert, last_expert, PART):
    """The list of row tiles of a part of the experts, and their number."""
    if PART:
        begin = tl.load(bounds + first_expert)
        return tiles + 3 * begin, tl.load(bounds + last_expert) - begin
    else:
        return tiles, tl.load(tiles)

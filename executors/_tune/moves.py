"""Which tiles a search goes to from a tile: one step in one or two of its sizes."""

from __future__ import annotations

from collections.abc import Iterator

from executors._triton.configs import KernelConfig, Tile
from executors._triton.tuned_file import SHARING, check_tile

THREADS = {"gfx942": 64}  # of a warp
LEAST_ACCUMULATORS, MOST_ACCUMULATORS = 2, 128  # sums of a thread: with twice as many it spills
OF_TENSOR_MEMORY = {"sm100": 256}  # which keeps sums out of registers until the end
MOST_PER_SM = 4
FACTORS = {"block_m": (2.0, 0.5), "block_n": (2.0, 0.5), "block_k": (2.0, 0.5), "warps": (2.0, 0.5)}
STEPS = {"stages": (1, -1), "per_sm": (1, -1)}
PAIRS = (("block_n", "warps", 2.0, 2.0), ("block_n", "block_k", 2.0, 0.5), ("block_k", "stages", 2.0, 0.5))
FREE = ("block_n", "stages", "block_k", "warps", "per_sm")  # most rewarding first; BLOCK_M is that of all
OTHERWISE_FREE = {  # what the kernel reads, where that is something else
    "outer": ("block_m", "block_n", "stages", "block_k", "warps"),
    "inner": ("block_k", "stages", "warps", "per_sm"),
}


def moves(product: str, tile: Tile, size: int, family: str, shared: int) -> list[Tile]:
    """The tiles one step from this one which a kernel may be able to take, each once.

    Args:
        product: a field of ``KernelConfig``.
        tile: where the search stands.
        size: bytes of a number.
        family: of configurations.
        shared: bytes of shared memory that a program may have.
    """
    found = dict.fromkeys(_neighbours(product, tile))
    return [t for t in found if t != tile and fits(product, t, size, family, shared)]


def fits(product: str, tile: Tile, size: int, family: str, shared: int) -> bool:
    """Whether a tile is worth compiling: within all ranges, not sure to spill, nor to want more shared memory."""
    try:
        check_tile(product, tile)
    except ValueError:
        return False
    loaded = max(1, tile.stages - 1) * (tile.block_m + tile.block_n) * tile.block_k * size
    if tile.per_sm > MOST_PER_SM or loaded > shared:
        return False
    if product == "inner":
        return True  # its columns follow from the rank
    accumulators = tile.block_m * tile.block_n / (tile.warps * THREADS.get(family, 32))
    return LEAST_ACCUMULATORS <= accumulators <= OF_TENSOR_MEMORY.get(family, MOST_ACCUMULATORS)


def with_rows(config: KernelConfig, product: str, block_m: int) -> list[Tile]:
    """A product's tile with another BLOCK_M: as it is, or smaller or wider in another size to make up for it."""
    tile = getattr(config, product)._replace(block_m=block_m)
    if block_m > getattr(config, product).block_m:
        others = [tile._replace(warps=2 * tile.warps), _scaled(tile, "block_n", 0.5)]
        return [tile, *others, _scaled(_scaled(tile, "block_n", 0.5), "block_k", 0.5)._replace(stages=2)]
    others = [tile._replace(warps=max(1, tile.warps // 2)), _scaled(tile, "block_n", 2.0)]
    return [*others[:1], tile, others[1], Tile(block_m, 64, 32, 4, 2, tile.per_sm)]


def replaced(config: KernelConfig, tiles: dict[str, Tile]) -> KernelConfig:
    """The config with other tiles; those not named take over BLOCK_M, but for that of ``outer``."""
    block_m = tiles["up"].block_m if "up" in tiles else config.up.block_m
    others = {name: getattr(config, name)._replace(block_m=block_m) for name in SHARING if name not in tiles}
    return with_tiles(config, others | tiles)


def with_tiles(config: KernelConfig, tiles: dict[str, Tile]) -> KernelConfig:
    """The config with other tiles, by product."""
    return KernelConfig(**(config._asdict() | tiles))


def _neighbours(product: str, tile: Tile) -> Iterator[Tile]:
    free = OTHERWISE_FREE.get(product, FREE)
    for field in free:
        for factor in FACTORS.get(field, ()):
            yield _scaled(tile, field, factor)
        for step in STEPS.get(field, ()):
            yield tile._replace(**{field: getattr(tile, field) + step})
    for first, second, one, other in PAIRS:
        if first in free and second in free:
            yield _scaled(_scaled(tile, first, one), second, other)
            yield _scaled(_scaled(tile, first, 1 / one), second, 1 / other)


def _scaled(tile: Tile, field: str, factor: float) -> Tile:
    return tile._replace(**{field: int(getattr(tile, field) * factor)})

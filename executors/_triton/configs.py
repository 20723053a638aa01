"""The configurations of the product kernels that ship with this package: which tiles, by device, dtype and load.

The architecture, the dtype, the alignment of the operands and the mean rows per expert, S / E, select a configuration.
T itself does not, and nothing is timed. The tiles were chosen by registers, spills and shared memory of the compiled
kernels (``python -m executors kernels``).
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """How one program works: on BLOCK_M rows times BLOCK_N columns, BLOCK_K of the inner dimension at a time.

    Attributes:
        block_m, block_n, block_k: powers of two. In an up projection with a gate half of the columns are gates.
        warps: of a program.
        stages: steps of the loop over k that are loaded ahead of their use.
        per_sm: programs on a multiprocessor, which share the tiles. 0 starts a program for each tile that there can be:
            for tiles so short that memory bounds them. ``outer`` always has 0.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    per_sm: int = 1

    def no_wider_than(self, columns: int) -> Tile:
        """The tile, with so many columns at most."""
        return self._replace(block_n=min(self.block_n, columns))


class KernelConfig(NamedTuple):
    """The tiles of all products. All but ``outer`` have the same BLOCK_M: one list of row tiles serves them.

    Attributes:
        rows: the configuration serves up to so many mean rows per expert.
        up, down: of the projections.
        dh, dx: of the products with their transposes, in the backward pass.
        outer: of the gradients of matrices; its inner dimension is rows.
        inner: of the first factors of adapters; its columns follow from the rank.
    """

    rows: float
    up: Tile
    down: Tile
    dh: Tile
    dx: Tile
    outer: Tile
    inner: Tile


WIDEST = 256  # columns of any tile
LEAST_MIXED_LIMITS = (16, 128)


class Packed(NamedTuple):
    """Configurations for matrices in 4 bits.

    Attributes:
        narrow, wide, odd: as of `Family`.
    """

    narrow: tuple[KernelConfig, ...]
    wide: tuple[KernelConfig, ...]
    odd: tuple[KernelConfig, ...]


class Family(NamedTuple):
    """Configurations for one kind of device.

    Attributes:
        shared: bytes of shared memory that a program may use.
        descriptors: whether 16-bit matrices are loaded through tensor descriptors (TMA) where strides allow it.
        narrow: for 16-bit dtypes, in order of rows.
        wide: for fp32.
        odd: for operands whose rows are not a multiple of 16 bytes, of any dtype.
        packed: for matrices in 4 bits. Their tiles are smaller, because decoding takes registers.
        mixed_dtype_limits: ranks at a time, and the most columns of a tile, where x is in bf16 and an adapter's
            factors are not: three products need more registers, or more memory next to the tensor cores.
        widened: columns of a tile at most whose results are in fp32 beside operands in fp16 (E7).
    """

    shared: int
    descriptors: bool
    narrow: tuple[KernelConfig, ...]
    wide: tuple[KernelConfig, ...]
    odd: tuple[KernelConfig, ...]
    packed: Packed
    mixed_dtype_limits: tuple[int, int] = LEAST_MIXED_LIMITS
    widened: int = WIDEST


ANY = float("inf")
GROUP_M = 8  # row tiles that share a column tile before the next one is taken


def _config(rows: float, tile: Tile, **others: Tile) -> KernelConfig:
    """One tile for all products but those named; adapters take few warps."""
    names = ("up", "down", "dh", "dx", "outer")
    inner = tile._replace(warps=4, stages=min(tile.stages, 3))
    return KernelConfig(rows, **(dict.fromkeys(names, tile) | {"inner": inner} | others))


def _same(rows: float, *tile: int, **others: Tile) -> KernelConfig:
    return _config(rows, Tile(*tile), **others)


# Gradients of matrices are written once, however many rows are summed: few rows, in small steps, into large tiles.
_FEW = {"outer": Tile(128, 128, 16, 8, 2, 0)}
_SOME = {"outer": Tile(128, 128, 32, 8, 3, 0)}
_FEW_AMD = {"outer": Tile(128, 128, 16, 4, 2, 0)}
_FEW_WIDE_AMD = {"outer": Tile(64, 64, 16, 4, 2, 0)}
_FEW_WIDE = {"outer": Tile(64, 64, 16, 8, 2, 0)}
# Small, so that small problems have several tiles. Each product has another tile, so that a mix-up shows.
_INTERPRETED = (
    _same(
        4, 16, 64, 64, 4, 1, 0, dh=Tile(16, 128, 64, 4, 1), dx=Tile(16, 128, 32, 4, 1), outer=Tile(64, 128, 16, 4, 1)
    ),
    _same(ANY, 32, 64, 32, 4, 1, dh=Tile(32, 32, 64, 4, 1), dx=Tile(32, 128, 64, 4, 1), outer=Tile(64, 32, 16, 4, 1)),
)
_ODD = (_same(16, 16, 32, 32, 2, 2, 0, **_FEW_WIDE), _same(ANY, 64, 64, 16, 8, 2, 2))
_WIDE = (_same(16, 16, 64, 32, 4, 3, 0, **_FEW_WIDE), _same(ANY, 64, 64, 32, 8, 3, 2))
_PACKED_WIDE = (_same(16, 16, 64, 32, 4, 2, 0, **_FEW_WIDE), _same(ANY, 32, 64, 32, 8, 3, 2))
_PACKED_ODD = (_same(16, 16, 32, 16, 4, 1, 0, **_FEW_WIDE), _same(ANY, 32, 32, 16, 4, 1, 2))


def _packed(*narrow: KernelConfig) -> Packed:
    return Packed(narrow, _PACKED_WIDE, _PACKED_ODD)


_PACKED_SM80 = _packed(
    _same(16, 16, 64, 64, 4, 4, 0, **_FEW), _same(64, 64, 64, 64, 8, 2, **_SOME), _same(ANY, 128, 128, 64, 8, 3)
)

FAMILIES = {
    # Triton has no tensor cores before 8.0: products are sums of single products there, and larger tiles spill.
    "sm75": Family(
        64 * 1024,
        False,
        (_same(16, 16, 64, 32, 2, 2, 0), _same(ANY, 32, 64, 32, 4, 2, 2)),
        (_same(16, 16, 64, 32, 4, 2, 0), _same(ANY, 64, 64, 16, 4, 2, 2)),
        (_same(16, 16, 32, 32, 2, 2, 0), _same(ANY, 32, 64, 16, 4, 2, 2)),
        _packed(_same(16, 16, 32, 32, 4, 2, 0), _same(ANY, 32, 32, 32, 4, 2, 2)),
    ),
    "sm80": Family(
        163 * 1024,
        False,
        (
            _same(16, 16, 64, 128, 4, 4, 0, **_FEW),
            _same(64, 64, 128, 64, 4, 3, **_SOME),
            _same(ANY, 128, 128, 64, 8, 3),
        ),
        _WIDE,
        _ODD,
        _PACKED_SM80,
    ),
    "sm86": Family(
        99 * 1024,
        False,
        (_same(16, 16, 64, 64, 4, 4, 0, **_FEW), _same(64, 64, 128, 32, 4, 3, **_SOME), _same(ANY, 128, 128, 32, 8, 3)),
        _WIDE,
        _ODD,
        _PACKED_SM80,
    ),
    "sm90": Family(
        227 * 1024,
        True,
        (_same(16, 16, 64, 64, 4, 6, 0, **_FEW), _same(64, 64, 128, 64, 4, 4, **_SOME), _same(ANY, 128, 256, 64, 8, 4)),
        _WIDE,
        _ODD,
        _packed(
            _same(16, 16, 64, 64, 4, 4, 0, **_FEW),
            _same(64, 64, 128, 64, 8, 3, **_SOME),
            _same(ANY, 128, 128, 64, 8, 3),
        ),
        mixed_dtype_limits=(32, 256),
    ),
    "sm100": Family(
        227 * 1024,
        True,
        (
            _same(16, 16, 64, 64, 4, 6, 0, **_FEW),
            _same(64, 64, 128, 64, 4, 4, **_SOME),
            _config(ANY, Tile(128, 256, 64, 8, 4), up=Tile(128, 128, 64, 8, 4)),  # a wider tile's activation spills
        ),
        (
            _same(16, 16, 64, 32, 4, 3, 0, **_FEW_WIDE),
            _config(ANY, Tile(64, 64, 32, 8, 3, 2), up=Tile(64, 64, 32, 4, 3, 2)),
        ),
        _ODD,
        _packed(
            _same(16, 16, 64, 64, 4, 4, 0, **_FEW),
            _same(64, 64, 128, 64, 8, 3, **_SOME),
            _same(ANY, 128, 128, 64, 8, 3),
        ),
        widened=128,
    ),
    # Two stages are one buffer in shared memory here, and the next tile in registers.
    "gfx942": Family(
        64 * 1024,
        False,
        (
            _same(16, 16, 64, 128, 4, 2, 0, **_FEW_AMD),
            _same(64, 64, 128, 64, 4, 2, **_SOME),
            _same(ANY, 128, 128, 64, 8, 2),
        ),
        (_same(16, 16, 64, 64, 4, 2, 0, **_FEW_WIDE_AMD), _same(ANY, 64, 64, 32, 4, 2)),
        _ODD,
        _packed(
            _same(16, 16, 64, 64, 4, 2, 0, **_FEW_AMD),
            _same(64, 64, 128, 64, 4, 2, **_SOME),
            _same(ANY, 128, 128, 64, 8, 2),
        ),
    ),
    # For checking numbers, never for timing.
    "interpreter": Family(
        2**30,
        False,
        _INTERPRETED,
        _INTERPRETED,
        _INTERPRETED,
        Packed(_INTERPRETED, _INTERPRETED, _INTERPRETED),
    ),
}


def family_of(backend: str, arch: str | int) -> str:
    """The name of the family for a device: "cuda" with 90 for 9.0, or "hip" with "gfx942".

    A device without configurations of its own takes those of the nearest one that has no more shared memory.
    """
    if backend == "hip":
        return "gfx942"
    assert isinstance(arch, int)
    if arch < 80:
        return "sm75"
    return {80: "sm80", 87: "sm80", 90: "sm90", 100: "sm100", 103: "sm100"}.get(arch, "sm86")


def config_of(
    family: str, *, narrow: bool, aligned: bool, rows: float, batch_invariant: bool, packed: bool = False
) -> KernelConfig:
    """The configuration for a call.

    Args:
        family: a name of `FAMILIES`.
        narrow: whether the dtype has 16 bits.
        aligned: whether rows of every operand are a multiple of 16 bytes.
        rows: mean rows per expert, S / E.
        batch_invariant: whether one configuration, the last one, serves any number of rows (C2).
        packed: whether a projection is in 4 bits, and decoded in the products.
    """
    owner = FAMILIES[family].packed if packed else FAMILIES[family]
    in_order = owner.odd if not aligned else owner.narrow if narrow else owner.wide
    return in_order[-1] if batch_invariant else next(config for config in in_order if rows <= config.rows)

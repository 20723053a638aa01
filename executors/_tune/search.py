"""The search of ``tune``: each product by itself, step by step; then all of them with other rows in a tile.

A product's time does not depend on the tiles of others, but for BLOCK_M, which they share. So with the shipped BLOCK_M
each product goes from its shipped tile to better neighbours until there is none; then the same with twice and half as
many rows, where the products together decide.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from executors._triton.configs import KernelConfig, Tile
from executors._triton.tuned_file import SHARING
from executors._tune.contest import Contest
from executors._tune.moves import fits, moves, replaced, with_rows, with_tiles
from executors._tune.workload import LAYER

OTHER_ROWS = 2  # twice and half of the shipped BLOCK_M: each as much of the time as all products had before
OF_ADAPTERS = "inner"  # tuned wherever there are any


@dataclass
class Search:
    """A search for one layer and load.

    Attributes:
        contest: compares tiles.
        products: what is tuned.
        size: bytes of a number.
        family: of configurations.
        shared: bytes of shared memory that a program may have.
        tell: called with what is being done, before each tile.
        now: a clock in seconds.
        best: the tiles found so far; whoever interrupts the search finds them here.
    """

    contest: Contest
    products: tuple[str, ...]
    size: int
    family: str
    shared: int
    tell: Callable[[str], None] = lambda _: None
    now: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.best: KernelConfig = self.contest.shipped

    def go(self, seconds: float) -> None:
        """Searches for so long, or until nothing better is near; `best` holds what it has found at any time."""
        end = self.now() + seconds
        left = len(self.products) * (1 + OTHER_ROWS)
        for product in self.products:
            self._descend(product, self.best, self._share(end, left), keep=True)
            left -= 1
        sharing = [product for product in self.products if product in SHARING]
        seen = {self.best.up.block_m}
        for parts, factor in ((2, 2.0), (1, 0.5)):
            until = self._share(end, parts)
            while self.now() < until and (rows := int(self.best.up.block_m * factor)) not in seen:
                seen.add(rows)
                if not self._other_rows(rows, sharing, until):
                    break

    def settle(self) -> None:
        """Finds tiles for what was not tuned, if BLOCK_M has changed: they must launch and be right; else all stays."""
        shipped = self.contest.shipped
        if self.best.up.block_m == shipped.up.block_m:
            return
        for product in (name for name in SHARING if name not in (*self.products, OF_ADAPTERS)):
            self.tell(f"{product}, as shipped")
            config = self._start(product, self.best, with_rows(shipped, product, self.best.up.block_m))
            if config is None:
                self.best = shipped
                return
            self.best = config

    def _share(self, end: float, parts: int) -> float:
        return self.now() + max(0.0, end - self.now()) / parts

    def _descend(self, product: str, config: KernelConfig, end: float, *, keep: bool) -> KernelConfig:
        """Goes to a better neighbour as long as there is one, and time."""
        seen = {getattr(config, product)}
        improved = True
        while improved:
            improved = False
            for tile in moves(product, getattr(config, product), self.size, self.family, self.shared):
                if self.now() >= end:
                    return config
                if tile in seen:
                    continue
                seen.add(tile)
                self.tell(f"{product} {text_of(tile)}")
                challenger = with_tiles(config, {product: tile})
                if self.contest.beats(product, challenger, config):
                    config, improved = challenger, True
                    if keep:
                        self.best = config
                    break
        return config

    def _other_rows(self, block_m: int, products: list[str], end: float) -> bool:
        """Whether all products together are faster with so many rows in a tile, each with its best tile."""
        config = replaced(self.best, {"up": self.best.up._replace(block_m=block_m)})
        for product in products:
            started = self._start(product, config, with_rows(self.best, product, block_m))
            if started is None:
                return False
            config = started
        for number, product in enumerate(products):
            config = self._descend(product, config, self._share(end, len(products) - number + 1), keep=False)
        self.tell(f"all with {block_m} rows")
        if not self.contest.beats(LAYER, config, self.best):
            return False
        self.best = config
        return True

    def _start(self, product: str, config: KernelConfig, tiles: list[Tile]) -> KernelConfig | None:
        """The first of these tiles that a product can take."""
        for tile in tiles:
            if fits(product, tile, self.size, self.family, self.shared):
                self.tell(f"{product} {text_of(tile)}")
                challenger = with_tiles(config, {product: tile})
                if self.contest.admits(product, challenger):
                    return challenger
        return None


def text_of(tile: Tile) -> str:
    """Such as "128x256x64 w8 s4 p1": rows, columns and k; warps, stages, programs on a multiprocessor."""
    return f"{tile.block_m}x{tile.block_n}x{tile.block_k} w{tile.warps} s{tile.stages} p{tile.per_sm}"

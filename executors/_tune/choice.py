"""One choice of tiles: its search, its confirmation on the whole layer, and its report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table

from executors._triton.configs import KernelConfig
from executors._triton.device import INTERPRETED
from executors._triton.tuned_file import Key, as_entry
from executors._tune.contest import Contest, Duel, GpuClock, Tally, host_clock
from executors._tune.search import Search, text_of
from executors._tune.workload import LAYER, Workload

ROUNDS = 15  # of a duel; one where kernels are interpreted
CONFIRMING = 3  # times as many rounds for the whole layer
MS = 1000


@dataclass
class Choice:
    """What was chosen for a layer and T.

    Attributes:
        tokens: T.
        key: what it is stored under.
        products: what was tuned.
        shipped, chosen: the tiles; the same where none were faster.
        duels: shipped against chosen, by product, and for the whole `LAYER`.
        tally: of the tiles tried.
        interrupted: whether the search was.
    """

    tokens: int
    key: Key
    products: tuple[str, ...]
    shipped: KernelConfig
    chosen: KernelConfig
    duels: dict[str, Duel]
    tally: Tally
    interrupted: bool

    @property
    def changed(self) -> bool:
        """Whether there is anything to store."""
        return self.chosen != self.shipped


def choose(workload: Workload, tokens: int, seconds: float, tell: Callable[[str], None]) -> Choice:
    """Searches, and confirms what was found on the whole layer: else it is the shipped tiles.

    Args:
        workload: the layer and its input.
        tokens: T.
        seconds: how long the search may take; Ctrl-C ends it, and keeps what it has found.
        tell: called with what is being done.
    """
    device = workload.layer.x.device
    on_gpu, rounds = device.type == "cuda", 1 if INTERPRETED else ROUNDS
    clock = GpuClock(device) if on_gpu else host_clock
    contest = Contest(workload, workload.shipped, clock, rounds, torch.cuda.synchronize if on_gpu else lambda: None)
    size, family = workload.layer.x.element_size(), workload.device.family
    search = Search(contest, workload.products, size, family, workload.shared, tell)
    interrupted = False
    try:
        search.go(seconds)
    except KeyboardInterrupt:
        interrupted = True
    search.settle()
    duels: dict[str, Duel] = {}
    chosen = search.best
    if chosen != workload.shipped:
        tell("confirming on the whole layer")
        if contest.admits(LAYER, chosen):
            duels[LAYER] = contest.duel(LAYER, workload.shipped, chosen, CONFIRMING * rounds)
        if LAYER not in duels or not duels[LAYER].won:
            chosen = workload.shipped
    for product in workload.products:
        tell(f"{product}: shipped and chosen")
        duels[product] = contest.duel(product, workload.shipped, chosen)
    if chosen == workload.shipped:
        duels[LAYER] = contest.duel(LAYER, workload.shipped, chosen)
    return Choice(tokens, workload.key, workload.products, workload.shipped, chosen, duels, contest.tally, interrupted)


def tokens_of(key: Key) -> tuple[int, int]:
    """The least and the most T that share a key."""
    most = int(key.experts * 2.0**key.bucket / key.top_k)
    return int(key.experts * 2.0 ** (key.bucket - 1) / key.top_k) + 1, most


def heading(choice: Choice) -> str:
    """What the table below it is about."""
    least, most = tokens_of(choice.key)
    rows = choice.tokens * choice.key.top_k / choice.key.experts
    tally = choice.tally
    ended = ", interrupted" if choice.interrupted else ""
    return (
        f"T={choice.tokens}, {rows:g} rows per expert (stands for T from {least} to {most})\n"
        f"tiles tried: {tally.tried}; {tally.failed} did not compile or launch, {tally.wrong} were wrong{ended}"
    )


def table(choice: Choice) -> Table:
    """A row for each product, in 80 columns."""
    out = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name in ("product", "shipped", "chosen"):
        out.add_column(name, no_wrap=True)
    for name in ("ms", "ms", "ratio"):
        out.add_column(name, justify="right", no_wrap=True)
    for product in (*choice.products, LAYER):
        duel = choice.duels[product]
        old, new = (f"{MS * _median(times):.3g}" for times in duel)
        tiles = (
            [""] * 2
            if product == LAYER
            else [text_of(getattr(own, product)) for own in (choice.shipped, choice.chosen)]
        )
        if tiles[0] == tiles[1] and not (product == LAYER and choice.changed):
            out.add_row(product, tiles[0], "same" if tiles[1] else "", old)
        else:
            out.add_row(product, *tiles, old, new, f"{duel.ratio:.3f}")
    return out


def as_json(choice: Choice) -> dict[str, Any]:
    """Everything that was measured."""
    return {
        "tokens": choice.tokens,
        "changed": choice.changed,
        "interrupted": choice.interrupted,
        "tiles": vars(choice.tally),
        "shipped": {name: getattr(choice.shipped, name)._asdict() for name in choice.products},
        "seconds": {name: duel._asdict() for name, duel in choice.duels.items()},
        "entry": as_entry(choice.key, choice.chosen, figures(choice)),
    }


def figures(choice: Choice) -> dict[str, Any]:
    """The figures that are stored beside an entry."""
    old, new = (_median(times) for times in choice.duels[LAYER])
    return {
        "tokens": choice.tokens,
        "tuned": list(choice.products),
        "shipped_ms": round(MS * old, 6),
        "chosen_ms": round(MS * new, 6),
    }


def _median(times: list[float]) -> float:
    return sorted(times)[len(times) // 2]

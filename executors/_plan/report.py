"""The tables for people, in 80 columns, and the JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table

from executors._plan.run import PassBytes, PlanSettings, RanksPlan
from executors._plan.traffic import RESULTS, ROWS
from executors._plan.world import BATCHES

SCHEMA = 1
MB, GIB, MILLISECOND = 1e6, 2**30, 1e-3
EVEN = 0.01  # a ratio so near to 1 is none
NOTES = """\
exact: rows, slots and bytes. The executor's own planning says what travels. One
  rank of the W, that with most, ran forward and backward under torch's fake
  process group; each of its collectives has the bytes of these tables
a model: tokens ({batches} batches of the bundled text, which ranks share), memory
  (sizes of tensors, added up), and times: full rates, no latency, nothing in
  the way. Real times are longer
copies: other ranks to which a token goes; far: those of them on other nodes
slots, rows: those that a rank's experts do, and those it receives: the most
  over the mean of all ranks, with ranks that have no experts
max_slots: the least that this option of the executor may be, and what each rank
  sends forward then, by slots or ranks, whichever is less
MB: of the rank with most; mean: sent, of all ranks; small: ids, weights and
  what ranks compare; back: sent in the backward pass. Under all_to_all each
  rank has T tokens, under all_reduce all have the same T: compared below
ms: the slowest rank's; links: the better way of all_to_all, forward
GiB: weights, their gradients, what is kept for the backward pass, and the most
  on the way under all_to_all, where slots or ranks return; no temporaries of
  products"""
VERDICT = """\
how many times as long as all_to_all takes all_reduce, forward, by links; the
  better of slot and rank on either side. Below 1 all_reduce is faster
own: each rank has its own T tokens; for all_reduce all ranks first get all
same: all ranks have the same T tokens and need all results; for all_to_all
  each does a part of the tokens, and gives its results to all"""


def heading(plan: PlanSettings) -> list[str]:
    """What was planned."""
    shape, machine, config = plan.shape, plan.machine, plan.shape.config
    groups = f" in {config.topk_groups} of {config.num_groups} groups" if config.num_groups > 1 else ""
    return [
        f"{shape.name}: E={shape.experts}, K={shape.top_k}{groups}, H={shape.hidden}, I={shape.intermediate}; "
        f"weights {plan.weights}",
        f"T={plan.tokens} of each rank in bfloat16; {plan.routing} routing",
        f"{machine.card.title}, {machine.per_node} in a node: {machine.inside.title}, "
        f"{machine.inside.rate / 1e9:g} GB/s each way;",
        f"between nodes: {machine.across.title}, {machine.across.rate / 1e9:g} GB/s each way",
    ]


def tables(plan: PlanSettings, found: Sequence[RanksPlan]) -> list[Table]:
    """Balance, memory, bytes and times, and the verdict."""
    return [
        _rows(
            ("ranks", "experts", "idle", "copies", "far", "slots", "rows", "max_slots", "MB"),
            [_balance(plan, own) for own in found],
        ),
        _rows(
            ("ranks", "way", "sent MB", "recv", "mean", "small", "back", "links ms", "back"),
            [row for own in found for row in _ways(own)],
            left=(1,),
        ),
        _rows(
            ("ranks", "products ms", "back", "links", "GiB: weights", "grads", "kept", "slot", "rank"),
            [_products(own) for own in found],
        ),
    ]


def verdict(found: Sequence[RanksPlan]) -> list[Table]:
    """Where all_to_all beats all_reduce: by K, and by T."""
    top_ks, tokens = list(found[0].same), list(found[0].same_tokens)
    by_k = [(str(own.ranks), _ratio(own.own), *map(_ratio, own.same.values())) for own in found]
    by_t = [(str(own.ranks), *map(_ratio, own.same_tokens.values())) for own in found]
    return [
        _rows(("ranks", "own", *(f"same K={k}" if k == top_ks[0] else f"K={k}" for k in top_ks)), by_k),
        _rows(("ranks", *(f"same T={t}" if t == tokens[0] else f"T={t}" for t in tokens)), by_t),
    ]


def crossings(found: Sequence[RanksPlan]) -> list[str]:
    """A line for each number of ranks: for which K and T all_reduce is the faster."""
    out = []
    for own in found:
        if own.ranks == 1:
            continue
        few = [f"K={k}" for k, ratio in own.same.items() if ratio < 1 - EVEN] + [
            f"T={tokens}" for tokens, ratio in own.same_tokens.items() if ratio < 1 - EVEN
        ]
        where = f"all_reduce is faster at {', '.join(few)}" if few else "all_reduce is nowhere faster"
        out.append(f"{own.ranks} ranks, same tokens: {where}")
    return out


def notes() -> str:
    """What columns mean, and what is exact."""
    return NOTES.format(batches=BATCHES)


def as_json(plan: PlanSettings, found: Sequence[RanksPlan]) -> dict[str, Any]:
    """All that is known."""
    machine = plan.machine
    return {
        "schema": SCHEMA,
        **plan.shape.as_json(),
        "groups": plan.shape.config.num_groups,
        "topk_groups": plan.shape.config.topk_groups,
        "dtype": "bfloat16",
        "weights": plan.weights,
        "T": plan.tokens,
        "routing": plan.routing,
        "seed": plan.seed,
        "batches": BATCHES,
        "per_node": machine.per_node,
        "card": machine.card._asdict(),
        "inside": machine.inside._asdict(),
        "across": machine.across._asdict(),
        "plans": [_plan_json(plan, own) for own in found],
    }


def _plan_json(plan: PlanSettings, own: RanksPlan) -> dict[str, Any]:
    forward, backward = own.products
    return {
        "ranks": own.ranks,
        "idle": own.world.idle,
        "fan_out": own.world.fan_out,
        "copies": own.world.copies,
        "copies_to_other_nodes": _far(plan, own),
        "slots_over_mean": own.slots_over_mean,
        "rows_received_over_mean": own.rows_over_mean,
        "rows_sent_over_mean": own.sent_over_mean,
        "slots": own.world.received_slots.tolist(),
        "products": {"forward": forward, "backward": backward},
        "least_max_slots": own.world.least_bound,
        "bounded": {returns: asdict(found) for returns, found in own.bounded.items()},
        "memory": {returns: asdict(used) | {"total": used.total} for returns, used in own.memory.items()},
        "ways": [
            {**way.way._asdict(), "counted_rank": way.rank, "forward": asdict(way.forward)}
            | {"backward": asdict(way.backward)}
            for way in own.ways
        ],
        "all_reduce_over_all_to_all": {
            "own": own.own,
            "same": {str(k): ratio for k, ratio in own.same.items()},
            "same_tokens": {str(tokens): ratio for tokens, ratio in own.same_tokens.items()},
        },
    }


def _balance(plan: PlanSettings, own: RanksPlan) -> tuple[str, ...]:
    most = len(own.world.experts.experts(0))
    values = (own.world.copies, _far(plan, own), own.slots_over_mean, own.rows_over_mean)
    figures = [f"{value:.2f}" for value in values]
    bound = str(own.world.least_bound), _figure(min(each.sent for each in own.bounded.values()) / MB)
    return str(own.ranks), str(most), str(own.world.idle), *figures, *bound


def _far(plan: PlanSettings, own: RanksPlan) -> float:
    """Ranks of other nodes to which a token goes: the mean."""
    there = own.world.rows * ~plan.machine.is_near(own.ranks)
    return float(there.sum() / own.world.tokens.sum())


def _ways(own: RanksPlan) -> list[tuple[str, ...]]:
    out = []
    for number, way in enumerate(own.ways):
        forward, backward = way.forward, way.backward
        sizes = (forward.sent, forward.received, forward.mean, _small(forward), backward.sent)
        times = (forward.seconds, backward.seconds)
        cells = [_figure(size / MB) for size in sizes] + [_figure(time / MILLISECOND) for time in times]
        out.append((str(own.ranks) if number == 0 else "", str(way.way), *cells))
    return out


def _small(found: PassBytes) -> int:
    return sum(size for name, size in found.by_name.items() if name not in (ROWS, RESULTS))


def _products(own: RanksPlan) -> tuple[str, ...]:
    best = min((way for way in own.ways if way.way.dispatch == "all_to_all"), key=lambda way: way.forward.seconds)
    by_slot, by_rank = own.memory["slot"], own.memory["rank"]
    times = [_figure(time / MILLISECOND) for time in (*own.products, best.forward.seconds)]
    parts = (by_slot.weights, by_slot.gradients, by_slot.kept, by_slot.exchange, by_rank.exchange)
    return str(own.ranks), *times, *(_figure(part / GIB) for part in parts)


def _rows(names: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> Table:
    out = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for number, name in enumerate(names):
        out.add_column(name, justify="left" if number in left else "right", no_wrap=True)
    for row in rows:
        out.add_row(*row)
    return out


def _figure(number: float) -> str:
    """Three digits, or all before the point; fewer of what is small."""
    if 0 < number < 0.00095:
        return f"{number:.0e}"
    return f"{number:.2g}" if number < 0.0995 else f"{number:.3g}" if number < 999.5 else f"{number:.0f}"


def _ratio(number: float) -> str:
    return f"{number:.2f}" if number < 9.995 else f"{number:.1f}"

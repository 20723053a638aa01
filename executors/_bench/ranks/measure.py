"""Judges all contenders of one case on all ranks, then times those that are right, in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from executors._bench.case import FORWARD, BenchCase, BenchRow
from executors._bench.judge import clear_gradients, judge_results, only_judged
from executors._bench.measure import MAX_ROUNDS, REPEATED_S, time_rounds
from executors._bench.ranks.contenders import ALONE, OWN, RankContender
from executors._bench.ranks.parts import Part, collected, rows_of, token_counts
from executors._bench.routing import Batch, load
from executors._bench.settings import Settings
from executors._bench.timing import AGAIN
from executors._bench.truth import SampledTruth
from moe_ref.conformance.judgement.faults import Judgement

SETTLED_S = 0.005  # after a call with several threads, which look for more work for a while

Say = Callable[[str], None]


@dataclass(eq=False)
class RankRow(BenchRow):
    """What came of one contender in one case.

    Attributes:
        function: an executor, or "hf:NAME".
        how: what travels, or how many threads one process had.
        spread: whether it ran on all ranks.
    """

    function: str = ""
    how: str = ""
    spread: bool = True


@dataclass(frozen=True, eq=False)
class Action:
    """A call of this rank, with so many threads."""

    call: Callable[[], None]
    threads: int

    def __call__(self) -> None:
        self.call()


@dataclass(frozen=True, eq=False)
class RankClock:
    """Seconds of a call on the slowest rank, from a barrier on.

    Attributes:
        after: called after a call that is made again.
        repeated: whether a quick call is made twice, and the second one counts, as `warm_seconds` does.
    """

    after: Callable[[], None]
    repeated: bool

    def __call__(self, action: Callable[[], None]) -> float:
        """The same number on all ranks."""
        seconds = self._once(action)
        if not self.repeated or seconds > REPEATED_S:
            return seconds
        self.after()
        return self._once(action)

    def _once(self, action: Callable[[], None]) -> float:
        threads = getattr(action, "threads", 1)
        if threads > 1:
            torch.set_num_threads(threads)
        dist.barrier()
        start = time.perf_counter()
        action()
        taken = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        if threads > 1:
            torch.set_num_threads(1)
            time.sleep(SETTLED_S)
        return taken.item()


def measure_case(
    settings: Settings,
    part: Part,
    given: Batch,
    truth: SampledTruth | None,
    routing: str,
    direction: str,
    everyone: list[RankContender],
    say: Say,
) -> BenchCase:
    """Judges and times. All ranks call it; what it returns is whole on the first one.

    Args:
        settings: how long, how many rounds, which seed.
        part: of the layer.
        given: all tokens.
        truth: on the first rank.
        routing: of the tokens.
        direction: what a call is.
        everyone: the contenders, the same on all ranks.
        say: called with what is being done.
    """
    own = rows_of(given, part.rank, part.experts.ranks)
    backward = direction != FORWARD
    rows: list[BenchRow] = []
    actions = {}
    for contender in everyone:
        row = _row(contender, backward)
        rows.append(row)
        if row.reason:
            continue
        say(f"judging {contender.name}")
        row.judgement = _judged(contender, part, given, truth, backward)
        if not _of_first(row.failed):
            batch = own if contender.tokens == OWN else given
            actions[contender.name] = Action(contender.action(batch, direction), contender.threads)

    def after() -> None:
        for batch in (own, given):
            clear_gradients(part.local, batch)
        if part.whole is not None:
            clear_gradients(part.whole, given)

    sizes = load(given.topk_ids, part.shape), int(torch.unique(given.topk_ids).numel())
    case = BenchCase(part.shape, len(given.x), routing, direction, *sizes, rows, storage=part.local.storage)
    _time(case, actions, settings, after, say)
    return case


def _row(contender: RankContender, backward: bool) -> RankRow:
    return RankRow(
        contender.name,
        contender.ours,
        contender.why_not(backward),
        function=contender.function,
        how=contender.how,
        spread=contender.tokens != ALONE,
    )


def _time(case: BenchCase, actions: dict[str, Action], settings: Settings, after: Callable[[], None], say: Say) -> None:
    """Writes the times into the rows; all ranks make as many rounds, since they know the same seconds."""
    clock = RankClock(after, case.direction != FORWARD)
    say("warming up")
    warm = {}
    for name, action in actions.items():
        warm[name] = clock(action)
        after()
    if not warm:
        return
    theirs = [row.name for row in case.rows if row.name in warm and not row.ours]
    case.reference = min(theirs or warm, key=warm.__getitem__)
    entries: dict[str, Callable[[], None]] = {**actions, case.reference + AGAIN: actions[case.reference]}
    once = (2 if clock.repeated else 1) * (sum(warm.values()) + warm[case.reference])
    rounds = min(max(settings.rounds, int(settings.seconds / once)), MAX_ROUNDS)
    times = time_rounds(
        entries, after, "cpu", 0.0, settings.seed, lambda n: say(f"round {n} of {rounds}"), rounds, clock
    )
    case.again = times.pop(case.reference + AGAIN)
    for row in case.rows:
        row.seconds = times.get(row.name, [])


def _judged(
    contender: RankContender, part: Part, given: Batch, truth: SampledTruth | None, backward: bool
) -> Judgement | None:
    """The verdicts, on the first rank. dy is zero but for the judged tokens, as in `judge_contender`."""
    masked = only_judged(given)
    ranks = part.experts.ranks
    batch = rows_of(masked, part.rank, ranks) if contender.tokens == OWN else masked
    layer = part.whole if contender.tokens == ALONE else part.local
    found: dict[str, Tensor] = {}
    missing: list[str] = []
    if contender.call is not None and layer is not None:
        with torch.set_grad_enabled(backward):
            y = contender.call(batch)
        found["y"] = y.detach()
        if backward:
            torch.autograd.backward(y, batch.dy)
            leaves = batch.leaves() | layer.parameters
            found |= {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
            missing = [name for name in leaves if name not in found]
        clear_gradients(layer, batch)
    everywhere: list[list[str]] = [[]] * ranks
    dist.all_gather_object(everywhere, missing)
    if any(everywhere):
        return Judgement(fault=f"D1: no gradient for {', '.join(sorted({name for one in everywhere for name in one}))}")
    if contender.tokens != ALONE:
        found = _together(found, contender, part, len(given.x))
    if part.whole is None or truth is None:
        return None
    return judge_results(found.pop("y"), found, part.whole, given, truth)


def _together(found: dict[str, Tensor], contender: RankContender, part: Part, tokens: int) -> dict[str, Tensor]:
    """What all ranks found, on the first one: experts of each, and tokens of each where each has its own."""
    rows = token_counts(tokens, part.experts.ranks)
    whole = {}
    for name in sorted(found):
        if name in part.local.parameters:
            value = collected(found[name], part.counts(), part.rank)
        elif contender.tokens == OWN:
            value = collected(found[name], rows, part.rank)
        else:
            value = found[name]
        if value is not None:
            whole[name] = value
    return whole


def _of_first(value: bool) -> bool:
    """What the first rank found, on all."""
    said = [value]
    dist.broadcast_object_list(said)
    return said[0]

"""Times the right contenders of one case; on a GPU also measures their peak memory, and times them in CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from executors._bench import cuda as bench_cuda
from executors._bench.case import FORWARD, LORA, BenchCase, BenchRow
from executors._bench.measure import MIN_ROUNDS, Clock, time_rounds, warm_seconds, warm_up
from executors._compare.memory import peak_of

AGAIN = " again"  # the second entry of the contender that is timed against itself
DECODE = 64  # tokens up to which a forward call is captured in a graph, as a server's decoding step is
SLOWEST_S = {"cuda": 1.0, "cpu": 2.0}  # of a call that is timed in turn

Action = Callable[[], None]


@dataclass(frozen=True)
class Timing:
    """How long and where.

    Attributes:
        device: where.
        seconds: how long the rounds go on.
        rounds: at least so many.
        seed: of the order of calls.
        memory: whether peak memory is measured here, on a GPU.
        graphs: whether calls are timed in a CUDA graph too.
    """

    device: str
    seconds: float
    rounds: int = MIN_ROUNDS
    seed: int = 0
    memory: bool = False
    graphs: bool = True

    @property
    def gpu(self) -> bool:
        """Whether it is a GPU."""
        return torch.device(self.device).type == "cuda"


def time_case(
    case: BenchCase, actions: dict[str, Action], timing: Timing, after: Action, tell: Callable[[str], None]
) -> None:
    """Times the actions in turn, and writes the times into the rows of the same names.

    Args:
        case: its rows get their times.
        actions: the calls, by contender.
        timing: how long and where.
        after: called after each call, outside its time.
        tell: called with what is being done.
    """
    rows = {row.name: row for row in case.rows if row.name in actions}
    tell("warming up")
    warm = warm_up(actions, after, timing.device)
    limit = SLOWEST_S[torch.device(timing.device).type]
    if not timing.gpu and warm:  # calls take longer on a CPU: leave out only those far from the best peer
        limit = max(limit, 2 * min([warm[name] for name in warm if not rows[name].ours] or warm.values()))
    for name, seconds in list(warm.items()):
        if seconds > limit:
            rows.pop(name).untimed = f"a call took {seconds:.1f} s, more than {limit:.3g} s"
            del warm[name]
    for row in rows.values():
        if row.interpreted:  # no measurement: once is enough
            row.seconds = [warm.pop(row.name)]
    theirs = [name for name in warm if not rows[name].ours]
    case.reference = min(theirs or warm, key=warm.__getitem__, default="")
    entries = {name: actions[name] for name in warm}
    if case.reference:
        entries[case.reference + AGAIN] = actions[case.reference]
    clock: Clock | None = bench_cuda.ColdClock(timing.device) if timing.gpu else None
    if not timing.gpu and case.direction != FORWARD:  # gradients are large, and freed after each call
        clock = partial(warm_seconds, after=after)
    times = _rounds(entries, timing, after, tell, clock) if entries else {}
    case.again = times.pop(case.reference + AGAIN, [])
    for name, samples in times.items():
        rows[name].seconds = samples
    if timing.gpu:
        _measure_on_gpu(case, {name: actions[name] for name in rows}, rows, timing, after, tell)


def _measure_on_gpu(
    case: BenchCase,
    actions: dict[str, Action],
    rows: dict[str, BenchRow],
    timing: Timing,
    after: Action,
    tell: Callable[[str], None],
) -> None:
    """Peak memory of each contender, and times in a graph."""
    for name, action in actions.items() if timing.memory else ():
        tell(f"memory of {name}")
        rows[name].peak = peak_of(action, after, timing.device)
        after()
    if not timing.graphs or not is_captured(case):
        return
    replays: dict[str, Action] = {}
    for name, action in actions.items():
        tell(f"capturing {name}")
        try:
            replays[name] = bench_cuda.captured(action, timing.device, after)
        except bench_cuda.NotCaptured as error:
            rows[name].no_graph = str(error)
    if replays:
        found = _rounds(replays, timing, lambda: None, tell, bench_cuda.ColdClock(timing.device, queued=True))
        for name, times in found.items():
            rows[name].graph = times


def is_captured(case: BenchCase) -> bool:
    """Whether calls are timed in a graph too, without Python's part: a server's decoding, and fine-tuning."""
    return case.direction == LORA or (case.direction == FORWARD and case.tokens <= DECODE)


def _rounds(
    actions: dict[str, Action], timing: Timing, after: Action, tell: Callable[[str], None], clock: Clock | None
) -> dict[str, list[float]]:
    return time_rounds(
        actions, after, timing.device, timing.seconds, timing.seed, lambda n: tell(f"round {n}"), timing.rounds, clock
    )

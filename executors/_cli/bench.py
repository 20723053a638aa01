"""The benchmark: every executor and transformers' experts functions, on the same inputs, judged and then timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from executors._cli.bench_contenders import Contender, our_contenders
from executors._cli.bench_judge import Judgement, clear_gradients, judge_contender
from executors._cli.bench_layers import LAYERS, BenchLayer, Shape, random_layer, sized
from executors._cli.bench_measure import Ceilings, Spread, measure_ceilings, ratios, spread, time_rounds, warm_up
from executors._cli.bench_peers import peers
from executors._cli.bench_routing import KINDS, Batch, Load, batch, load
from executors._cli.bench_truth import Truth, judged_tokens, sample_truth

FORWARD, WITH_BACKWARD = DIRECTIONS = ("forward", "forward_backward")
DEFAULT_LAYERS = ("qwen3-30b-a3b",)
DEFAULT_TOKENS = {"cpu": (1, 8, 64, 512), "cuda": (1, 8, 64, 512, 4096, 32768)}
AGAIN = " again"  # the second entry of the contender that is timed against itself

Show = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        names: our executors.
        layers: names of `LAYERS`.
        tokens: T, one case for each.
        routings: of `KINDS`; None is all three forward, and "real" with backward.
        directions: of `DIRECTIONS`.
        scale: H and I are divided by this.
        seconds: how long the rounds of one case go on.
        device: where.
        seed: of weights, inputs, samples and the order of calls.
        load: processes running on the machine before, on average over a minute.
    """

    names: tuple[str, ...]
    layers: tuple[str, ...] = DEFAULT_LAYERS
    tokens: tuple[int, ...] = DEFAULT_TOKENS["cpu"]
    routings: tuple[str, ...] | None = None
    directions: tuple[str, ...] = DIRECTIONS
    scale: int = 1
    seconds: float = 10.0
    device: str = "cpu"
    seed: int = 0
    load: float = 0.0

    def pairs(self) -> list[tuple[str, str]]:
        """(routing, direction) of the cases of one layer, with equal routings side by side."""
        if self.routings is not None:
            return [(routing, direction) for routing in self.routings for direction in self.directions]
        return [(r, d) for r in KINDS for d in self.directions if d == FORWARD or r == KINDS[0]]

    def cases(self) -> int:
        """How many cases there are."""
        return len(self.layers) * len(self.tokens) * len(self.pairs())


@dataclass(eq=False)
class Row:
    """What came of one contender in one case.

    Attributes:
        name: the contender.
        ours: whether it must be right.
        reason: why it was not run, or "".
        judgement: its verdicts, if it ran.
        seconds: timed calls, one for each round.
    """

    name: str
    ours: bool
    reason: str = ""
    judgement: Judgement | None = None
    seconds: list[float] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether it ran and is wrong. The peers may round elsewhere than the specification allows."""
        if self.judgement is None:
            return False
        return bool(self.judgement.failure if self.ours else self.judgement.fault)


@dataclass(eq=False)
class Case:
    """One layer, T, routing and direction.

    Attributes:
        shape: the layer.
        tokens: T.
        routing: how the tokens were spread.
        direction: of `DIRECTIONS`.
        load: how unevenly they were spread.
        active: experts that have tokens.
        rows: the contenders.
        reference: the contender that was timed twice in each round, or "".
        again: its second times.
    """

    shape: Shape
    tokens: int
    routing: str
    direction: str
    load: Load
    active: int
    rows: list[Row]
    reference: str = ""
    again: list[float] = field(default_factory=list)

    @property
    def flops(self) -> int:
        """Of the products of one call."""
        return self.shape.flops(self.tokens, self.direction == WITH_BACKWARD)

    @property
    def bytes_moved(self) -> int:
        """The least that one call must move."""
        return self.shape.bytes_moved(self.tokens, self.active, self.direction == WITH_BACKWARD)

    def best_peer(self) -> Row | None:
        """Transformers' fastest, by the median."""
        timed = [row for row in self.rows if row.seconds and not row.ours]
        return min(timed, key=lambda row: spread(row.seconds).median, default=None)

    def control(self) -> Spread | None:
        """The reference against itself."""
        own = [row.seconds for row in self.rows if row.name == self.reference]
        return spread(ratios(own[0], self.again)) if own and self.again else None

    def ratio(self, row: Row) -> Spread | None:
        """How many times as fast as transformers' best, over the rounds."""
        best = self.best_peer()
        return None if best is None or not row.seconds else spread(ratios(best.seconds, row.seconds))


def run(settings: Settings, show: Show) -> tuple[Ceilings, list[Case]]:
    """Measures everything.

    Args:
        settings: what.
        show: called with what is being done, cases done, and cases in all.
    """
    total = settings.cases()
    cases: list[Case] = []
    show("the machine's ceilings", 0, total)
    ceilings = measure_ceilings(settings.device)
    for name in settings.layers:
        shape = sized(name, settings.scale, settings.device)

        def say(what: str, name: str = name) -> None:
            show(f"{name} {what}", len(cases), total)

        layer = random_layer(
            shape, settings.device, settings.seed, lambda i, e: say(f"drawing weights of expert {i} of {e}")
        )
        theirs = peers(layer)
        truths: dict[tuple[str, int], Truth] = {}
        for routing, direction in settings.pairs():
            for tokens in settings.tokens:
                given = batch(routing, tokens, judged_tokens(shape), shape, settings.device, settings.seed)

                def tell(what: str, where: str = f"T={tokens} {routing} {direction}") -> None:
                    say(f"{where}: {what}")

                key = routing, len(given.judged)
                if key not in truths:  # the judged tokens are the same for every T
                    tell("sampling error bars")
                    both = (routing, WITH_BACKWARD) in settings.pairs()
                    truths[key] = sample_truth(layer, given, both, settings.seed)
                contenders = our_contenders(layer, given, list(settings.names)) + theirs
                cases.append(measure_case(settings, layer, given, truths[key], routing, direction, contenders, tell))
    show("the machine's ceilings again", total, total)
    return ceilings.best_of(measure_ceilings(settings.device)), cases


def measure_case(
    settings: Settings,
    layer: BenchLayer,
    given: Batch,
    truth: Truth,
    routing: str,
    direction: str,
    contenders: list[Contender],
    tell: Callable[[str], None],
) -> Case:
    """Judges all contenders, then times those that are right, in turn."""
    tokens, backward, shape = given.x.shape[0], direction == WITH_BACKWARD, layer.shape
    rows = [Row(c.name, c.ours, c.why_not(tokens, backward)) for c in contenders]
    actions: dict[str, Callable[[], None]] = {}
    for row, contender in zip(rows, contenders, strict=True):
        if row.reason or contender.call is None:
            continue
        tell(f"judging {row.name}")
        judgement = judge_contender(contender.call, layer, given, truth, backward)
        row.reason = judgement.reason
        if not row.reason:
            row.judgement = judgement
            if not row.failed:
                actions[row.name] = _action(contender.call, given, backward)
    active = int(torch.unique(given.topk_ids).numel())
    case = Case(shape, tokens, routing, direction, load(given.topk_ids, shape), active, rows)
    if actions:
        _time(case, actions, settings, lambda: clear_gradients(layer, given), tell)
    return case


def _time(
    case: Case,
    actions: dict[str, Callable[[], None]],
    settings: Settings,
    after: Callable[[], None],
    tell: Callable[[str], None],
) -> None:
    tell("warming up")
    warm = warm_up(actions, after, settings.device)
    theirs = [row.name for row in case.rows if row.name in warm and not row.ours]
    case.reference = min(theirs or warm, key=warm.__getitem__)
    entries = actions | {case.reference + AGAIN: actions[case.reference]}
    times = time_rounds(entries, after, settings.device, settings.seconds, settings.seed, lambda n: tell(f"round {n}"))
    case.again = times.pop(case.reference + AGAIN)
    for row in case.rows:
        row.seconds = times.get(row.name, [])


def _action(call: Callable[[Batch], Tensor], given: Batch, backward: bool) -> Callable[[], None]:
    def forward() -> None:
        with torch.no_grad():
            call(given)

    def forward_backward() -> None:
        torch.autograd.backward(call(given), given.dy)

    return forward_backward if backward else forward


def known_routings() -> list[str]:
    """The kinds of routing."""
    return list(KINDS)


def default_tokens(device: str) -> tuple[int, ...]:
    """T where none is asked for."""
    return DEFAULT_TOKENS.get(torch.device(device).type, DEFAULT_TOKENS["cpu"])


def known_layers() -> list[str]:
    """The names of the layers."""
    return list(LAYERS)

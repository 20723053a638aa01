"""The benchmark: every executor and transformers' experts functions, on the same inputs, judged and then timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

import executors
from executors._cli.bench_bnb import STACK, peers_in_4_bits
from executors._cli.bench_case import FORWARD, LORA, WITH_BACKWARD, Case, Row
from executors._cli.bench_contenders import Contender, action_of, our_contenders
from executors._cli.bench_judge import clear_gradients, judge_contender
from executors._cli.bench_layers import LAYERS, MULTIPLE, BenchLayer, random_layer, sized, with_adapters
from executors._cli.bench_measure import Ceilings, measure_ceilings, time_rounds, warm_up
from executors._cli.bench_memory import add_peaks
from executors._cli.bench_nf4 import QUANT_TYPES, Quantisation, quantised
from executors._cli.bench_peers import peers
from executors._cli.bench_routing import KINDS, Batch, batch, load
from executors._cli.bench_truth import Truth, judged_tokens, sample_truth

DENSE = "dense"
WEIGHTS = (DENSE, *QUANT_TYPES)
DIRECTIONS = (FORWARD, WITH_BACKWARD)
DIRECTIONS_IN_4_BITS = (*DIRECTIONS, LORA)
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
        routings: of `KINDS`; None is "real", and dense and forward all three.
        directions: of `DIRECTIONS_IN_4_BITS`, of which dense weights have the first two.
        scale: H and I are divided by this.
        seconds: how long the rounds of one case go on.
        device: where.
        seed: of weights, inputs, samples and the order of calls.
        load: processes running on the machine before, on average over a minute.
        weights: of `WEIGHTS`.
        nested: whether the scales of 4 bits are quantised too.
        lora_rank: of the adapters.
        memory: whether peak memory is measured.
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
    weights: str = DENSE
    nested: bool = False
    lora_rank: int = 16
    memory: bool = False

    @property
    def quantisation(self) -> Quantisation | None:
        """How the weights are quantised, or None for dense ones."""
        return next((Quantisation(t, self.nested) for t in QUANT_TYPES if t == self.weights), None)

    def pairs(self) -> list[tuple[str, str]]:
        """(routing, direction) of the cases of one layer, with equal routings side by side."""
        if self.routings is not None:
            return [(routing, direction) for routing in self.routings for direction in self.directions]
        everywhere = FORWARD if self.weights == DENSE else ""
        return [(r, d) for r in KINDS for d in self.directions if d == everywhere or r == KINDS[0]]

    def cases(self) -> int:
        """How many cases there are."""
        return len(self.layers) * len(self.tokens) * len(self.pairs())


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

        def say(what: str, name: str = name) -> None:
            show(f"{name} {what}", len(cases), total)

        run_layer(settings, _make_layer(settings, name, say), cases, say)
    show("the machine's ceilings again", total, total)
    return ceilings.best_of(measure_ceilings(settings.device)), cases


def run_layer(settings: Settings, plain: BenchLayer, cases: list[Case], say: Callable[[str], None]) -> None:
    """Measures all cases of one layer, and appends them."""
    layers = dict.fromkeys(settings.directions, plain)
    if LORA in layers:
        layers[LORA] = with_adapters(plain, settings.lora_rank, settings.seed)
    theirs = {layer.form: everyone_else(layer) for layer in layers.values()}
    truths: dict[tuple[str, int, int], Truth] = {}
    first, shape = len(cases), plain.shape
    for routing, direction in settings.pairs():
        layer = layers[direction]
        for tokens in settings.tokens:
            given = batch(routing, tokens, judged_tokens(shape), shape, settings.device, settings.seed)

            def tell(what: str, where: str = f"T={tokens} {routing} {direction}") -> None:
                say(f"{where}: {what}")

            key = routing, layer.form.rank, len(given.judged)
            if key not in truths:  # the judged tokens are the same for every T
                tell("sampling error bars")
                both = any(r == routing and d != FORWARD for r, d in settings.pairs())
                truths[key] = sample_truth(layer, given, both, settings.seed)
            found = our_contenders(layer, given, list(settings.names)) + theirs[layer.form]
            cases.append(measure_case(settings, layer, given, truths[key], routing, direction, found, tell))
    if settings.memory:
        add_peaks(
            plain,
            cases[first:],
            device=settings.device,
            seed=settings.seed,
            rank=settings.lora_rank,
            tell=say,
        )


def _make_layer(settings: Settings, name: str, say: Callable[[str], None]) -> BenchLayer:
    how = settings.quantisation
    shape = sized(name, settings.scale, settings.device, how.blocksize if how else MULTIPLE)
    layer = random_layer(
        shape, settings.device, settings.seed, lambda i, e: say(f"drawing weights of expert {i} of {e}")
    )
    return layer if how is None else quantised(layer, how, lambda i, e: say(f"quantising expert {i} of {e}"))


def everyone_else(layer: BenchLayer) -> list[Contender]:
    """The peers on this layer."""
    return peers_in_4_bits(layer) if layer.weights().packed() else peers(layer)


def contenders(layer: BenchLayer, given: Batch, names: list[str]) -> list[Contender]:
    """Everyone who takes part, usable or with the reason why not."""
    return our_contenders(layer, given, names) + everyone_else(layer)


def measure_case(
    settings: Settings,
    layer: BenchLayer,
    given: Batch,
    truth: Truth,
    routing: str,
    direction: str,
    everyone: list[Contender],
    tell: Callable[[str], None],
) -> Case:
    """Judges all contenders, then times those that are right, in turn."""
    tokens, backward, shape = given.x.shape[0], direction != FORWARD, layer.shape
    rows = [Row(c.name, c.ours, c.why_not(tokens, backward)) for c in everyone]
    actions: dict[str, Callable[[], None]] = {}
    for row, contender in zip(rows, everyone, strict=True):
        if row.reason or contender.call is None:
            continue
        tell(f"judging {row.name}")
        judgement = judge_contender(contender.call, layer, given, truth, backward)
        row.reason = judgement.reason
        if not row.reason:
            row.judgement = judgement
            if not row.failed:
                actions[row.name] = action_of(contender.call, given, direction)
    active = int(torch.unique(given.topk_ids).numel())
    case = Case(shape, tokens, routing, direction, load(given.topk_ids, shape), active, rows, form=layer.form)
    case.stack = STACK if settings.quantisation else ""
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


def takes(name: str, weights: str) -> bool:
    """Whether an executor declares such weights, or cannot be had to tell: then it is shown with the reason."""
    try:
        return weights in executors.get(name).capabilities.weights
    except executors.Unavailable:
        return True


def known_routings() -> list[str]:
    """The kinds of routing."""
    return list(KINDS)


def default_tokens(device: str) -> tuple[int, ...]:
    """T where none is asked for."""
    return DEFAULT_TOKENS.get(torch.device(device).type, DEFAULT_TOKENS["cpu"])


def known_layers() -> list[str]:
    """The names of the layers."""
    return list(LAYERS)

"""Measures the two ways of decoding 4 bits, for more and more rows per expert."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from executors._bench import run as bench
from executors._bench.case import DENSE_WEIGHTS, FORWARD, LORA, BenchCase
from executors._bench.contenders import Contender, our_contenders
from executors._bench.judge import clear_gradients
from executors._bench.layers import BenchLayer, random_layer, sized, with_adapters
from executors._bench.quantised import BLOCKSIZE, Quantisation, quantised
from executors._bench.routing import Batch, batch
from executors._bench.settings import Settings
from executors._bench.truth import SampledTruth, judged_tokens, sample_truth
from executors._bench.variants import PATHS, path_name
from executors._crossover.points import DECODED, FUSED, CrossoverCurve, CrossoverPoint
from executors._triton import decode_rule
from executors._triton.device import device_of
from executors._tune.contest import agree

FORMATS = {"nf4": Quantisation("nf4"), "nf4-nested": Quantisation("nf4", nested=True)} | {
    "fp4": Quantisation("fp4"),
    "mxfp4": Quantisation("mxfp4"),
}
DEFAULT_FORMATS = ("nf4", "mxfp4", "nf4-nested")
DIRECTIONS = (FORWARD, LORA)
DIFFER = "fused and decoded differ in "
CONTENDERS = {path: path_name(path) for path in PATHS} | {"bf16": DENSE_WEIGHTS}
BOTH = (CONTENDERS[FUSED], CONTENDERS[DECODED])

Show = Callable[[str, int, int], None]
Keep = Callable[[list[CrossoverCurve], list[str], bool], None]


@dataclass(frozen=True)
class CrossoverPlan:
    """What is measured.

    Attributes:
        layers: names of layers.
        formats: of `FORMATS`.
        directions: of `DIRECTIONS`.
        rows: mean rows per expert, ascending.
        routing: how tokens are spread.
        seconds: how long the rounds of one point go on.
        rounds: of one point, at least.
        limit: seconds after which no further point is begun; None is no limit.
        scale: H and I are divided by this.
        device: where.
        seed: of weights, inputs and the order of calls.
        rank: of the adapters.
        interpreted: whether the kernels are interpreted; their times are no measurement.
    """

    layers: tuple[str, ...]
    formats: tuple[str, ...]
    directions: tuple[str, ...]
    rows: tuple[int, ...]
    routing: str
    seconds: float
    rounds: int
    limit: float | None
    scale: int
    device: str
    seed: int
    rank: int
    interpreted: bool

    @property
    def family(self) -> str:
        """The device's family, which names its rule."""
        return device_of(torch.device(self.device)).family

    @property
    def rule(self) -> decode_rule.Rule:
        """The present rule."""
        return decode_rule.RULES[self.family]

    def settings(self, weights: str) -> Settings:
        """The benchmark's settings for a format."""
        how = FORMATS[weights]
        return Settings(
            tuple(CONTENDERS.values()),
            seconds=self.seconds,
            device=self.device,
            seed=self.seed,
            weights=how.quant_type,
            nested=how.nested,
            lora_rank=self.rank,
            rounds=self.rounds,
            interpreted=self.interpreted,
            graphs=False,
        )


def run(plan: CrossoverPlan, show: Show, keep: Keep) -> tuple[list[CrossoverCurve], list[str]]:
    """Measures everything; returns the curves, and in a line each what was left out.

    Args:
        plan: what.
        show: called with what is being done, points done, and points in all.
        keep: called after each point with what there is, so that a run that is ended keeps it.
    """
    curves: list[CrossoverCurve] = []
    left_out: list[str] = []
    total = len(plan.layers) * len(plan.formats) * len(plan.directions) * len(plan.rows)
    started = time.monotonic()

    def say(what: str) -> None:
        show(what, sum(len(curve.points) for curve in curves), total)

    def in_time() -> bool:
        return plan.limit is None or time.monotonic() - started <= plan.limit

    for name in plan.layers:
        for weights in plan.formats:
            if not in_time():
                left_out.append(f"{name} in {weights}: left out, the limit of {plan.limit:g} s had passed")
                continue
            try:
                plain = _layer(plan, name, weights, say)
            except torch.OutOfMemoryError as error:
                left_out.append(f"{name} in {weights}: left out, not enough memory: {str(error).splitlines()[0]}")
                continue
            for direction in plan.directions:
                layer = with_adapters(plain, plan.rank, plan.seed) if direction == LORA else plain
                curve = CrossoverCurve(layer.shape, weights, direction, plan.rule.rows)
                curves.append(curve)
                _measure(plan, layer, curve, say, in_time, lambda: keep(curves, left_out, False))
                if not curve.complete:
                    left_out.append(f"{name} in {weights}, {direction}: ended by the limit of {plan.limit:g} s")
            del plain, layer
    keep(curves, left_out, True)
    return curves, left_out


def _layer(plan: CrossoverPlan, name: str, weights: str, say: Callable[[str], None]) -> BenchLayer:
    shape = sized(name, plan.scale, plan.device, BLOCKSIZE)
    dense = random_layer(shape, plan.device, plan.seed, lambda i, e: say(f"{name}: drawing expert {i} of {e}"))
    how = FORMATS[weights]
    return quantised(dense, how, lambda i, e: say(f"{name} in {weights}: quantising expert {i} of {e}"))


def _measure(
    plan: CrossoverPlan,
    layer: BenchLayer,
    curve: CrossoverCurve,
    say: Callable[[str], None],
    in_time: Callable[[], bool],
    keep: Callable[[], None],
) -> None:
    """Measures the points of one curve, and appends them."""
    shape, backward = layer.shape, curve.direction != FORWARD
    truths: dict[int, SampledTruth] = {}
    for rows in plan.rows:
        if not in_time():
            return
        tokens = max(1, round(rows * shape.experts / shape.top_k))
        where = f"{shape.name} in {curve.weights}, {curve.direction}, {rows} rows per expert"

        def tell(what: str, where: str = where) -> None:
            say(f"{where}: {what}")

        given = batch(plan.routing, tokens, judged_tokens(shape), shape, plan.device, plan.seed)
        if len(given.judged) not in truths:  # the judged tokens are the same for every T
            tell("sampling error bars")
            truths[len(given.judged)] = sample_truth(layer, given, backward, plan.seed)
        everyone = our_contenders(layer, given, list(CONTENDERS.values()), plan.interpreted)
        settings = plan.settings(curve.weights)

        def refused(right: list[str], ours: list[Contender] = everyone, given: Batch = given) -> dict[str, str]:
            tell("comparing both ways")
            pair = [own for own in ours if own.name in BOTH and own.name in right]
            why = difference(layer, given, pair, backward) if len(pair) == len(BOTH) else ""
            return dict.fromkeys(BOTH, why) if why else {}

        truth = truths[len(given.judged)]
        case = bench.measure_case(settings, layer, given, truth, plan.routing, curve.direction, everyone, tell, refused)
        curve.points.append(_point(case))
        keep()
    curve.complete = True


def _point(case: BenchCase) -> CrossoverPoint:
    """What the benchmark found, by the names of the ways."""
    names = {name: way for way, name in CONTENDERS.items()}
    point = CrossoverPoint(case.tokens * case.shape.top_k / case.shape.experts, case.tokens)
    point.tflop, point.size = case.flops / 1e12, case.bytes_moved
    point.reference, point.again = names.get(case.reference, ""), case.again
    for row in case.rows:
        way = names[row.name]
        if row.judgement is not None and row.judgement.max_z is not None:
            point.max_z[way] = row.judgement.max_z
        if row.failed and row.judgement is not None:
            point.failure = point.failure or f"{row.name}: {row.judgement.failure}"
        elif row.untimed.startswith(DIFFER):
            point.failure = row.untimed
        elif row.seconds:
            point.seconds[way] = row.seconds
        else:
            point.reasons[way] = row.reason or row.untimed
    return point


def difference(layer: BenchLayer, given: Batch, pair: list[Contender], backward: bool) -> str:
    """The results in which the two ways differ by more than rounding, or "". All tokens count, not only judged ones."""
    try:
        found, expected = (_results(layer, given, own, backward) for own in pair)
    except torch.OutOfMemoryError:
        return "not enough memory to compare both ways"
    wrong = [name for name in expected if not agree(found[name], expected[name])]
    return f"{DIFFER}{', '.join(wrong)}" if wrong else ""


def _results(layer: BenchLayer, given: Batch, contender: Contender, backward: bool) -> dict[str, Tensor]:
    """y, and the gradients of all leaves."""
    assert contender.call is not None
    try:
        if not backward:
            with torch.no_grad():
                return {"y": contender.call(given)}
        y = contender.call(given)
        torch.autograd.backward(y, given.dy)
        leaves = given.leaves() | layer.parameters
        return {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    finally:
        clear_gradients(layer, given)

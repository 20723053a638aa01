"""Measures expert parallelism: what each rank does, and what their parent hears."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.distributed as dist

from executors._bench.case import FORWARD, BenchCase
from executors._bench.ranks.contenders import OVERLAP, our_contenders, their_contenders
from executors._bench.ranks.measure import measure_case
from executors._bench.ranks.parts import Part, part_of
from executors._bench.ranks.processes import Tell, run_ranks
from executors._bench.routing import batch
from executors._bench.run import make_layer
from executors._bench.settings import Settings
from executors._bench.truth import SampledTruth, judged_tokens, sample_truth


class Step(NamedTuple):
    """What is being done."""

    text: str


def run(settings: Settings, ranks: int, show: Callable[[str], None], keep: Callable[[BenchCase], None]) -> None:
    """Measures everything, in processes of its own.

    Args:
        settings: what.
        ranks: W.
        show: called with what is being done.
        keep: called with each case.

    Raises:
        RankFailed: a rank did.
    """

    def hear(said: Step | BenchCase) -> None:
        if isinstance(said, Step):
            show(said.text)
        else:
            keep(said)

    run_ranks(measure, ranks, settings, hear=hear)


def measure(tell: Tell, settings: Settings) -> None:
    """Measures all layers, on this rank; the first one tells."""
    first = dist.get_rank() == 0
    for name in settings.layers:

        def say(what: str, name: str = name) -> None:
            if first:
                tell(Step(f"{name} {what}"))

        part = part_of(make_layer(settings, name, say))
        _measure_layer(settings, part, say, tell)


def _measure_layer(settings: Settings, part: Part, say: Callable[[str], None], tell: Tell) -> None:
    shape, everyone = part.shape, None
    truths: dict[tuple[str, int], SampledTruth] = {}
    for routing, direction in settings.pairs():
        for tokens in settings.tokens:
            given = batch(routing, tokens, judged_tokens(shape), shape, settings.device, settings.seed)

            def tell_step(what: str, where: str = f"T={tokens} {routing} {direction}") -> None:
                say(f"{where}: {what}")

            key = routing, len(given.judged)
            if part.whole is not None and key not in truths:
                tell_step("sampling error bars")
                both = any(way != FORWARD for _, way in settings.pairs())
                truths[key] = sample_truth(part.whole, given, both, settings.seed)
            if everyone is None:
                everyone = their_contenders(part) + our_contenders(part, list(settings.names), given)
            able = [each for each in everyone if direction == FORWARD or each.how != OVERLAP]
            case = measure_case(settings, part, given, truths.get(key), routing, direction, able, tell_step)
            if part.whole is not None:
                tell(case)

"""The benchmark: every executor and transformers' experts functions, on the same inputs, judged and then timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby

import torch

from executors._bench.case import FORWARD, LORA, BenchCase, BenchRow
from executors._bench.ceilings import Ceilings, measure_ceilings
from executors._bench.contenders import Contender, action_of, our_contenders
from executors._bench.cuda import launches
from executors._bench.everyone import contenders, everyone_else
from executors._bench.judge import clear_gradients, judge_contender
from executors._bench.layers import MULTIPLE, BenchLayer, random_layer, sized, with_adapters
from executors._bench.memory import add_peaks
from executors._bench.peers.bitsandbytes import STACK
from executors._bench.quantised import quantised
from executors._bench.routing import Batch, batch, load
from executors._bench.settings import Settings
from executors._bench.timing import Timing, time_case
from executors._bench.truth import SampledTruth, judged_tokens, sample_truth

Show = Callable[[str, int, int], None]
Keep = Callable[["Findings"], None]


@dataclass(eq=False)
class Findings:
    """What was measured.

    Attributes:
        ceilings: the machine's.
        cases: one for each layer, T, routing and direction.
        left_out: in a line each, layers and cases that were not measured, with the reason.
        complete: whether nothing more will come.
    """

    ceilings: Ceilings
    cases: list[BenchCase] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    complete: bool = False


def run(settings: Settings, show: Show, keep: Keep) -> Findings:
    """Measures everything.

    Args:
        settings: what.
        show: called with what is being done, cases done, and cases in all.
        keep: called with what there is after each layer and case, so that a run that is ended keeps it.
    """
    total = settings.cases()
    started = time.monotonic()
    show("the machine's ceilings", 0, total)
    found = Findings(measure_ceilings(settings.device))
    for name in settings.layers:

        def say(what: str, name: str = name) -> None:
            show(f"{name} {what}", len(found.cases), total)

        def in_time(name: str = name) -> bool:
            late = settings.limit is not None and time.monotonic() - started > settings.limit
            line = f"{name}: cases left out, the limit of {settings.limit:g} s had passed" if late else ""
            if late and line not in found.left_out:
                found.left_out.append(line)
            return not late

        if not in_time():
            continue
        try:
            layer = make_layer(settings, name, say)
        except torch.OutOfMemoryError as error:
            found.left_out.append(f"{name}: left out, not enough memory: {str(error).splitlines()[0]}")
            continue
        run_layer(settings, layer, found.cases, say, in_time, lambda: keep(found))
        del layer
    show("the machine's ceilings again", total, total)
    found.ceilings = found.ceilings.best_of(measure_ceilings(settings.device))
    if settings.gpu:
        _add_launches(settings, found, show)
    found.complete = True
    return found


def _add_launches(settings: Settings, found: Findings, show: Show) -> None:
    """Counts the kernels of every call that was timed. It comes last: a profiler slows what runs after it."""
    for name, of_layer in groupby(found.cases, lambda case: case.shape.name):
        plain = make_layer(settings, name, lambda _: None)
        for case in of_layer:
            show(f"{name} T={case.tokens} {case.direction}: launches", len(found.cases), len(found.cases))
            adapted = case.direction == LORA
            layer = with_adapters(plain, settings.lora_rank, settings.seed) if adapted else plain
            given = batch(
                case.routing, case.tokens, judged_tokens(plain.shape), plain.shape, settings.device, settings.seed
            )
            calls = {c.name: c.call for c in contenders(layer, given, list(settings.names), settings.without)}
            for row in case.rows:
                call = calls[row.name]
                if row.seconds and call is not None:
                    row.launches = launches(action_of(call, given, case.direction), settings.device)
                    clear_gradients(layer, given)


def run_layer(
    settings: Settings,
    plain: BenchLayer,
    cases: list[BenchCase],
    say: Callable[[str], None],
    in_time: Callable[[], bool],
    keep: Callable[[], None],
) -> None:
    """Measures all cases of one layer, and appends them to ``cases``."""
    layers = dict.fromkeys(settings.directions, plain)
    if LORA in layers:
        layers[LORA] = with_adapters(plain, settings.lora_rank, settings.seed)
    theirs = {layer.storage: everyone_else(layer, settings.without) for layer in layers.values()}
    for contender in (c for found in theirs.values() for c in found):
        if contender.prepare is not None:
            say(f"preparing {contender.name}")
            contender.prepare()
    truths: dict[tuple[str, int, int], SampledTruth] = {}
    first, shape = len(cases), plain.shape
    for routing, direction in settings.pairs():
        layer = layers[direction]
        for tokens in settings.tokens:
            if not in_time():
                continue
            given = batch(routing, tokens, judged_tokens(shape), shape, settings.device, settings.seed)

            def tell(what: str, where: str = f"T={tokens} {routing} {direction}") -> None:
                say(f"{where}: {what}")

            key = routing, layer.storage.rank, len(given.judged)
            if key not in truths:  # the judged tokens are the same for every T
                tell("sampling error bars")
                both = any(r == routing and d != FORWARD for r, d in settings.pairs())
                truths[key] = sample_truth(layer, given, both, settings.seed)
            ours = our_contenders(layer, given, list(settings.names), settings.interpreted)
            found = ours + theirs[layer.storage]
            cases.append(measure_case(settings, layer, given, truths[key], routing, direction, found, tell))
            keep()
    if settings.memory and not settings.gpu:  # on a GPU it is measured beside the times
        device, seed, rank = settings.device, settings.seed, settings.lora_rank
        add_peaks(plain, cases[first:], device=device, seed=seed, rank=rank, tell=say)


def make_layer(settings: Settings, name: str, say: Callable[[str], None]) -> BenchLayer:
    """The layer of that name with weights as the settings want them; ``say`` is told how far it is."""
    how = settings.quantisation
    shape = sized(name, settings.scale, settings.device, how.blocksize if how else MULTIPLE)
    layer = random_layer(shape, settings.device, settings.seed, lambda i, e: say(f"drawing expert {i} of {e}"))
    return layer if how is None else quantised(layer, how, lambda i, e: say(f"quantising expert {i} of {e}"))


def measure_case(
    settings: Settings,
    layer: BenchLayer,
    given: Batch,
    truth: SampledTruth,
    routing: str,
    direction: str,
    everyone: list[Contender],
    tell: Callable[[str], None],
    refused: Callable[[list[str]], dict[str, str]] = lambda names: {},
) -> BenchCase:
    """Judges all contenders, then times those that are right, in turn.

    ``refused`` is called with the names of those that are right. It returns the names of those that must not be timed,
    each with the reason.
    """
    rows, actions = _judge_all(layer, given, truth, direction, everyone, tell)
    for name, why in refused(list(actions)).items():
        actions.pop(name)
        next(row for row in rows if row.name == name).untimed = why
    case = BenchCase(
        layer.shape,
        given.x.shape[0],
        routing,
        direction,
        load(given.topk_ids, layer.shape),
        int(torch.unique(given.topk_ids).numel()),
        rows,
        storage=layer.storage,
        stack=STACK if settings.quantisation else "",
        gpu=settings.gpu,
    )

    def after() -> None:
        clear_gradients(layer, given)
        for contender in everyone:
            if contender.settle is not None:
                contender.settle()

    if actions:
        timing = Timing(
            settings.device, settings.seconds, settings.rounds, settings.seed, settings.memory, settings.graphs
        )
        time_case(case, actions, timing, after, tell)
    return case


def _judge_all(
    layer: BenchLayer,
    given: Batch,
    truth: SampledTruth,
    direction: str,
    everyone: list[Contender],
    tell: Callable[[str], None],
) -> tuple[list[BenchRow], dict[str, Callable[[], None]]]:
    """A row for each contender, and the calls of those that are right."""
    tokens, backward = given.x.shape[0], direction != FORWARD
    rows, actions = [], {}
    for contender in everyone:
        name, call = contender.name, contender.call
        row = BenchRow(name, contender.ours, contender.why_not(tokens, backward), interpreted=contender.interpreted)
        rows.append(row)
        if row.reason or call is None:
            continue
        tell(f"judging {name}")
        judgement = judge_contender(call, layer, given, truth, backward)
        row.reason = judgement.reason
        if not row.reason:
            row.judgement = judgement
            if not row.failed:
                actions[name] = action_of(call, given, direction)
    return rows, actions

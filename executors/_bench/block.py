"""A whole MoE block of a transformers model: router, experts, and what stands beside them, with random weights."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from executors import hf
from executors._bench.case import FORWARD
from executors._bench.measure import Spread, ratios, spread, time_rounds, warm_up
from executors.hf.explain import meta_model
from moe_ref.conformance.judgement.faults import RAISED

THEIRS = ("eager", "grouped_mm", "batched_mm")
JUDGED = 8  # tokens, from the first to the last
WORSE = 3.0  # times the error of the family's own eager path, at most
SCALE = 0.02  # of random weights, but for the experts'
REACH = 3.0  # of the experts' preactivations, so that some pass a clamp
SLOWEST_S = 20.0  # of a call that is timed

Tell = Callable[[str], None]


class NoBlock(ValueError):
    """The model has no block that can be timed; the message says why, in one line."""


@dataclass(frozen=True, eq=False)
class Block:
    """A block with weights.

    Attributes:
        kind: its class.
        module: the block.
        experts: its experts module.
        layer: what its experts compute, and their sizes.
    """

    kind: str
    module: nn.Module
    experts: Any
    layer: str

    @property
    def hidden(self) -> int:
        """H of the block's input."""
        return int(getattr(self.experts.config, "hidden_size", 0)) or hf.weights_of(self.experts).hidden_size

    @contextmanager
    def on(self, implementation: str) -> Iterator[None]:
        """Runs the experts by one of transformers' names."""
        config = self.experts.config
        before, config._experts_implementation = config._experts_implementation, implementation
        try:
            yield
        finally:
            config._experts_implementation = before


@dataclass(eq=False)
class BlockRow:
    """What came of one way to run the experts.

    Attributes:
        name: "hf:NAME" of transformers' own, or the name of an executor.
        ours: whether it is an executor.
        reason: why it was not timed, or "".
        error: the largest of the experts' output and gradients; 2-norms, each relative to the exact one.
        failed: whether one of them is too much.
        seconds: timed calls of the block, one for each round.
    """

    name: str
    ours: bool
    reason: str = ""
    error: float | None = None
    failed: bool = False
    seconds: list[float] = field(default_factory=list)


def make_block(model: str, changes: dict[str, Any], device: str, dtype: torch.dtype, seed: int) -> Block:
    """The first MoE block of a model, with random weights.

    Args:
        model: a folder with a config.json, or a model class of transformers.
        changes: of the configuration, such as {"num_local_experts": 8}; a nested text configuration gets them too.
        device: where.
        dtype: of all floating parameters.
        seed: of the weights.

    Raises:
        NoBlock: there is none that transformers dispatches.
        ValueError: no such model, or one of ``changes`` is no field of its configuration.
    """
    whole = meta_model(model, changes)
    names = [name for name, module in whole.named_modules() if hf.is_experts(module)]
    if not names:
        raise NoBlock(f"model={model}: must have experts that transformers dispatches")
    module = whole.get_submodule(names[0].rpartition(".")[0])
    experts = whole.get_submodule(names[0])
    module.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(0, SCALE, generator=generator)
            else:
                tensor.zero_()
        weights = hf.weights_of(experts)
        weights.gate_up_proj.normal_(0, REACH * weights.hidden_size**-0.5, generator=generator)
        weights.down_proj.normal_(0, weights.intermediate_size**-0.5, generator=generator)
    module.to(dtype).train(False)
    sizes = f"E={weights.num_experts} H={weights.hidden_size} I={weights.intermediate_size}"
    return Block(type(module).__name__, module, experts, f"{type(experts).__name__} {sizes}")


def measure_block(
    block: Block, tokens: int, direction: str, names: list[str], seconds: float, seed: int, tell: Tell
) -> list[BlockRow]:
    """Judges every way to run the experts on a few tokens, then times the block with each that is right, in turn.

    Args:
        block: the block.
        tokens: T.
        direction: "forward" or "forward_backward".
        names: of executors.
        seconds: how long the rounds go on.
        seed: of the input, and of the order of calls.
        tell: called with what is being done.
    """
    own = next(block.module.parameters())
    generator = torch.Generator(own.device).manual_seed(seed)
    x = torch.randn(1, tokens, block.hidden, generator=generator, device=own.device).to(own.dtype)
    judge = Judge(block, x)
    rows = [BlockRow(f"hf:{name}", False) for name in THEIRS] + [BlockRow(name, True) for name in names]
    actions: dict[str, Callable[[], None]] = {}
    for row in rows:
        tell(f"T={tokens} {direction}: judging {row.name}")
        try:
            implementation = hf.register(row.name)[0] if row.ours else row.name.removeprefix("hf:")
            errors = judge.errors(implementation)
        except RAISED as error:
            row.reason = " ".join(str(error).split())
            continue
        row.error, row.failed = max_or_nan(errors), row.ours and not judge.is_right(errors)
        if not row.failed:
            actions[row.name] = functools.partial(_run, block, implementation, x, direction)

    def after() -> None:
        block.module.zero_grad(set_to_none=True)

    tell(f"T={tokens} {direction}: warming up")
    for row in rows:
        if row.name in actions:
            row.reason = _why_untimed(actions[row.name], after, own.device.type)
            if row.reason:
                del actions[row.name]
    times = time_rounds(actions, after, own.device.type, seconds, seed, lambda n: tell(f"T={tokens}: round {n}"))
    for row in rows:
        row.seconds = times.get(row.name, [])
    return rows


def ratio(row: BlockRow, rows: list[BlockRow]) -> Spread | None:
    """How many times as fast as the fastest of transformers' own, over the rounds."""
    theirs = [peer for peer in rows if peer.seconds and not peer.ours]
    best = min(theirs, key=lambda peer: spread(peer.seconds).median, default=None)
    return spread(ratios(best.seconds, row.seconds)) if best is not None and row.seconds else None


def experts_inputs(block: Block, x: Tensor) -> tuple[Tensor, ...]:
    """What the block gives to its experts: x, ids, weights.

    Raises:
        NoBlock: the block cannot be called with hidden states alone, or its configuration makes no sense.
    """
    seen: list[tuple[Any, ...]] = []
    hook = block.experts.register_forward_pre_hook(lambda _module, args: seen.append(args))
    try:
        with torch.no_grad(), block.on("eager"):
            block.module(x)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise NoBlock(f"{block.kind}, {block.layer}: must run on hidden states alone: {said}") from error
    finally:
        hook.remove()
    return seen[0][:3]


def _why_untimed(action: Callable[[], None], after: Callable[[], None], device: str) -> str:
    """Why a call is not timed, or "": batched_mm copies every slot's matrices, which memory may not hold."""
    try:
        took = warm_up({"": action}, after, device)[""]
    except RuntimeError as error:
        return " ".join(str(error).splitlines()[0].split())
    return f"a call took {took:.1f} s" if took > SLOWEST_S else ""


class Judge:
    """Compares ways to run a block's experts with a copy of them in a wider dtype, on the block's own inputs.

    A way runs on all tokens, as it will be timed. dy is 0 but for `JUDGED` of them, so that these alone make the
    gradients of the parameters, and the copy runs on them alone.

    Args:
        block: the block.
        x: [1, T, H] its input.

    Raises:
        NoBlock: as `experts_inputs`.
    """

    def __init__(self, block: Block, x: Tensor) -> None:
        self._block, self._given = block, experts_inputs(block, x)
        tokens = self._given[0]
        self._where = torch.linspace(0, len(tokens) - 1, min(JUDGED, len(tokens)), device=x.device).round().long()
        self._dy = torch.randn_like(tokens[self._where])
        wide = torch.float64 if x.dtype == torch.float32 else torch.float32
        self._exact = self._of_copy(wide)
        unit = torch.finfo(x.dtype).eps / 4
        self._limits = [WORSE * max(unit, error) for error in self.errors("eager")]

    def errors(self, implementation: str) -> list[float]:
        """Of the output, and of the gradients of x, of the weights of slots, and of each parameter."""
        x, ids, weights = self._given
        leaves = [x.detach().requires_grad_(), weights.detach().requires_grad_()]
        with self._block.on(implementation):
            y = self._block.experts(leaves[0], ids, leaves[1])
        dy = torch.zeros_like(y).index_copy(0, self._where, self._dy.to(y.dtype))
        dx, d_weights, *others = torch.autograd.grad(y, [*leaves, *self._block.experts.parameters()], dy)
        found = [y.detach()[self._where], dx[self._where], d_weights[self._where], *others]
        return [_distance(actual, exact) for actual, exact in zip(found, self._exact, strict=True)]

    def is_right(self, errors: list[float]) -> bool:
        """Whether none is larger than eager's own allows; a NaN is."""
        return all(error <= limit for error, limit in zip(errors, self._limits, strict=True))

    def _of_copy(self, wide: torch.dtype) -> list[Tensor]:
        experts = copy.deepcopy(self._block.experts).to(wide)
        experts.config._experts_implementation = "eager"  # the copy has a configuration of its own
        x, ids, weights = (value[self._where] for value in self._given)
        leaves = [value.detach().to(wide).requires_grad_() for value in (x, weights)]
        y = experts(leaves[0], ids, leaves[1])
        gradients = torch.autograd.grad(y, [*leaves, *experts.parameters()], self._dy.to(y.dtype))
        return [y.detach(), *gradients]


def _distance(actual: Tensor, exact: Tensor) -> float:
    """The 2-norm of the difference, relative."""
    return float((actual.to(exact.dtype) - exact).norm() / exact.norm().clamp(min=torch.finfo(exact.dtype).tiny))


def max_or_nan(errors: list[float]) -> float:
    """The largest; NaN if one is."""
    return float(torch.tensor(errors, dtype=torch.float64).max())


def _run(block: Block, implementation: str, x: Tensor, direction: str) -> None:
    with block.on(implementation):
        if direction == FORWARD:
            with torch.no_grad():
                block.module(x)
            return
        leaf = x.detach().requires_grad_()
        y = block.module(leaf)
        y = y[0] if isinstance(y, tuple) else y
        y.backward(torch.ones_like(y))

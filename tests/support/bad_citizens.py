"""Executors with right numbers and bad manners: one for each behaviour of the suite's group ``citizen``."""

import multiprocessing
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from executors import Executor
from moe_ref import MoEWeights
from moe_ref.conformance.wrapped import SlotChange, Wrapped, experts
from moe_ref.types import Routing

BAD: dict[str, Callable[[Executor], Executor]] = {}  # by the behaviour that it lacks


def lacks(behaviour: str) -> Callable[[SlotChange], SlotChange]:
    """Adds a wrong executor that changes calls with routing done elsewhere."""

    def add(change: SlotChange) -> SlotChange:
        BAD[behaviour] = lambda inner: Wrapped(change.__name__, inner, slots=change)
        return change

    return add


class OnTheWayBack(Function):
    """The identity, whose gradient is what a function makes of it and of tensors that it saves."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, change: Callable[..., Tensor], *kept: Tensor) -> Tensor:
        ctx.change = change
        ctx.save_for_backward(*kept)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return ctx.change(ctx, gradient), None, *(None for _ in ctx.needs_input_grad[2:])


class Alias(Function):
    """The same memory with a version counter of its own."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.data

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


@lacks("change_in_place")
def unversioned(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    return experts(inner, Alias.apply(x), ids, w, weights.map(Alias.apply))


@lacks("retain_graph")
def spent(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    times = [0]

    def less_each_time(ctx: Any, gradient: Tensor) -> Tensor:
        times[0] += 1
        return gradient / times[0]

    return OnTheWayBack.apply(experts(inner, x, ids, w, weights), less_each_time)


class Closed(Function):
    """A call whose parameters get their gradients by hand: autograd knows nothing of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights, inner: Executor) -> Tensor:
        ctx.given = inner, x.detach().requires_grad_(), ids, w, weights
        return experts(inner, x, ids, w, weights)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        inner, x, ids, w, weights = ctx.given
        with torch.enable_grad():
            y = experts(inner, x, ids, w, weights)
        mine = {n: p for n, p in weights.parameters().items() if p.requires_grad and n != "expert_scale"}
        dx, *others = torch.autograd.grad(y, [x, *mine.values()], dy)
        for parameter, gradient in zip(mine.values(), others, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return dx, None, None, None, None


@lacks("tensor_hooks")
def gradients_added_by_hand(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    return Closed.apply(x, ids, w, weights, inner)


@lacks("optimizer_in_backward")
def reads_weights_after_their_step(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    first = experts(inner, x, ids, w, weights.map(lambda value: value.data))
    second = experts(inner, x.detach(), ids, w.detach(), weights)  # made later, so differentiated first
    return first + (second - second.detach())


@lacks("save_on_cpu")
def knows_what_it_saved(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    def change(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (ctx.saved_tensors[0] is x)

    return OnTheWayBack.apply(experts(inner, x, ids, w, weights), change, x)


@lacks("saved_tensors_hooks")
def remembers_strides(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    size, stride = x.shape, x.stride()

    def change(ctx: Any, gradient: Tensor) -> Tensor:
        (saved,) = ctx.saved_tensors
        return gradient + (saved.as_strided(size, stride) - saved)

    return OnTheWayBack.apply(experts(inner, x, ids, w, weights), change, x)


@lacks("checkpoints")
def reads_what_it_saved_twice(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    def change(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient + (ctx.saved_tensors[0] - ctx.saved_tensors[0])

    return OnTheWayBack.apply(experts(inner, x, ids, w, weights), change, x)


@lacks("grad_mode")
def records_under_no_grad(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    with torch.enable_grad():
        return experts(inner, x, ids, w, weights)


@lacks("inference_weights")
def asks_for_versions(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    assert weights.down_proj._version >= 0
    return experts(inner, x, ids, w, weights)


@lacks("deterministic_algorithms")
def puts_by_index(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    y = experts(inner, x, ids, w, weights)
    own = torch.zeros_like(y).put_(torch.arange(y.numel(), device=y.device), y.detach())
    return y + (own - y.detach())


@lacks("default_dtype")
def sums_in_the_default_dtype(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    return torch.zeros(x.shape, device=x.device) + experts(inner, x, ids, w, weights)


@lacks("default_device")
def sums_on_the_default_device(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    return torch.zeros(x.shape, dtype=x.dtype) + experts(inner, x, ids, w, weights)


@lacks("autocast")
def follows_autocast(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    same = torch.nn.functional.linear(x, torch.eye(x.shape[1], dtype=x.dtype))
    return experts(inner, same.to(x.dtype), ids, w, weights)


WORKSPACE: dict[str, Tensor] = {}


@lacks("threads")
def one_workspace(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    WORKSPACE["x"] = x.detach().clone()
    time.sleep(1e-3)
    return experts(inner, x + (WORKSPACE["x"] - x).detach(), ids, w, weights)


POOL = ThreadPoolExecutor(1)


@lacks("fork")
def threads_that_a_fork_lacks(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    POOL.submit(time.time).result()
    return experts(inner, x, ids, w, weights)


@lacks("data_loader")
def processes_of_its_own(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    assert not multiprocessing.current_process().daemon, "daemonic processes are not allowed to have children"
    return experts(inner, x, ids, w, weights)


@dataclass(frozen=True)
class Locked(Wrapped):
    lock: Any = field(default_factory=threading.Lock)


BAD["copies"] = lambda inner: Locked("locked", inner)
BUFFERS: dict[torch.Size, Tensor] = {}


@lacks("micro_batches")
def gradient_in_a_buffer(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    def change(ctx: Any, gradient: Tensor) -> Tensor:
        buffer = BUFFERS.setdefault(gradient.shape, torch.empty_like(gradient))
        return buffer.copy_(gradient).view_as(buffer)

    return experts(inner, OnTheWayBack.apply(x, change), ids, w, weights)


@lacks("frozen")
def trains_all_or_nothing(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    frozen = not weights.down_proj.requires_grad
    return experts(inner, x.detach() if frozen else x, ids, w, weights)


@lacks("upstream_gradient")
def takes_upstream_as_contiguous(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    def change(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.as_strided(gradient.shape, (gradient.shape[1], 1))

    return OnTheWayBack.apply(experts(inner, x, ids, w, weights), change)


@lacks("views")
def takes_weights_as_contiguous(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    down = weights.down_proj
    _, rows, columns = down.shape
    read = down.detach().as_strided(down.shape, (rows * columns, columns, 1))
    return experts(inner, x, ids, w, replace(weights, down_proj=down + (read - down).detach()))


@lacks("no_tokens")
def nothing_is_made_anew(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    return experts(inner, x, ids, w, weights) if x.shape[0] else torch.zeros_like(x)


@lacks("toggled")
def asks_again_in_backward(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    before = x.requires_grad
    return OnTheWayBack.apply(experts(inner, x, ids, w, weights), lambda _, g: g * (x.requires_grad == before))


PREPARED: dict[Any, Tensor] = {}


@lacks("functional_call")
def weights_of_the_first_call(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    first = PREPARED.setdefault(weights.config, weights.down_proj.detach().clone())
    return experts(inner, x, ids, w, replace(weights, down_proj=first))


@lacks("local_experts")
def knows_all_experts(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    if (weights.config.top_k or 1) > weights.num_experts:
        raise ValueError(f"top_k={weights.config.top_k}: must be at most {weights.num_experts}")
    return experts(inner, x, ids, w, weights)


@lacks("forward_mode")
def drops_tangents(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    plain = weights.map(lambda value: forward_ad.unpack_dual(value).primal)
    x, w = (forward_ad.unpack_dual(value).primal for value in (x, w))
    return experts(inner, x, ids, w, plain)


@lacks("padding")
def reads_padding(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    return experts(inner, x, ids, w, weights) + 0 * x


@lacks("other_device")
def fetches_what_is_elsewhere(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    return experts(inner, x, ids, w, weights.map(lambda value: torch.empty_like(value, device=x.device)))


class Narrow(Wrapped):
    def route(self, router_logits: Tensor, weights: MoEWeights) -> Routing:
        routing = self.inner.route(router_logits, weights)
        return Routing(routing.topk_ids.int(), routing.topk_weights)


BAD["ids_of_route"] = lambda inner: Narrow("narrow", inner)

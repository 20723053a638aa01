"""What ranks of a cluster do out of step, or in odd ways, with expert parallelism."""

from __future__ import annotations

import copy
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from executors import parallel
from executors.native import Native
from executors.parallel import ExpertParallel, agreement, waiting
from moe_ref.conformance.problems.problem import Problem
from moe_ref.types import MoEConfig
from parallel_calls import PROBLEM, layer, own_rows

FEW = replace(PROBLEM, post_expert_norm=True)  # 5 experts: the last of 4 ranks has none


def said_by(call: Callable[[], Any]) -> str:
    """The error of a call, in one line; "" if there is none."""
    try:
        call()
    except (RuntimeError, ValueError, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


@dataclass(frozen=True)
class Interrupted(Native):
    """``native``, which is interrupted on one rank of all."""

    name: ClassVar[str] = "interrupted"
    rank: int = -1

    def experts(self, x: Tensor, **arguments: Any) -> Tensor:
        if dist.get_rank() == self.rank:
            raise KeyboardInterrupt
        return super().experts(x, **arguments)


def gradients(group: Any, problem: Problem, checkpoints: bool, dispatch: str = "all_to_all") -> dict[str, Any]:
    """Bytes of all gradients of two layers in a row, maybe in checkpoints."""
    inputs = layer(problem)
    part, _ = parallel.shard(inputs.weights, group)
    executor = ExpertParallel("native", group, dispatch, timeout=5.0)  # type: ignore[arg-type]
    y, logits = inputs.x, inputs.router_logits
    if dispatch == "all_to_all":
        y, logits = own_rows(group, y), own_rows(group, logits)  # type: ignore[arg-type]
    for _ in range(2):
        call = partial(executor, weights=part)
        y = checkpoint(call, y, logits, use_reentrant=False) if checkpoints else call(y, logits)
    y.square().sum().backward()
    return {name: leaf.grad.numpy().tobytes() for name, leaf in inputs.tensors().items() if leaf.grad is not None}


def absent_gradients(group: Any) -> list[str]:
    """Names of leaves without a gradient."""
    inputs = layer(FEW)
    part, _ = parallel.shard(inputs.weights, group)
    ExpertParallel("native", group)(inputs.x, inputs.router_logits, part).sum().backward()  # type: ignore[arg-type]
    return [name for name, leaf in inputs.tensors().items() if leaf.requires_grad and leaf.grad is None]


def copied(group: Any) -> bool:
    """Whether a copy of what holds an executor has the same."""
    executor = ExpertParallel("native", group)
    return copy.deepcopy([executor])[0] is executor


def of_integers(group: Any) -> bool:
    """Whether a configuration that is written with integers is the same."""
    alpha = 2 if dist.get_rank(group) else 2.0
    inputs = layer(replace(PROBLEM, config=MoEConfig(2, alpha=alpha)))
    part, _ = parallel.shard(inputs.weights, group)
    return bool(ExpertParallel("native", group, timeout=5.0)(inputs.x, inputs.router_logits, part).isfinite().all())  # type: ignore[arg-type]


def of_other_options(group: Any) -> list[str]:
    """What a rank says whose executor has another option, and that the next call is right all the same."""
    inputs = layer()
    part, _ = parallel.shard(inputs.weights, group)
    last = dist.get_rank(group) == 1
    others = {"dispatch": "all_reduce"}, {"returns": "rank"}
    said = []
    for other in others:
        odd = ExpertParallel("native", group, timeout=5.0, **(other if last else {}))  # type: ignore[arg-type]
        said.append(said_by(lambda odd=odd: odd(inputs.x, inputs.router_logits, part)))  # type: ignore[misc]
    ExpertParallel("native", group, timeout=5.0)(inputs.x, inputs.router_logits, part).sum().backward()  # type: ignore[arg-type]
    return said


def replicated_gradient(group: Any) -> bool:
    """Whether replicated DTensors have the whole layer's gradient."""
    inputs = layer()
    whole = inputs.weights.map(lambda value: value.detach().requires_grad_())
    Native()(inputs.x, inputs.router_logits, whole).sum().backward()  # type: ignore[arg-type]
    mesh = DeviceMesh.from_group(group, "cpu")
    placed = inputs.weights.map(
        lambda value: distribute_tensor(value.detach(), mesh, [Replicate()]).requires_grad_()  # type: ignore[no-untyped-call]
    )
    executor = ExpertParallel("native", group, "all_reduce", timeout=5.0)
    executor(inputs.x, inputs.router_logits, placed).sum().backward()  # type: ignore[arg-type]
    found, expected = placed.gate_up_proj.grad.full_tensor(), whole.gate_up_proj.grad
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


class Waits(TorchFunctionMode):
    """Sees what makes a host wait for a GPU."""

    KINDS = ("tolist", "item", "numpy", "cpu", "nonzero", "bincount", "unique", "masked_select", "equal", "__bool__")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.KINDS:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Watched(ExpertParallel):
    """Whose planning is watched."""

    waits: ClassVar[Waits]

    def _transport(self, *given: Any) -> Any:
        with self.waits:
            transport = super()._transport(*given)
            transport.back(transport.out(torch.ones(transport.shape[0], 16))())()
        return transport


def waits(group: Any, dispatch: str, returns: str, max_slots: int | None, on_host: bool) -> list[str]:
    """What a call's host waits for outside of the experts; not on the host, collectives are waited for by the GPU."""
    inputs = layer()
    part, _ = parallel.shard(inputs.weights, group)
    Watched.waits = Waits()
    watched = Watched("native", group, dispatch, returns, max_slots=max_slots)  # type: ignore[arg-type]
    patched = patch.object(waiting, "on_host", lambda _own: on_host)
    with patched, patch.object(agreement, "on_host", lambda _own: on_host):
        watched(inputs.x, inputs.router_logits, part)  # type: ignore[arg-type]
    return Watched.waits.found


def of_wrong_part(group: Any) -> str:
    """What ranks say if one of them gives `gather` a part of other size."""
    weights = layer().weights
    part, _ = parallel.shard(weights, group)
    return said_by(lambda: parallel.gather(weights if dist.get_rank(group) else part, group, num_experts=5))


def odd_ids(group: Any, dispatch: str, returns: str) -> bool:
    """Whether int32 ids that occur twice, are none, or lie apart, and rows of no expert, are as on one device."""
    inputs = layer(replace(PROBLEM, entry="experts"))
    part, _ = parallel.shard(inputs.weights, group)
    ids = torch.tensor([[0, 0, 1, 7], [4, 4, 4, 4], [-1, 99, -5, 2**31 - 1], [2, 1, 2, 1], [3, -1, 3, 0], [1, 2, 3, 4]])
    ids = ids.int().t().contiguous().t().unflatten(0, (2, 3))
    outside = (ids < 0) | (ids >= PROBLEM.experts)
    slot_weights = torch.linspace(0.1, 0.9, 24).view(2, 3, 4).masked_fill(outside, torch.nan)
    x = torch.linspace(-1, 1, 192).view(2, 3, 32)[..., ::2].clone()
    x[0, 2] = torch.nan  # all of its slots are empty
    executors_ = Native(), ExpertParallel("native", group, dispatch, returns, PROBLEM.experts)  # type: ignore[arg-type]
    found = []
    warn_always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for executor, weights in zip(executors_, (inputs.weights, part), strict=True):
            given = x.clone().requires_grad_(), slot_weights.clone().requires_grad_()
            y = executor.experts(given[0], topk_ids=ids, topk_weights=given[1], weights=weights)
            y.backward(torch.ones(()).expand(y.shape))
            found.append([y, given[0].grad, given[1].grad])
    torch.set_warn_always(warn_always)
    return all(torch.allclose(one, other, 1e-4, 1e-5, equal_nan=True) for one, other in zip(*found, strict=True))


# --- out of step


def in_two_rows(_group: Any) -> list[str]:
    """On a mesh of 2 x 2: rank 1 is interrupted, and what the other row says, which waits a while."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))["ep"]
    inputs = layer()
    part, _ = parallel.shard(inputs.weights, mesh)
    executor = ExpertParallel(Interrupted(rank=1), mesh, timeout=20.0)
    if dist.get_rank() == 3:
        time.sleep(1.5)
    call = partial(executor, inputs.x, inputs.router_logits, part)  # type: ignore[arg-type]
    other = partial(ExpertParallel("native", mesh, timeout=20.0), inputs.x, inputs.router_logits, part)  # type: ignore[arg-type]
    return [said_by(call), said_by(other)]


def in_other_order(group: Any) -> list[str]:
    """Backward passes of two calls, in another order on rank 1; then one that rank 1 leaves out."""
    inputs = layer()
    part, _ = parallel.shard(inputs.weights, group)
    executor = ExpertParallel("native", group, timeout=5.0)
    call = partial(executor, inputs.x, inputs.router_logits, part)  # type: ignore[arg-type]
    outputs = [call().sum(), call().sum()]
    last = dist.get_rank(group) == 1
    said = [said_by(outputs[last].backward)]
    y = call().sum()
    said.append(said_by(call if last else y.backward))
    call().sum().backward()
    return said


def in_a_hurry(_group: Any) -> str:
    """What ranks say, of which rank 0 gives up at once and rank 1 is late."""
    pair, rank = dist.new_group([0, 1]), dist.get_rank()
    if rank > 1:
        return ""
    inputs = layer()
    part, _ = parallel.shard(inputs.weights, pair)
    time.sleep(0.3 * rank)
    executor = ExpertParallel("native", pair, timeout=20.0 if rank else 0.05)
    return said_by(partial(executor, inputs.x, inputs.router_logits, part))  # type: ignore[arg-type]


def lost(group: Any) -> None:
    """Rank 1 ends while the others wait for it."""
    inputs = layer()
    part, _ = parallel.shard(inputs.weights, group)
    if dist.get_rank(group) == 1:
        time.sleep(0.2)
        os._exit(1)
    ExpertParallel("native", group, timeout=100.0)(inputs.x, inputs.router_logits, part)  # type: ignore[arg-type]


def refused_alone(_group: Any) -> str:
    """What rank 0 says, whose input is wrong, while rank 1 does not come."""
    pair = dist.new_group([0, 1])
    if dist.get_rank():
        return ""
    inputs = layer()
    part, _ = parallel.shard(inputs.weights, pair)
    executor = ExpertParallel("native", pair, timeout=0.2)
    return said_by(partial(executor, inputs.x[:, 1:], inputs.router_logits, part))  # type: ignore[arg-type]

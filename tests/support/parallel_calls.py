"""What the tests of expert parallelism run in the processes of a cluster."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import executors
from executors import parallel
from executors.native import Native
from moe_ref.conformance.judgement.call import Inputs, to_torch
from moe_ref.conformance.problems.build import build
from moe_ref.conformance.problems.problem import Problem
from moe_ref.types import MoEConfig, MoEWeights

PROBLEM = Problem(8, 5, 16, 8, MoEConfig(2), gate_up_bias=True, down_bias=True)


def layer(problem: Problem = PROBLEM) -> Inputs:
    return to_torch(problem, build(problem))


def own_rows(group: Any, value: Tensor) -> Tensor:
    """Every W-th token."""
    return value[dist.get_rank(group) :: dist.get_world_size(group)]


# --- parts


def there_and_back(group: Any, problem: Problem) -> list[str]:
    """Names of what `gather` does not give back as it was, and of what `shard` copies."""
    weights = layer(problem).weights
    part, experts = parallel.shard(weights, group)
    whole = parallel.gather(part, group, num_experts=experts.num_experts)
    wrong = [f"{n} differs" for n, v in weights.parameters().items() if not torch.equal(v, whole.parameters()[n])]
    for name, tensor in weights.packed().items():
        found = whole.packed()[name]
        wrong += [f"{name}.codes differ"] * (not torch.equal(tensor.codes, found.codes))
        wrong += [f"{name}.shape"] * (tensor.shape != found.shape)
    for name, value in part.parameters().items():
        own = weights.parameters()[name]
        wrong += [f"{name} is a copy"] * (value.untyped_storage().data_ptr() != own.untyped_storage().data_ptr())
    for name, tensor in part.packed().items():
        own = weights.packed()[name].codes
        wrong += [f"{name} is a copy"] * (tensor.codes.untyped_storage().data_ptr() != own.untyped_storage().data_ptr())
    return wrong


def of_dtensors(group: Any) -> bool:
    """Whether DTensors with Shard(0), whole or as parts, give what plain parts give; gradients are DTensors."""
    inputs = layer()
    mesh = DeviceMesh.from_group(group, "cpu")
    plain, _ = parallel.shard(inputs.weights.map(Tensor.detach), group)
    placed = inputs.weights.map(
        lambda value: distribute_tensor(value.detach(), mesh, [Shard(0)]).requires_grad_()  # type: ignore[no-untyped-call]
    )
    executor = parallel.ExpertParallel("native", mesh)
    x, logits = own_rows(group, inputs.x.detach()), own_rows(group, inputs.router_logits.detach())  # type: ignore[union-attr]
    expected, found = executor(x, logits, plain), executor(x, logits, placed)
    found.sum().backward()
    gradient = placed.gate_up_proj.grad
    return torch.equal(expected, found) and gradient.placements == (Shard(0),) and gradient.shape == (5, 16, 16)


def of_other_dtensors(group: Any) -> str:
    """The refusal of a DTensor that is placed otherwise."""
    mesh = DeviceMesh.from_group(group, "cpu")
    weights = layer().weights.map(lambda value: distribute_tensor(value.detach(), mesh, [Shard(1)]))
    try:
        parallel.shard(weights, group)
    except ValueError as error:
        return str(error)
    return ""


def of_replicated_dtensors(group: Any) -> int:
    """How many experts a part of replicated DTensors has."""
    mesh = DeviceMesh.from_group(group, "cpu")
    weights = layer().weights.map(lambda value: distribute_tensor(value.detach(), mesh, [Replicate()]))
    return parallel.shard(weights, group)[0].num_experts


# --- bits


def same_as_one_device(group: Any, problem: Problem, dispatch: str) -> bool:
    """Whether batch invariance within and results by slots give the bits of one device."""
    inputs = layer(problem)
    inner = executors.get("triton", batch_invariant=True)
    executor = parallel.ExpertParallel(inner, group, dispatch)  # type: ignore[arg-type]
    part, _ = parallel.shard(inputs.weights, group)
    whole = inner(inputs.x, inputs.router_logits, inputs.weights)
    if dispatch == "all_reduce":
        return torch.equal(whole, executor(inputs.x, inputs.router_logits, part))
    own = executor(own_rows(group, inputs.x), own_rows(group, inputs.router_logits), part)  # type: ignore[arg-type]
    return torch.equal(own_rows(group, whole), own)


def gradients(group: Any, wrap: Callable[[Any], Any]) -> dict[str, Any]:
    """Of a layer whose call is wrapped."""
    inputs = layer()
    part, _ = parallel.shard(inputs.weights, group)
    executor = parallel.ExpertParallel("native", group)
    x, logits = own_rows(group, inputs.x), own_rows(group, inputs.router_logits)  # type: ignore[arg-type]
    y = wrap(partial(executor, weights=part))(x, logits)
    y.backward(own_rows(group, inputs.dy))
    return {name: leaf.grad.numpy().tobytes() for name, leaf in inputs.tensors().items() if leaf.grad is not None}


def plain(call: Any) -> Any:
    return call


def checkpointed(call: Any) -> Any:
    contexts = partial(create_selective_checkpoint_contexts, executors.checkpoint_policy)
    return partial(checkpoint, call, use_reentrant=False, context_fn=contexts)


def compiled(call: Any) -> Any:
    return torch.compile(lambda x, logits: call(x, logits) * 1.0, backend="aot_eager")


def recomputing(group: Any) -> dict[str, Any]:
    """Gradients with an executor inside that keeps less."""
    inputs = layer()
    part, _ = parallel.shard(inputs.weights, group)
    executor = parallel.ExpertParallel(executors.get("native", recompute=True), group)
    x, logits = own_rows(group, inputs.x), own_rows(group, inputs.router_logits)  # type: ignore[arg-type]
    executor(x, logits, part).backward(own_rows(group, inputs.dy))
    return {name: leaf.grad.numpy().tobytes() for name, leaf in inputs.tensors().items() if leaf.grad is not None}


def differentiated_twice(group: Any) -> str:
    """The error of a second derivative."""
    inputs = layer()
    part, _ = parallel.shard(inputs.weights, group)
    y = parallel.ExpertParallel("native", group)(inputs.x, inputs.router_logits, part)
    (dx,) = torch.autograd.grad(y.square().sum(), inputs.x, create_graph=True)
    try:
        torch.autograd.grad(dx.sum(), inputs.x)
    except RuntimeError as error:
        return str(error)
    return ""


# --- faults


@dataclass(frozen=True)
class Failing(Native):
    """``native``, which fails on one rank in its experts."""

    name: ClassVar[str] = "failing"
    rank: int = -1

    def experts(self, x: Tensor, **arguments: Any) -> Tensor:
        if dist.get_rank() == self.rank:
            raise RuntimeError("out of\nmemory")
        return super().experts(x, **arguments)


def faulty(group: Any, fault: str, dispatch: str, timeout: float) -> float:
    """A call that goes wrong on rank 1; returns the sum of y where it does not."""
    last = dist.get_rank(group) == 1
    problem = PROBLEM
    if last and fault == "hidden":
        problem = replace(PROBLEM, hidden=24)
    if last and fault == "dtype":
        problem = replace(PROBLEM, dtype="float64")
    if last and fault == "config":
        problem = replace(PROBLEM, config=MoEConfig(2, alpha=1.5))
    if last and fault == "experts":
        problem = replace(PROBLEM, experts=6)
    if last and fault == "tokens":
        problem = replace(PROBLEM, tokens=7)
    inputs = layer(problem)
    inner = Failing(rank=1) if fault == "raises" else "native"
    executor = parallel.ExpertParallel(inner, group, dispatch, timeout=timeout)  # type: ignore[arg-type]
    part, _ = parallel.shard(inputs.weights, group)
    if last and fault == "absent":
        return 0.0
    x = inputs.x[:, 1:] if last and fault == "refused" else inputs.x
    if last and fault == "part":
        part = inputs.weights
    grad = torch.no_grad() if last and fault == "grad" else torch.enable_grad()
    with grad:
        return float(executor(x, inputs.router_logits, part).sum())


def wrong_arguments(group: Any) -> list[str]:
    """The refusals of wrong options."""
    said = []
    weights = layer().weights
    wrong: tuple[Callable[[], Any], ...] = (
        lambda: parallel.ExpertParallel("native", group, "all_to_one"),  # type: ignore[arg-type]
        lambda: parallel.ExpertParallel("native", group, returns="token"),  # type: ignore[arg-type]
        lambda: parallel.ExpertParallel("native", group, timeout=0),
        lambda: parallel.ExpertParallel("native", group, num_experts=0),
        lambda: parallel.ExpertParallel("native", "ranks"),
        lambda: parallel.gather(weights, group, num_experts=7),
        lambda: parallel.ExpertMap(0, 2),
        lambda: parallel.gather(weights, group, num_experts=5, timeout="soon"),  # type: ignore[arg-type]
        lambda: parallel.ExpertParallel("native", group, max_slots=0),
        lambda: parallel.ExpertParallel("native", group, "all_reduce", overlap=True),
        lambda: parallel.ExpertParallel("native", group, overlap=1),  # type: ignore[arg-type]
    )
    for call in wrong:
        try:
            call()
        except (ValueError, TypeError) as error:
            said.append(str(error))
    return said


def without_num_experts(group: Any) -> str:
    inputs = layer(replace(PROBLEM, entry="experts"))
    part: MoEWeights = parallel.shard(inputs.weights, group)[0]
    executor = parallel.ExpertParallel("native", group)
    try:
        executor.experts(inputs.x, topk_ids=inputs.topk_ids, topk_weights=inputs.topk_weights, weights=part)  # type: ignore[arg-type]
    except ValueError as error:
        return str(error)
    return ""


def sleeping(group: Any) -> None:
    """Sleeps on rank 1, longer than anyone waits."""
    if dist.get_rank(group) == 1:
        time.sleep(600)


def gathered_alone(group: Any) -> tuple[str, str]:
    """What rank 0 says that gathers parts while the other does not, and again."""
    if dist.get_rank(group) == 1:
        return "", ""
    part, _ = parallel.shard(layer().weights, group)
    said = []
    for _ in range(2):
        try:
            parallel.gather(part, group, num_experts=5, timeout=2.0)
        except parallel.RankError as error:
            said.append(str(error))
    return said[0], said[1]


class Layer(torch.nn.Module):
    """A layer whose experts' parameters are DTensors on the mesh dimension "ep"."""

    def __init__(self, weights: MoEWeights, mesh: DeviceMesh) -> None:
        super().__init__()
        self.config = weights.config
        for name, value in weights.parameters().items():
            placed = distribute_tensor(value.detach(), mesh, [Shard(0)])  # type: ignore[no-untyped-call]
            setattr(self, name, torch.nn.Parameter(placed))
        self.executor = parallel.ExpertParallel("native", mesh)

    def forward(self, x: Tensor, router_logits: Tensor) -> Tensor:
        return self.executor(x, router_logits, MoEWeights(**dict(self.named_parameters()), config=self.config))


def of_two_dimensions(group: Any) -> list[str]:
    """What differs from one device under FSDP2 over one dimension of a mesh and experts over the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    inputs = layer(replace(PROBLEM, dtype="float64", bias_dtype="float64"))
    module = Layer(inputs.weights, mesh["ep"])
    sharded = fully_shard(module, mesh=mesh["dp"])
    x, logits = (own_rows(group, value.detach()) for value in (inputs.x, inputs.router_logits))  # type: ignore[union-attr]
    y = sharded(x, logits)
    y.backward(own_rows(group, inputs.dy))
    whole = Native()(inputs.x, inputs.router_logits, inputs.weights)  # type: ignore[arg-type]
    whole.backward(inputs.dy)
    wrong = [] if torch.allclose(y, own_rows(group, whole), rtol=1e-12) else ["y"]
    for name, value in inputs.weights.parameters().items():
        found = getattr(sharded, name).grad.full_tensor() * mesh["dp"].size()  # FSDP2 takes the mean
        wrong += [] if torch.allclose(found, value.grad, rtol=1e-10, atol=1e-12) else [name]
    return wrong

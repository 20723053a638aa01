"""Turns a problem into torch tensors, calls an executor forward and backward, and brings the results back to NumPy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from moe_ref.conformance.problems.build import Arrays
from moe_ref.conformance.problems.problem import Problem, leading_shape
from moe_ref.types import LEARNED, MoEWeights

if TYPE_CHECKING:
    from torch import Tensor

    from executors import Executor


@dataclass(frozen=True, eq=False)
class Inputs:
    """A problem in torch: the arguments of an executor."""

    x: Tensor
    dy: Tensor
    router_logits: Tensor | None
    topk_ids: Tensor
    topk_weights: Tensor | None
    weights: MoEWeights

    def tensors(self) -> dict[str, Tensor]:
        """Everything differentiable, by name."""
        pairs = [("x", self.x), ("router_logits", self.router_logits), ("topk_weights", self.topk_weights)]
        return {name: tensor for name, tensor in pairs if tensor is not None} | self.weights.parameters()

    def codes(self) -> dict[str, Tensor]:
        """The arrays of projections in 4 bits, such as "down_proj.absmax"."""
        packed = self.weights.packed()
        return {f"{name}.{part}": array for name, tensor in packed.items() for part, array in tensor.arrays().items()}


@dataclass(frozen=True, eq=False)
class Result:
    """What an executor returned.

    Attributes:
        tensors: "y" and every gradient, flat in the token dimension, as torch tensors on the CPU in their own dtype.
        shape: of y, as returned.
        missing: names of inputs that need a gradient and got none.
        unasked: names of frozen inputs that got a gradient, also of the selection bias.
    """

    tensors: dict[str, Tensor]
    shape: tuple[int, ...]
    missing: tuple[str, ...] = ()
    unasked: tuple[str, ...] = ()

    def numpy(self, name: str) -> np.ndarray:
        """One of the tensors, in float64."""
        return self.tensors[name].double().numpy()


def to_torch(problem: Problem, arrays: Arrays, device: str = "cpu") -> Inputs:
    """The arrays as torch tensors, in the problem's dtypes, strides and leading dimensions."""

    def tensor(array: np.ndarray, dtype: str) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device, getattr(torch, dtype))

    def token_tensor(name: str, array: np.ndarray, dtype: str, layout: str) -> Tensor:
        laid = lay_out(tensor(array, dtype), layout)
        leading = leading_shape(problem)
        return needing(name, laid.reshape(*leading, array.shape[-1]))

    def needing(name: str, value: Tensor) -> Tensor:
        return value.detach().requires_grad_(name not in problem.frozen)

    weights = arrays.weights.with_parameters(
        {
            name: needing(name, lay_out(tensor(array, problem.dtype_of(name)), problem.weights_layout))
            for name, array in arrays.weights.parameters().items()
        }
    )
    bias = weights.selection_bias
    if bias is not None:  # it asks for a gradient, and must get none (D1)
        bias = tensor(bias, problem.dtype_of("selection_bias")).requires_grad_()
    weights = weights.with_parameters(
        {n: t.map(lambda array: torch.from_numpy(np.array(array)).to(device)) for n, t in weights.packed().items()}
    )
    logits, topk_weights = arrays.router_logits, arrays.topk_weights
    config = problem.config if problem.top_k_given else replace(problem.config, top_k=None)
    ids_dtype = problem.ids_dtype if arrays.topk_weights is not None else "int64"
    return Inputs(
        x=token_tensor("x", arrays.x, problem.dtype, problem.x_layout),
        dy=token_tensor("dy", arrays.dy, problem.dtype, problem.dy_layout).detach(),
        router_logits=None
        if logits is None
        else token_tensor("router_logits", logits, problem.routing_dtype, problem.routing_layout),
        topk_ids=lay_out(tensor(arrays.topk_ids, ids_dtype), problem.routing_layout).reshape(
            *leading_shape(problem), arrays.topk_ids.shape[-1]
        ),
        topk_weights=None
        if topk_weights is None
        else token_tensor("topk_weights", topk_weights, problem.routing_dtype, problem.routing_layout),
        weights=replace(weights, selection_bias=bias, config=config),
    )


def lay_out(value: Tensor, layout: str) -> Tensor:
    """The same numbers in other strides: "transposed", "sliced", "expanded" (rows equal) or "scalar" (all equal)."""
    if layout == "transposed" and value.ndim > 1:
        return value.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced":
        filler = torch.nan if value.is_floating_point() else 0
        larger = torch.full((*value.shape[:-1], 2 * value.shape[-1] + 1), filler, dtype=value.dtype)
        larger = larger.to(value.device)
        larger[..., 1::2] = value
        return larger[..., 1::2]
    if layout == "expanded" and value.shape[0]:
        return value[:1].expand_as(value)
    if layout == "scalar" and value.shape[0]:
        return value[:1, :1].expand_as(value)
    return value


def call(executor: Executor, inputs: Inputs) -> Tensor:
    """Runs the executor's forward pass by the problem's entry."""
    if inputs.router_logits is not None:
        return executor(inputs.x, inputs.router_logits, inputs.weights)
    assert inputs.topk_weights is not None
    return executor.experts(
        inputs.x, topk_ids=inputs.topk_ids, topk_weights=inputs.topk_weights, weights=inputs.weights
    )


def run(executor: Executor, inputs: Inputs, backward: bool = True, passes: int = 1) -> Result:
    """Runs the forward pass, and the backward pass for everything that needs a gradient.

    Args:
        executor: the executor to call.
        inputs: its arguments.
        backward: whether to differentiate.
        passes: backward passes through the one graph; only the last one's gradients are returned.
    """
    leaves = inputs.tensors()
    needing = [name for name, leaf in leaves.items() if leaf.requires_grad]
    y = call(executor, inputs)
    tensors = {"y": _flat(y, "y")}
    if not backward or not needing:
        return Result(tensors, tuple(y.shape))
    for left in reversed(range(passes)):
        for leaf in leaves.values():
            leaf.grad = None
        torch.autograd.backward(y, inputs.dy, retain_graph=left > 0)
    for name in needing:
        gradient = leaves[name].grad
        if gradient is not None:
            tensors[name] = _flat(gradient, name)
    missing = tuple(name for name in needing if name not in tensors)
    unasked = tuple(name for name, leaf in leaves.items() if name not in needing and leaf.grad is not None)
    bias = inputs.weights.selection_bias
    if bias is not None and bias.grad is not None:
        unasked = (*unasked, "selection_bias")
    return Result(tensors, tuple(y.shape), missing, unasked)


def _flat(value: Tensor, name: str) -> Tensor:
    value = value.detach().cpu()
    return value if name in LEARNED else value.reshape(-1, value.shape[-1])

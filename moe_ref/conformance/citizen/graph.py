"""How an executor stands in autograd's graph: changes in place, graphs that are kept, hooks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from moe_ref.conformance.citizen.case import Case, found

if TYPE_CHECKING:
    from torch import Tensor


def change_in_place(case: Case) -> None:
    """A tensor that changes in place between forward and backward raises an error, or gives the gradient as it was."""
    case.needs_backward()
    for layer, names in ((case, None), (case.exact(), ("topk_ids", "topk_weights"))):
        inputs = layer.inputs()
        for name in names or (*inputs.tensors(), *inputs.codes()):
            _change_one(layer, name)


def _change_one(case: Case, name: str) -> None:
    inputs = case.inputs()
    y = case.call(inputs)
    _change((inputs.tensors() | inputs.codes() | {"topk_ids": inputs.topk_ids})[name])
    try:
        actual = case.backward(inputs, y)
    except RuntimeError as error:
        said = "inplace" in str(error) or "in place" in str(error)
        case.demand(said, f"{name} changed in place: backward raises {error!r}, but must say 'inplace'")
    else:
        case.demand_same(actual, f"{name} changed in place before backward")


@torch.no_grad()
def _change(tensor: Tensor) -> None:
    """Other numbers in the same memory."""
    if tensor.is_floating_point():
        tensor.add_(1)
    elif tensor.dtype == torch.uint8:
        tensor.bitwise_xor_(0x11)
    else:
        tensor.copy_(tensor.flip(-1).clone())


def retain_graph(case: Case) -> None:
    """With retain_graph=True a second backward gives the same bits; after one without it, the next raises."""
    case.needs_backward()
    inputs = case.inputs()
    y = case.call(inputs)
    for keep in (True, False):
        for leaf in inputs.tensors().values():
            leaf.grad = None
        torch.autograd.backward(y, inputs.dy, retain_graph=keep)
        case.demand_same(found(inputs, y), f"backward with retain_graph={keep}")
    try:
        torch.autograd.backward(y, inputs.dy)
    except RuntimeError:
        return
    case.fail("a backward through a graph that was not retained must raise a RuntimeError")


def tensor_hooks(case: Case) -> None:
    """Hooks on x, on y, on the routing and on parameters run once, see the gradient, and may replace it."""
    case.needs_backward()
    inputs, seen = case.inputs(), list[str]()
    y = case.call(inputs)

    def doubles(name: str, gradient: Tensor) -> Tensor:
        seen.append(name)
        return gradient * 2  # exact

    hooked = {"y": y} | {name: leaf for name, leaf in inputs.tensors().items() if leaf.requires_grad}
    for name, tensor in hooked.items():
        tensor.register_hook(partial(doubles, name))  # type: ignore[no-untyped-call]
    actual = case.backward(replace(inputs, dy=inputs.dy / 2), y)  # doubled again by the hook of y
    case.demand(sorted(seen) == sorted(hooked), f"hooks that ran: {sorted(seen)}")
    doubled = {name: value if name == "y" else value * 2 for name, value in case.plain.items()}
    case.demand_same(actual, "hooks that double gradients", doubled)


def optimizer_in_backward(case: Case) -> None:
    """An optimizer's step in register_post_accumulate_grad_hook gives the same as one after backward."""
    case.needs_backward()
    plain, own = case.inputs(), case.inputs()
    case.run(plain)
    for parameter in plain.weights.parameters().values():
        if parameter.grad is not None:
            _step(parameter)
    for parameter in own.weights.parameters().values():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_step)
    actual = case.run(own)
    case.demand_same(actual, "steps in backward", found(plain, case.plain["y"]))
    parameters = [{n: p.detach() for n, p in given.weights.parameters().items()} for given in (own, plain)]
    case.demand_same(parameters[0], "steps in backward", parameters[1])


@torch.no_grad()
def _step(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.add_(parameter.grad, alpha=-0.5)
    parameter.grad = None

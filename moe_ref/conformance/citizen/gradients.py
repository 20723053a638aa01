"""Gradients as training asks for them: added up, left out, of views, and of nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moe_ref.conformance.citizen.case import Case, NotApplicableError, found, with_tensors
from moe_ref.conformance.judgement.call import Inputs, lay_out
from moe_ref.types import PROJECTIONS

if TYPE_CHECKING:
    from torch import Tensor

OWNERS = {"x": "x", "router_logits": "routing", "topk_weights": "routing"}  # what `Capabilities.strided` calls them


def micro_batches(case: Case) -> None:
    """Two backward passes add up in ``.grad``: the second changes neither what the first gave nor y of the first."""
    case.needs_backward()
    inputs = case.inputs()
    first = case.call(inputs)
    before = first.detach().clone()
    second = case.call(replace(inputs, x=inputs.x * 2))
    torch.autograd.backward(first, inputs.dy)
    gradients = {name: value.clone() for name, value in found(inputs, first).items()}
    case.demand_same(gradients, "the first of two micro-batches")
    torch.autograd.backward(second, inputs.dy)
    other = case.inputs()
    expected = case.backward(other, case.call(replace(other, x=other.x * 2)))
    case.demand_same({"y": first.detach()}, "y after a second micro-batch", {"y": before})
    both = {name: value + case.plain[name] for name, value in expected.items() if name != "y"}
    case.demand_same(found(inputs, first), "the sum of two micro-batches", both | {"y": before})


def frozen(case: Case) -> None:
    """Each input can be the only one that needs a gradient: it gets the same, and a frozen one's ``.grad`` is left."""
    case.needs_backward()
    case = case.exact()
    for name in case.plain.keys() - {"y"}:
        inputs = case.inputs()
        for other, leaf in inputs.tensors().items():
            if other != name:
                leaf.requires_grad_(False).grad = torch.full_like(leaf, 7)
        actual = case.backward(inputs, case.call(inputs))
        wanted = {other: torch.full_like(value, 7) for other, value in actual.items()}
        wanted |= {place: case.plain[place] for place in ("y", name)}
        case.demand_same(actual, f"only {name} needs a gradient", wanted)


def upstream_gradient(case: Case) -> None:
    """The upstream gradient may have any strides, as y.sum() expands it; gradients are the same."""
    case.needs_backward()
    case = case.exact()
    for layout in ("transposed", "sliced", "scalar"):
        inputs, again = case.inputs(), case.inputs()
        dy = lay_out(inputs.dy, layout)
        expected = case.plain if layout != "scalar" else case.run(replace(again, dy=dy.contiguous()))
        actual = case.run(replace(inputs, dy=dy))
        case.demand_same(actual, f"an upstream gradient with strides {dy.stride()}", expected)


def views(case: Case) -> None:
    """x as a slice, weights as transposed or expanded views: the same, and the gradient arrives in the base."""
    case.needs_backward()
    strided = case.executor.capabilities.strided
    if not strided:
        raise NotApplicableError(f"{case.executor.name} does not declare strides")
    case = case.exact()
    for layout in ("transposed", "sliced"):
        inputs = case.inputs()
        some = {n: leaf for n, leaf in inputs.tensors().items() if OWNERS.get(n, "weights") in strided}
        tensors = inputs.tensors() | {name: lay_out(leaf, layout) for name, leaf in some.items()}
        y = case.call(with_tensors(inputs, tensors))
        case.demand_same(case.backward(inputs, y), f"{layout} views of leaves")
    inputs, again = case.inputs(), case.inputs()
    parameters = inputs.weights.parameters()
    of_one = {name: value.detach()[:1].expand_as(value) for name, value in parameters.items() if name in PROJECTIONS}
    if of_one and "weights" in strided:  # all experts are one: stride 0
        copied = {name: value.contiguous() for name, value in of_one.items()}
        expected = case.run(replace(again, weights=again.weights.with_parameters(copied)))
        actual = case.run(replace(inputs, weights=inputs.weights.with_parameters(of_one)))
        case.demand_same(actual, "frozen projections with a stride of 0", expected)


def no_tokens(case: Case) -> None:
    """With T = 0, y has no rows and every parameter has a gradient of zeros."""
    if not case.executor.capabilities.empty_batch:
        raise NotApplicableError(f"{case.executor.name} does not declare T = 0")
    inputs = case.inputs()
    rows = {n: None if v is None else v[:0] for n, v in vars(inputs).items() if n != "weights"}
    leaves: dict[str, Any] = {
        n: v if v is None or not v.is_floating_point() else v.detach().requires_grad_(n != "dy")
        for n, v in rows.items()
    }
    nothing = replace(inputs, **leaves)
    actual = case.run(nothing)
    case.demand(actual["y"].shape == nothing.x.shape, f"T=0: y.shape={tuple(actual['y'].shape)}")
    case.needs_backward()
    expected = {name: torch.zeros_like(leaf) for name, leaf in nothing.tensors().items() if name in case.plain}
    case.demand_same(actual, "T=0", expected | {"y": nothing.x.detach()})


def toggled(case: Case) -> None:
    """requires_grad that changes after forward changes no other gradient: what was frozen then gets none."""
    case.needs_backward()
    inputs = case.inputs()
    inputs.x.requires_grad_(False)
    y = case.call(inputs)
    inputs.x.requires_grad_(True)
    case.demand_same(case.backward(inputs, y), "x asked for a gradient after forward", _without_x(case))
    inputs = case.inputs()
    y = case.call(inputs)
    inputs.x.requires_grad_(False)
    case.demand_same(case.backward(inputs, y), "x was frozen after forward", _without_x(case))


def _without_x(case: Case) -> dict[str, Tensor]:
    return {name: value for name, value in case.plain.items() if name != "x"}


def functional_call(case: Case) -> None:
    """Parameters that torch.func.functional_call swaps in are those that act, and after it the module's own."""
    inputs = case.inputs()
    own = inputs.weights.parameters()
    if not own:
        raise NotApplicableError(f"{case.executor.name}: the layer has no parameters")
    module, plain = _Module(case, inputs, own), {"y": case.plain["y"]}
    others = {name: value.detach().roll(1, 0) for name, value in own.items()}
    expected = case.call(replace(inputs, weights=inputs.weights.with_parameters(others))).detach()

    def swapped(*names: str) -> Tensor:
        own_names = {f"own.{name}": others[name] for name in names}
        y: Tensor = torch.func.functional_call(module, own_names, (inputs.x,))
        return y.detach()

    case.demand_same({"y": module(inputs.x).detach()}, "a module's parameters", plain)
    for name in own:
        case.demand(not torch.equal(swapped(name), plain["y"]), f"another {name}, swapped in, changes nothing")
    case.demand_same({"y": swapped(*own)}, "parameters swapped in", {"y": expected})
    case.demand_same({"y": module(inputs.x).detach()}, "a module's parameters after a swap", plain)


class _Module(nn.Module):
    """The layer with its parameters as a module's."""

    def __init__(self, case: Case, inputs: Inputs, own: dict[str, Tensor]) -> None:
        super().__init__()
        self.case, self.inputs = case, inputs
        self.own = nn.ParameterDict({name: nn.Parameter(value.detach()) for name, value in own.items()})

    def forward(self, x: Tensor) -> Tensor:
        weights = self.inputs.weights.with_parameters(dict(self.own.items()))
        return self.case.call(replace(self.inputs, x=x, weights=weights))

"""Arguments that are odd and right, and one that is on another device."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import forward_ad

from moe_ref.conformance.citizen.case import Case, NotApplicableError, with_tensors
from moe_ref.conformance.judgement.call import Inputs
from moe_ref.types import PackedTensor

if TYPE_CHECKING:
    from torch import Tensor

    from moe_ref.types import MoEWeights

MOST = 2.0**-6  # by which a forward-mode derivative in 16 bits may differ, of the sum of its terms' sizes


def local_experts(case: Case) -> None:
    """A rank of expert parallelism: K, groups and a selection bias of all experts stand beside weights of a few."""
    case.needs_empty_slots()
    case = case.exact()
    inputs = case.inputs()
    weights, local = inputs.weights, case.problem.experts
    ids = torch.arange(local + 1, device=case.device).expand(case.problem.tokens, -1).contiguous()
    ids, ones = ids.to(inputs.topk_ids.dtype), torch.ones_like(ids, dtype=inputs.topk_weights.dtype)  # type: ignore[union-attr]
    routed = replace(inputs, topk_ids=ids, topk_weights=ones)
    expected = case.call(replace(routed, weights=replace(weights, config=replace(weights.config, top_k=None))))
    whole = replace(weights, config=replace(weights.config, top_k=local + 1))
    if case.executor.capabilities.selection:
        config = replace(whole.config, num_groups=2 * local, topk_groups=local + 1)
        whole = replace(whole, config=config, selection_bias=torch.zeros(2 * local, device=case.device))
    try:
        y = case.call(replace(routed, weights=whole))
    except ValueError as error:
        case.fail(f"experts of one rank among {2 * local}: {error!r}")
    case.demand_same({"y": y.detach()}, "experts of one rank", {"y": expected.detach()})


def forward_mode(case: Case) -> None:
    """A forward-mode derivative is right or an error, and never silently 0."""
    case.needs_backward()
    for names in (["x"], [name for name in case.plain if name != "y"]):
        inputs = case.inputs()
        with forward_ad.dual_level(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of what it loads for these derivatives
            given = {n: _dual(v.detach()) if n in names else v.detach() for n, v in inputs.tensors().items()}
            try:
                y = case.call(with_tensors(inputs, given))
            except (RuntimeError, NotImplementedError, ValueError, TypeError):
                continue
            tangent = forward_ad.unpack_dual(y).tangent  # type: ignore[no-untyped-call]
        if tangent is None:
            case.fail(f"the forward-mode derivative for {', '.join(names)} is silently 0")
        forward = (tangent * inputs.dy).double()  # <dy, dy/dx v> either way around, for v of ones
        backward = torch.cat([case.plain[name].double().flatten() for name in names])
        share = min(2.0**8 * torch.finfo(inputs.x.dtype).eps, MOST)
        slack = share * (forward.abs().sum() + backward.abs().sum())
        for own in (case.plain[name] for name in names):  # which are rounded to their own dtypes
            slack += torch.finfo(own.dtype).eps * own.double().abs().sum()
        case.demand(
            bool((forward.sum() - backward.sum()).abs() <= slack),
            f"<dy, tangent>={forward.sum():.6g} in forward mode, but must be {backward.sum():.6g}",
        )


def _dual(value: Tensor) -> Tensor:
    """With a tangent of ones."""
    dual: Tensor = forward_ad.make_dual(value, torch.ones_like(value))  # type: ignore[no-untyped-call]
    return dual


def ids_of_route(case: Case) -> None:
    """``route`` gives ids in int64, so that one_hot takes them for a balancing loss."""
    route = getattr(case.executor, "route", None)
    inputs = case.inputs()
    if route is None or inputs.router_logits is None:
        raise NotApplicableError(f"{case.executor.name} has no route")
    ids = route(inputs.router_logits, inputs.weights).topk_ids
    case.demand(ids.dtype == torch.int64, f"topk_ids.dtype={ids.dtype}, but must be torch.int64")


def padding(case: Case) -> None:
    """Tokens whose ids are all -1 may hold NaN: y is 0 there, so are their gradients, and nothing leaks to others."""
    case.needs_empty_slots()
    case = case.exact()
    inputs, others = case.inputs(), case.inputs()
    for name in ("x", "topk_weights"):
        getattr(inputs, name).data[-1] = torch.nan
    inputs.topk_ids[-1] = others.topk_ids[-1] = -1
    inputs.dy[-1] = 0
    others.x.data[-1] = others.topk_weights.data[-1] = 1  # type: ignore[union-attr]
    others.dy[-1] = 0
    actual = case.run(inputs)
    for name in ("y", "x", "topk_weights"):
        if name in actual:
            case.demand(not actual[name][-1].any(), f"{name} of a padded token is {actual[name][-1].tolist()[:3]}")
    case.demand_same(actual, "a padded token of NaN", case.run(others))


def other_device(case: Case) -> None:
    """A tensor on another device is refused in one line that names it, and both devices."""
    for layer, names in ((case, None), (case.exact(), ("topk_ids", "topk_weights"))):
        inputs = layer.inputs()
        for name in names or (*(n for n in inputs.tensors() if n != "x"), *inputs.codes()):
            error = _error_of(layer, _moved(layer.inputs(), name))
            named = error is not None and str(error).startswith(name.partition(".")[0]) and "\n" not in str(error)
            both = error is not None and "meta" in str(error) and layer.device in str(error)
            layer.demand(named and both, f"{name} on meta: {error!r}, but must name it, meta and {layer.device}")


def _error_of(case: Case, inputs: Inputs) -> ValueError | TypeError | None:
    try:
        case.call(inputs)
    except (ValueError, TypeError) as error:
        return error
    except (RuntimeError, NotImplementedError) as error:
        case.fail(f"a tensor on meta: {error!r}, but must be a ValueError")
    return None


def _moved(inputs: Inputs, name: str) -> Inputs:
    """The arguments with one of them on the meta device."""
    changed: Any = inputs.weights.parameters().get(name)
    if hasattr(inputs, name):
        return replace(inputs, **{name: getattr(inputs, name).detach().to("meta")})
    if changed is not None:
        return replace(inputs, weights=inputs.weights.with_parameters({name: changed.detach().to("meta")}))
    projection, _, part = name.partition(".")
    return replace(inputs, weights=_with_part(inputs.weights, projection, part))


def _with_part(weights: MoEWeights, projection: str, part: str) -> MoEWeights:
    packed: PackedTensor = getattr(weights, projection)
    moved: dict[str, Tensor] = {part: getattr(packed, part).to("meta")}
    return weights.with_parameters({projection: replace(packed, **moved)})  # type: ignore[type-var]

"""Judges a contender on one input, before it is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from executors import Unavailable, Unsupported
from executors._bench.layers import BenchLayer
from executors._bench.routing import Batch
from executors._bench.truth import SampledTruth
from moe_ref.conformance.judgement.faults import RAISED, Judgement, raised
from moe_ref.conformance.judgement.gates import CLAUSES, Verdict, judge
from moe_ref.validation import dtype_name

BFLOAT16 = "bfloat16"


def judge_contender(
    call: Callable[[Batch], Tensor], layer: BenchLayer, batch: Batch, truth: SampledTruth, backward: bool
) -> Judgement:
    """Runs a contender as it will be timed, and judges its output, and its gradients where ``backward`` is timed.

    dy is zero but for the judged tokens, so that every gradient is theirs alone.
    """
    try:
        if not backward:
            with torch.no_grad():
                return judge_results(call(batch), {}, layer, batch, truth)
        y = call(batch)
        torch.autograd.backward(y, only_judged(batch).dy)
        leaves = batch.leaves() | layer.parameters
        gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        missing = [name for name in leaves if name not in gradients]
        if missing:
            return Judgement(fault=f"D1: no gradient for {', '.join(missing)}")
        return judge_results(y.detach(), gradients, layer, batch, truth)
    except (Unavailable, Unsupported) as error:
        return Judgement(reason=" ".join(str(error).split()))
    except torch.OutOfMemoryError as error:
        return Judgement(reason=f"not enough memory: {str(error).splitlines()[0]}")
    except RAISED as error:
        return raised(error)
    finally:
        clear_gradients(layer, batch)


def clear_gradients(layer: BenchLayer, batch: Batch) -> None:
    """Gives back the memory of all gradients."""
    for leaf in (batch.leaves() | layer.parameters).values():
        leaf.grad = None


def judge_results(
    y: Tensor, gradients: dict[str, Tensor], layer: BenchLayer, batch: Batch, truth: SampledTruth
) -> Judgement:
    """Judges an output and gradients, those of parameters in the model's own storage."""
    if y.shape != batch.x.shape or y.dtype != batch.x.dtype:
        wanted = f"{tuple(batch.x.shape)} {dtype_name(batch.x)}"
        return Judgement(fault=f"E3, T2: y is {tuple(y.shape)} {dtype_name(y)}, but must be {wanted}")
    if not bool(torch.isfinite(y).all()):
        return Judgement(fault="E2: y is not finite, but must be")
    verdicts = [_verdict("y", y[batch.judged], truth)]
    for name, gradient in gradients.items():
        if name in layer.parameters:
            value, where = layer.canonical(name, gradient), truth.active.to(gradient.device)
        else:
            value, where = gradient, batch.judged
        if not _zero_outside(value, where):
            return Judgement(fault=f"{CLAUSES[name]}: the gradient of {name} is not 0 where dy does not reach")
        chosen = value[where]
        if name in truth.rows:
            chosen = chosen[:, truth.rows[name].to(value.device)]
        verdicts.append(_verdict(name, chosen, truth))
    return Judgement(verdicts=tuple(verdicts))


def _verdict(name: str, value: Tensor, truth: SampledTruth) -> Verdict:
    return judge(name, value.double().cpu().numpy(), truth.bars[name], BFLOAT16, dtype_name(value))


def _zero_outside(value: Tensor, where: Tensor) -> bool:
    others = torch.ones(value.shape[0], dtype=torch.bool, device=value.device)
    others[where] = False
    if value.ndim < 3:
        return not bool(value[others].count_nonzero())
    # one expert at a time: no copy of a large stack
    return all(not bool(value[index].count_nonzero()) for index in others.nonzero().flatten().tolist())


def only_judged(batch: Batch) -> Batch:
    """The batch with a dy that is zero but for the judged tokens."""
    dy = torch.zeros_like(batch.dy)
    dy[batch.judged] = batch.dy[batch.judged]
    return replace(batch, dy=dy)

"""The exact answer for a layer, and an executor's verdict against it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from executors import Unavailable, Unsupported
from executors.layer_file import Layer
from moe_ref.conformance.judgement.call import Inputs, run
from moe_ref.conformance.judgement.choices import have_margins
from moe_ref.conformance.judgement.faults import (
    RAISED,
    Fault,
    Judgement,
    changed,
    copies,
    different,
    raised,
    wrong_form,
)
from moe_ref.conformance.judgement.gates import judge, standardise
from moe_ref.conformance.problems.kinks import pushes_off_kinks
from moe_ref.conformance.problems.poison import poisoned
from moe_ref.error_bars import TensorBars, error_bars
from moe_ref.routing import route, weigh
from moe_ref.types import MoEWeights
from moe_ref.validation import dtype_name

if TYPE_CHECKING:
    from executors import Executor


@dataclass(frozen=True, eq=False)
class Truth:
    """The exact answer with its error bars, for one layer and one upstream gradient.

    Attributes:
        inputs: what executors are called with.
        bars: exact values and error bars.
        group_sizes: [E] tokens of each expert.
        near_limit: tokens with a pre-activation so near the clamp's limit that rounding may carry it across, where the
            derivative jumps; their upstream gradient is 0.
    """

    inputs: Inputs
    bars: dict[str, TensorBars]
    group_sizes: np.ndarray
    near_limit: int = 0


def with_clear_choice(layer: Layer) -> Layer:
    """The layer without the tokens for which more than one choice of experts is right (R2)."""
    bias = layer.weights.selection_bias
    clear = have_margins(_wide(layer.router_logits), layer.weights.config, None if bias is None else _wide(bias))
    kept = torch.from_numpy(clear).to(layer.x.device)
    return layer if clear.all() else replace(layer, x=layer.x[kept], router_logits=layer.router_logits[kept])


def exact_answer(layer: Layer, seed: int, progress: Callable[[int, int], None] | None = None) -> Truth:
    """Computes the exact layer and samples its error bars.

    Args:
        layer: the layer and its input.
        seed: of the upstream gradient dy ~ N(0, 1) and of the samples.
        progress: called with (samples done, samples in all).
    """
    truth = unjudged(layer, seed)
    ids, weights = truth.inputs.topk_ids.cpu().numpy(), _wide_weights(layer.weights)
    topk_weights = weigh(_wide(layer.router_logits), ids, weights.config, expert_scale=weights.expert_scale)
    near = pushes_off_kinks(_wide(layer.x), ids, topk_weights, weights, dtype_name(layer.x)).any(axis=1)
    dy = truth.inputs.dy.masked_fill(torch.from_numpy(near).to(layer.x.device)[:, None], 0.0)
    inputs = replace(truth.inputs, dy=dy)
    with threadpool_limits(1, "blas"):  # small products, beside torch's own threads: more would only get in the way
        bars = error_bars(
            _wide(layer.x),
            ids,
            weights,
            _wide(dy),
            router_logits=_wide(layer.router_logits),
            dtype=dtype_name(layer.x),
            seed=seed,
            progress=progress,
        )
    return replace(truth, inputs=inputs, bars=bars, near_limit=int(near.sum()))


def unjudged(layer: Layer, seed: int) -> Truth:
    """The inputs of a call and its backward pass, without the exact answer."""
    x, logits = layer.x, layer.router_logits
    generator = torch.Generator().manual_seed(seed)
    dy = torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x)
    bias = layer.weights.selection_bias
    ids = route(_wide(logits), layer.weights.config, None if bias is None else _wide(bias)).topk_ids
    topk_ids = torch.from_numpy(np.ascontiguousarray(ids)).to(x.device)  # as kernels take them
    inputs = Inputs(_leaf(x), dy, _leaf(logits), topk_ids, None, _leaf_weights(layer.weights))
    return Truth(inputs, {}, np.bincount(ids.ravel(), minlength=layer.weights.num_experts))


def inputs_for(executor: Executor, truth: Truth) -> Inputs:
    """The layer's inputs; ids and weights instead of logits for an executor that declares no routing."""
    if executor.capabilities.routing:
        return truth.inputs
    assert truth.inputs.router_logits is not None
    given = truth.inputs.weights
    routing = route(
        truth.inputs.router_logits.detach(), given.config, given.selection_bias, expert_scale=given.expert_scale
    )
    wide = torch.promote_types(truth.inputs.x.dtype, torch.float32)
    weights = replace(given, expert_scale=None)
    return replace(
        truth.inputs,
        router_logits=None,
        topk_weights=_leaf(routing.topk_weights.to(wide).contiguous()),
        weights=weights,
    )


def judge_executor(executor: Executor, truth: Truth) -> Judgement:
    """Runs an executor forward and backward, in poisoned memory, and judges every tensor.

    It works on copies, so that one which changes its input fails alone.

    Raises:
        Unsupported: the executor does not take this layer after all.
    """
    try:
        return _judge(executor, truth)
    except (Unavailable, Unsupported):
        raise
    except RAISED as error:
        return raised(error)


def _judge(executor: Executor, truth: Truth) -> Judgement:
    inputs, backward = _copied(inputs_for(executor, truth)), executor.capabilities.backward
    before = copies(inputs)
    with poisoned():
        result = run(executor, inputs, backward)
    with poisoned(), torch.no_grad():  # inference may take another path
        inference = run(executor, inputs, backward=False)
    dtype = dtype_name(inputs.x)
    verdicts, scores = [], {}
    for name, tensor in result.tensors.items():
        bars, out = truth.bars[name], dtype_name(tensor)
        verdicts.append(judge(name, result.numpy(name), bars, dtype, out))
        if tensor.shape == bars.exact.shape:
            sd = bars.sd(dtype, out)
            scores[name] = standardise(result.numpy(name) - bars.exact, sd)[sd > 0]
    verdicts.append(judge("y", inference.numpy("y"), truth.bars["y"], dtype, dtype_name(inference.tensors["y"])))
    fault = changed(inputs, before) or wrong_form(result, inputs, backward) or _wrong_route(executor, inputs)
    fault = fault or different(result, run(executor, inputs, backward), "two runs")
    return Judgement(tuple(verdicts), "" if fault is None else str(fault), z=scores)


def _wrong_route(executor: Executor, inputs: Inputs) -> Fault | None:
    """R2: the executor's own ids are the specification's."""
    choose = getattr(executor, "route", None)
    if choose is None or inputs.router_logits is None:
        return None
    with torch.no_grad():
        ids = choose(inputs.router_logits, inputs.weights).topk_ids
    wrong = (ids != inputs.topk_ids).any(dim=-1).nonzero()
    if not len(wrong):
        return None
    t = int(wrong[0])
    return Fault("R2", f"topk_ids[{t}]={ids[t].tolist()}, but must be {inputs.topk_ids[t].tolist()}")


def _copied(inputs: Inputs) -> Inputs:
    def copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.detach().clone().requires_grad_(tensor.requires_grad)

    values = {f.name: getattr(inputs, f.name) for f in fields(inputs) if f.name != "weights"}
    return Inputs(**{n: copy(v) for n, v in values.items()}, weights=inputs.weights.map(copy))  # type: ignore[arg-type]


def _wide(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()


def _wide_weights(weights: MoEWeights) -> MoEWeights:
    return weights.map(_wide)


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_()


def _leaf_weights(weights: MoEWeights) -> MoEWeights:
    return weights.map(_leaf)

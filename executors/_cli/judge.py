"""The exact answer for a layer, and an executor's verdict against it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from executors._cli.layer_file import Layer
from moe_ref.conformance.call import Inputs, run
from moe_ref.conformance.checks import CLAUSES
from moe_ref.conformance.gates import Verdict, judge, standardise
from moe_ref.conformance.poison import poisoned
from moe_ref.error_bars import TensorBars, error_bars
from moe_ref.routing import route
from moe_ref.types import MoEWeights
from moe_ref.validation import dtype_name

if TYPE_CHECKING:
    from executors import Executor


@dataclass(frozen=True, eq=False)
class Truth:
    """The exact answer with its error bars, for one layer and one upstream gradient."""

    inputs: Inputs
    bars: dict[str, TensorBars]
    group_sizes: np.ndarray


@dataclass(frozen=True, eq=False)
class Judgement:
    """What came of one executor.

    Attributes:
        verdicts: of y and of each gradient.
        z: by tensor, the errors in error bars of all elements that can err, for the plot.
    """

    verdicts: list[Verdict]
    z: dict[str, np.ndarray]

    @property
    def failure(self) -> str:
        """The first broken clause in a few words, or ""."""
        for verdict in self.verdicts:
            if verdict.failure:
                return f"{CLAUSES[verdict.name]}: {verdict.failure}"
        return ""


def exact_answer(layer: Layer, seed: int, progress: Callable[[int, int], None] | None = None) -> Truth:
    """Computes the exact layer and samples its error bars.

    Args:
        layer: the layer and its input.
        seed: of the upstream gradient dy ~ N(0, 1) and of the samples.
        progress: called with (samples done, samples in all).
    """
    truth = unjudged(layer, seed)
    inputs = truth.inputs
    with threadpool_limits(1, "blas"):  # small products, beside torch's own threads: more would only get in the way
        bars = error_bars(
            _wide(layer.x),
            inputs.topk_ids.cpu().numpy(),
            _wide_weights(layer.weights),
            _wide(inputs.dy),
            router_logits=_wide(layer.router_logits),
            dtype=dtype_name(layer.x),
            seed=seed,
            progress=progress,
        )
    return replace(truth, bars=bars)


def unjudged(layer: Layer, seed: int) -> Truth:
    """The inputs of a call and its backward pass, without the exact answer."""
    x, logits = layer.x, layer.router_logits
    generator = torch.Generator().manual_seed(seed)
    dy = torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x)
    ids = route(_wide(logits), layer.weights.config).topk_ids
    topk_ids = torch.from_numpy(ids).to(x.device)
    inputs = Inputs(_leaf(x), dy, _leaf(logits), topk_ids, None, _leaf_weights(layer.weights))
    return Truth(inputs, {}, np.bincount(ids.ravel(), minlength=layer.weights.num_experts))


def inputs_for(executor: Executor, truth: Truth) -> Inputs:
    """The layer's inputs; ids and weights instead of logits for an executor that declares no routing."""
    if executor.capabilities.routing:
        return truth.inputs
    assert truth.inputs.router_logits is not None
    routing = route(truth.inputs.router_logits.detach(), truth.inputs.weights.config)
    return replace(truth.inputs, router_logits=None, topk_weights=_leaf(routing.topk_weights.float()))


def judge_executor(executor: Executor, truth: Truth) -> Judgement:
    """Runs an executor forward and backward, in poisoned memory, and judges every tensor."""
    inputs = inputs_for(executor, truth)
    with poisoned():
        result = run(executor, inputs, executor.capabilities.backward)
    dtype = dtype_name(inputs.x)
    verdicts, scores = [], {}
    for name, tensor in result.tensors.items():
        bars, out = truth.bars[name], dtype_name(tensor)
        verdicts.append(judge(name, result.numpy(name), bars, dtype, out))
        if tensor.shape == bars.exact.shape:
            sd = bars.sd(dtype, out)
            scores[name] = standardise(result.numpy(name) - bars.exact, sd)[sd > 0]
    verdicts += [Verdict(name, failure=f"no gradient for {name}") for name in result.missing]
    return Judgement(verdicts, scores)


def _wide(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()


def _wide_weights(weights: MoEWeights) -> MoEWeights:
    values = {f.name: getattr(weights, f.name) for f in fields(weights) if f.name != "config"}
    wide = {name: None if value is None else _wide(value) for name, value in values.items()}
    return MoEWeights(**wide, config=weights.config)


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_()


def _leaf_weights(weights: MoEWeights) -> MoEWeights:
    values = {f.name: getattr(weights, f.name) for f in fields(weights) if f.name != "config"}
    return MoEWeights(**{n: None if v is None else _leaf(v) for n, v in values.items()}, config=weights.config)

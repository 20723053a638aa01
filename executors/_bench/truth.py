"""The exact answer for a few tokens of a large layer, with error bars.

It is sampled as `moe_ref.error_bars` samples it, from the specification's own functions in float64, one expert widened
at a time. Only what can be judged is computed: the tokens' own outputs and gradients, and of the gradients of the
projections and adapters a few rows of the experts that these tokens chose. dy is zero for all other tokens, so nobody
else adds to those. Projections in 4 bits are decoded by the specification: what they lost when they were quantised does
not count. (`error_bars` itself samples the gradient of every weight, which at these sizes takes hours.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from executors._bench.layers import BenchLayer, Shape
from executors._bench.routing import Batch
from moe_ref.activations import activation, activation_vjp
from moe_ref.combine import combine, combine_vjp, dot
from moe_ref.error_bars import Part, TensorBars
from moe_ref.experts import Linear, down, expert, groups, lora_inner, up
from moe_ref.grouping import group, permute, permute_vjp, unpermute
from moe_ref.numerics import EXACT, FORMATS, Perturbed, Rounding, matmul_transposed, sum_sd
from moe_ref.packed import decode_expert
from moe_ref.samples import PROBES
from moe_ref.types import MoEWeights, PackedTensor

SAMPLES = 32
ROWS = 8  # judged of the gradient of each projection and each factor, for each expert
MOST_JUDGED = 4
DEAR = 5_000_000  # K * H * I from which only half as many tokens are judged


@dataclass(frozen=True, eq=False)
class Truth:
    """Exact values with error bars.

    Attributes:
        bars: by tensor; those of the parameters' gradients are [A, ...] with the rows of ``rows``.
        active: [A] experts that the judged tokens chose, ascending.
        rows: for each matrix that is trained, the rows that are judged.
    """

    bars: dict[str, TensorBars]
    active: Tensor
    rows: dict[str, Tensor]


def judged_tokens(shape: Shape) -> int:
    """How many tokens are judged."""
    dear = shape.top_k * shape.hidden * shape.intermediate > DEAR
    return MOST_JUDGED // 2 if dear else MOST_JUDGED


def sample_truth(layer: BenchLayer, batch: Batch, backward: bool, seed: int) -> Truth:
    """Computes the exact answer for the batch's judged tokens, and samples its error bars.

    Args:
        layer: the layer.
        batch: the input.
        backward: whether gradients are wanted.
        seed: of the samples.
    """
    where = batch.judged
    ids = batch.topk_ids[where].cpu()
    active, local = torch.unique(ids, return_inverse=True)
    x, dy, slot_weights = (t.detach()[where].double().cpu()[None] for t in (batch.x, batch.dy, batch.topk_weights))
    weights = _only(layer.weights(), active)
    rows = {
        name: torch.linspace(0, value.shape[1] - 1, min(ROWS, value.shape[1])).round().long()
        for name, value in weights.parameters().items()
        if value.ndim == 3
    }
    wanted = {"y", *(batch.leaves() | layer.parameters)}

    def run(rounding: Rounding) -> dict[str, np.ndarray]:
        found = _layer(x, local, slot_weights, weights, dy if backward else None, rows, rounding)
        return {name: value.numpy() for name, value in found.items() if name in wanted}

    exact = {name: value[0] for name, value in run(EXACT).items()}
    parts = []
    for kind in ("storage", "accumulation"):
        rounding = Perturbed(kind, SAMPLES, seed, 0, FORMATS["bfloat16"].smallest_normal)
        errors = {name: (value - exact[name]) / rounding.scale for name, value in run(rounding).items()}
        parts.append({name: _part(value, exact[name], seed) for name, value in errors.items()})
    storage, accumulation = parts
    bars = {n: TensorBars(v, storage[n], accumulation[n], _probe(v, seed)) for n, v in exact.items()}
    return Truth(bars, active, rows)


def _layer(
    x: Tensor,
    ids: Tensor,
    slot_weights: Tensor,
    weights: MoEWeights,
    dy: Tensor | None,
    rows: dict[str, Tensor],
    rounding: Rounding,
) -> dict[str, Tensor]:
    """The specification's layer, and with ``dy`` its gradients, with an axis of samples in front."""
    grouping = group(ids, weights.num_experts)
    tokens = permute(x, grouping.order, ids.shape[-1])
    kept, outputs = [], []
    for index, where in groups(grouping.group_offsets):
        parameters = expert(weights, index)
        z = up(tokens[..., where, :], parameters, rounding)
        h = activation(z, weights.config, rounding)
        kept.append((index, where, z, h))
        outputs.append(down(h, parameters, rounding))
    slots = unpermute(torch.cat(outputs, dim=-2), grouping.inverse)
    found = {"y": combine(slots, slot_weights, rounding)}
    if dy is None:
        return found
    upstream = dy.repeat_interleave(ids.shape[-1], dim=-2)
    found["topk_weights"] = dot(slots, upstream, rounding).reshape(-1, *ids.shape)
    d_outputs = unpermute(combine_vjp(slot_weights, dy, rounding), grouping.order)
    d_tokens, d_parameters = [], []
    for index, where, z, h in kept:
        parameters = expert(weights, index)
        dh, d_down = _linear("down", "dh", h, parameters.down, d_outputs[..., where, :], rows, rounding)
        dz = activation_vjp(z, weights.config, dh, rounding)
        own = tokens[..., where, :]
        d_rows, d_up = _linear("gate_up", "dx_slot", own, parameters.up, dz, rows, rounding)
        d_tokens.append(d_rows)
        d_parameters.append(d_up | d_down)
    found["x"] = permute_vjp(torch.cat(d_tokens, dim=-2), grouping.inverse, ids.shape[-1], rounding)
    given = [name for name in d_parameters[0] if name in weights.parameters()]
    return found | {name: torch.stack([d[name] for d in d_parameters], dim=1) for name in given}


def _linear(
    name: str,
    site: str,
    rows: Tensor,
    parameters: Linear,
    d_out: Tensor,
    judged: dict[str, Tensor],
    rounding: Rounding,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`moe_ref.experts.linear_vjp`, with only the judged rows of the gradients of matrix and factors."""
    d_rows = rounding.store(site, matmul_transposed(rounding, site, d_out, parameters.matrix.mT))
    chosen = d_out[..., judged[f"{name}_proj"]]
    d_matrix = matmul_transposed(rounding, "d_weight", chosen.mT, rows.mT)
    total, length = d_out.sum(dim=-2), d_out.shape[-2]
    d_bias = rounding.accumulate("d_bias", total, lambda: sum_sd(total, (d_out * d_out).sum(dim=-2), length))
    found = {f"{name}_proj": d_matrix, f"{name}_proj_bias": d_bias}
    if parameters.lora_a is None or parameters.lora_b is None:
        return d_rows, found
    added, d_factors = _adapter(name, site, rows, parameters, d_out, judged, rounding)
    sum_of_both = d_rows + added
    d_rows = rounding.accumulate(f"{site}_sum", sum_of_both, lambda: sum_of_both.abs())
    return rounding.store(f"{site}_sum", d_rows), found | d_factors


def _adapter(
    name: str,
    site: str,
    rows: Tensor,
    parameters: Linear,
    d_out: Tensor,
    judged: dict[str, Tensor],
    rounding: Rounding,
) -> tuple[Tensor, dict[str, Tensor]]:
    """What an adapter adds to the gradient of its rows, and the judged rows of the gradients of its factors."""
    assert parameters.lora_a is not None
    assert parameters.lora_b is not None
    place = f"{site}_lora"
    d_inner = rounding.store(place, matmul_transposed(rounding, place, d_out, parameters.lora_b.mT))
    d_inner = rounding.store(f"{place}_scaled", parameters.scaling * d_inner)
    added = matmul_transposed(rounding, f"{place}_rows", d_inner, parameters.lora_a.mT)
    inner = lora_inner(name, rows, parameters, rounding)
    of_b, of_a = d_out[..., judged[f"{name}_lora_b"]], d_inner[..., judged[f"{name}_lora_a"]]
    d_factors = {
        f"{name}_lora_a": matmul_transposed(rounding, "d_lora_a", of_a.mT, rows.mT),
        f"{name}_lora_b": matmul_transposed(rounding, "d_lora_b", of_b.mT, inner.mT),
    }
    return rounding.store(f"{place}_rows", added), d_factors


def _only(weights: MoEWeights, active: Tensor) -> MoEWeights:
    """The active experts' parameters, on the CPU; numbers in 4 bits decoded, into the dtype that they decode to."""

    def chosen(stack: Tensor | PackedTensor) -> Tensor:
        if isinstance(stack, PackedTensor):
            matrices = torch.stack([decode_expert(stack, int(index)) for index in active])
            return matrices.to(getattr(torch, stack.dtype)).cpu()
        return stack.detach()[active.to(stack.device)].cpu()

    stacks = weights.parameters() | weights.packed()
    return weights.with_parameters({name: chosen(stack) for name, stack in stacks.items()})


def _part(errors: np.ndarray, exact: np.ndarray, seed: int) -> Part:
    """One kind of error, from its samples [samples, ...]; as `moe_ref.error_bars` sums them up."""
    errors = np.broadcast_to(errors, (SAMPLES, *exact.shape)).reshape(SAMPLES, -1)
    norm = float(np.sum(exact**2)) or 1.0
    variance = np.mean(errors**2, axis=0).reshape(exact.shape)
    return Part(variance, errors @ exact.ravel() / norm, errors[:, _probe(exact, seed)].astype(np.float32))


def _probe(exact: np.ndarray, seed: int) -> np.ndarray:
    if exact.size <= PROBES:
        return np.arange(exact.size)
    return np.sort(np.random.default_rng(seed).choice(exact.size, PROBES, replace=False))

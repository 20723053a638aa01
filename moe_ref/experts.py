"""Grouped rows through their experts (clauses E1, E2, E3): up projection, activation, down projection."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from array_api_compat import array_namespace, device

from moe_ref._typing import Array, Float, Int
from moe_ref.numerics import EXACT, Rounding, matmul_transposed
from moe_ref.routing import sigmoid
from moe_ref.types import MoEConfig, MoEWeights


@dataclass(frozen=True, eq=False)
class Expert:
    """One expert's parameters, widened to float64."""

    gate_up_proj: Float[Array, "2*I H"]
    down_proj: Float[Array, "H I"]
    gate_up_proj_bias: Float[Array, " 2*I"] | None
    down_proj_bias: Float[Array, " H"] | None


def expert(weights: MoEWeights, index: int) -> Expert:
    """Widens one expert: the stack stays in its own dtype, so that a real layer fits in memory."""
    xp = array_namespace(weights.gate_up_proj)

    def widen(stack: Array | None) -> Array | None:
        return None if stack is None else xp.astype(stack[index, ...], xp.float64)

    return Expert(
        widen(weights.gate_up_proj),
        widen(weights.down_proj),
        widen(weights.gate_up_proj_bias),
        widen(weights.down_proj_bias),
    )


def groups(group_offsets: Int[Array, " E+1"]) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, with the rows it has."""
    for index in range(group_offsets.shape[0] - 1):
        start, stop = int(group_offsets[index]), int(group_offsets[index + 1])
        if start < stop:
            yield index, slice(start, stop)


def experts(
    rows: Float[Array, "*#samples S H"],
    group_offsets: Int[Array, " E+1"],
    weights: MoEWeights,
    rounding: Rounding = EXACT,
) -> Float[Array, "*#samples S H"]:
    """Sends each group of rows through its expert; rows past the last group give zero and are never read."""
    xp = array_namespace(rows)
    blocks = []
    for index, where in groups(group_offsets):
        parameters = expert(weights, index)
        z = up(rows[..., where, :], parameters, rounding)
        blocks.append(down(activation(z, weights.config, rounding), parameters, rounding))
    outside = rows.shape[-2] - int(group_offsets[-1])
    shape = blocks[0].shape if blocks else rows.shape
    blocks.append(xp.zeros((*shape[:-2], outside, rows.shape[-1]), dtype=xp.float64, device=device(rows)))
    return xp.concat(blocks, axis=-2)


def up(
    rows: Float[Array, "*#samples n H"], parameters: Expert, rounding: Rounding = EXACT
) -> Float[Array, "*#samples n 2*I"]:
    """The up projection: z = x W_gu^T + b_gu."""
    return linear("gate_up", "z", rows, parameters.gate_up_proj, parameters.gate_up_proj_bias, rounding)


def down(
    h: Float[Array, "*#samples n I"], parameters: Expert, rounding: Rounding = EXACT
) -> Float[Array, "*#samples n H"]:
    """The down projection: o = h W_d^T + b_d."""
    return linear("down", "o", h, parameters.down_proj, parameters.down_proj_bias, rounding)


def linear(
    product_site: str,
    site: str,
    rows: Float[Array, "*#samples n k"],
    matrix: Float[Array, "m k"],
    bias: Float[Array, " m"] | None,
    rounding: Rounding,
) -> Float[Array, "*#samples n m"]:
    """Rows matrix^T + bias; an implementation may round the product before its bias, and the sum."""
    product = matmul_transposed(rounding, product_site, rows, matrix)
    if bias is None:
        return rounding.store(site, product)
    xp = array_namespace(product)
    total = rounding.store(product_site, product) + bias
    return rounding.store(site, rounding.accumulate(site, total, lambda: xp.abs(total)))


def split_gate_up(
    z: Float[Array, "*#samples n 2*I"], config: MoEConfig
) -> tuple[Float[Array, "*#samples n I"], Float[Array, "*#samples n I"]]:
    """(gate, up), by ``gate_up_layout``."""
    if config.gate_up_layout == "interleaved":
        return z[..., 0::2], z[..., 1::2]
    half = z.shape[-1] // 2
    return z[..., :half], z[..., half:]


def join_gate_up(
    gate: Float[Array, "*#samples n I"], up: Float[Array, "*#samples n I"], config: MoEConfig
) -> Float[Array, "*#samples n 2*I"]:
    """The inverse of `split_gate_up`."""
    xp = array_namespace(gate, up)
    if config.gate_up_layout == "interleaved":
        return xp.reshape(xp.stack([gate, up], axis=-1), (*gate.shape[:-1], 2 * gate.shape[-1]))
    return xp.concat([gate, up], axis=-1)


def activation(
    z: Float[Array, "*#samples n 2*I"], config: MoEConfig, rounding: Rounding = EXACT
) -> Float[Array, "*#samples n I"]:
    """The activation h = (clamp(u, -L, L) + up_offset) * g' * sigmoid(alpha g') with g' = min(g, L).

    Source: SwiGLU from Shazeer 2020 (arXiv:2002.05202); the clamped form from gpt-oss's model code.
    """
    xp = array_namespace(z)
    gate, up = split_gate_up(z, config)
    if config.limit is not None:
        gate = xp.clip(gate, max=config.limit)
        up = xp.clip(up, min=-config.limit, max=config.limit)
    act = gate * sigmoid(config.alpha * gate)
    act = rounding.store("act", rounding.accumulate("act", act, lambda: xp.abs(act)))
    h = (up + config.up_offset) * act
    return rounding.store("h", rounding.accumulate("h", h, lambda: xp.abs(h)))

"""Grouped rows through their experts (clauses E1, E2, E3): up projection, activation, down projection.

And their backward pass (D1, D2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from array_api_compat import array_namespace, device

from moe_ref._typing import Array, Float, Int
from moe_ref.activations import activation, activation_vjp
from moe_ref.blocks import blocks_of, joined
from moe_ref.numerics import EXACT, Rounding, matmul_transposed, sum_sd
from moe_ref.packed import decode_expert
from moe_ref.types import PARAMETERS, MoEWeights

RowsOf = Mapping[str, Int[Array, " n"]]  # of "gate_up_proj" and so on: the rows of its gradient that are computed


@dataclass(frozen=True, eq=False)
class Linear:
    """One expert's projection from k to m features, widened to float64, with its adapter of rank r."""

    matrix: Float[Array, "m k"]
    bias: Float[Array, " m"] | None = None
    lora_a: Float[Array, "r k"] | None = None
    lora_b: Float[Array, "m r"] | None = None
    scaling: float = 1.0


@dataclass(frozen=True, eq=False)
class Expert:
    """One expert's parameters."""

    up: Linear
    down: Linear


def expert(weights: MoEWeights, index: int) -> Expert:
    """Widens one expert: the stack stays in its own dtype, or in 4 bits, so that a real layer fits in memory."""
    parameters = {name: stack[index, ...] for name, stack in weights.parameters().items() if name in PARAMETERS}
    parameters |= {name: decode_expert(stack, index) for name, stack in weights.packed().items()}
    xp = array_namespace(parameters["gate_up_proj"])
    own = {name: xp.astype(value, xp.float64) for name, value in parameters.items()}
    lora = weights.lora
    scalings = (1.0, 1.0) if lora is None else (lora.gate_up_scaling, lora.down_scaling)
    return Expert(
        *(
            Linear(
                own[f"{name}_proj"],
                own.get(f"{name}_proj_bias"),
                own.get(f"{name}_lora_a"),
                own.get(f"{name}_lora_b"),
                scaling,
            )
            for name, scaling in zip(("gate_up", "down"), scalings, strict=True)
        )
    )


def experts(
    rows: Float[Array, "*#samples S H"],
    group_offsets: Int[Array, " E+1"],
    weights: MoEWeights,
    rounding: Rounding = EXACT,
) -> Float[Array, "*#samples S H"]:
    """Sends each group of rows through its expert; rows past the last group give zero and are never read."""
    blocks, outputs = blocks_of(group_offsets, rows.shape[-2]), []
    for block in blocks:
        parameters = expert(weights, block.index)
        z = up(block.take(rows), parameters, rounding)
        outputs.append(down(activation(z, weights.config, rounding), parameters, rounding))
    return joined(blocks, outputs, rows)


def up(
    rows: Float[Array, "*#samples n H"], parameters: Expert, rounding: Rounding = EXACT
) -> Float[Array, "*#samples n J"]:
    """The up projection: z = x W_gu^T + b_gu."""
    return linear("gate_up", "z", rows, parameters.up, rounding)


def down(
    h: Float[Array, "*#samples n I"], parameters: Expert, rounding: Rounding = EXACT
) -> Float[Array, "*#samples n H"]:
    """The down projection: o = h W_d^T + b_d."""
    return linear("down", "o", h, parameters.down, rounding)


def linear(
    product_site: str,
    site: str,
    rows: Float[Array, "*#samples n k"],
    parameters: Linear,
    rounding: Rounding = EXACT,
) -> Float[Array, "*#samples n m"]:
    """Rows matrix^T + scaling (rows A^T) B^T + bias.

    An implementation may round the product before what is added to it, the adapter's intermediates, and the sum.
    """
    product = matmul_transposed(rounding, product_site, rows, parameters.matrix)
    if parameters.bias is None and parameters.lora_a is None:
        return rounding.store(site, product)
    xp = array_namespace(product)
    total = rounding.store(product_site, product)
    size = xp.zeros_like(total)
    if parameters.lora_a is not None:
        delta = rounding.store(
            f"{product_site}_lora",
            matmul_transposed(
                rounding,
                f"{product_site}_lora",
                lora_inner(product_site, rows, parameters, rounding),
                parameters.lora_b,
            ),
        )
        size = xp.abs(total)
        total = total + delta
    if parameters.bias is not None:
        total = total + parameters.bias
    return rounding.store(site, rounding.accumulate(site, total, lambda: xp.abs(total) + size))


def lora_inner(
    product_site: str, rows: Float[Array, "*#samples n k"], parameters: Linear, rounding: Rounding = EXACT
) -> Float[Array, "*#samples n r"]:
    """What stands between an adapter's factors (clause E6): scaling (rows A^T)."""
    name = f"{product_site}_lora_inner"
    inner = rounding.store(name, matmul_transposed(rounding, name, rows, parameters.lora_a))
    return rounding.store(f"{name}_scaled", parameters.scaling * inner)


def experts_vjp(
    rows: Float[Array, "*#samples S H"],
    group_offsets: Int[Array, " E+1"],
    weights: MoEWeights,
    d_outputs: Float[Array, "*#samples S H"],
    rounding: Rounding = EXACT,
    rows_of: RowsOf | None = None,
) -> tuple[Float[Array, "*#samples S H"], Float[Array, "*#samples S H"], dict[str, Array]]:
    """Outputs as of `experts`, gradients of rows, and of every parameter by name.

    An expert without rows has gradients of exactly zero (D2). With ``rows_of``, only the rows that it names are
    computed of a matrix's or a factor's gradient.
    """
    xp = array_namespace(rows, d_outputs)
    blocks = blocks_of(group_offsets, rows.shape[-2])
    outputs, d_rows, found = [], [], {}
    for block in blocks:
        output, d_block, d_parameters = expert_vjp(
            block.take(rows), weights, block.index, block.take(d_outputs), rounding, rows_of
        )
        outputs.append(output)
        d_rows.append(d_block)
        found[block.index] = {name: None if d is None else block.gradient(d) for name, d in d_parameters.items()}
    samples = d_rows[0].shape[:-2] if d_rows else rows.shape[:-2]

    def stack(name: str, parameter: Array) -> Array:
        shape = (*samples, *parameter.shape[1:])
        if rows_of is not None and name in rows_of:
            shape = (*samples, rows_of[name].shape[0], parameter.shape[2])
        zero = xp.zeros(shape, dtype=xp.float64, device=device(rows))
        parts = [xp.broadcast_to(found[e][name], shape) if e in found else zero for e in range(weights.num_experts)]
        return xp.stack(parts, axis=len(samples))

    stacks = {name: stack(name, parameter) for name, parameter in weights.parameters().items() if name in PARAMETERS}
    return joined(blocks, outputs, rows), joined(blocks, d_rows, rows), stacks


def expert_vjp(
    rows: Float[Array, "*#samples n H"],
    weights: MoEWeights,
    index: int,
    d_outputs: Float[Array, "*#samples n H"],
    rounding: Rounding = EXACT,
    rows_of: RowsOf | None = None,
) -> tuple[Float[Array, "*#samples n H"], Float[Array, "*#samples n H"], dict[str, Array]]:
    """One expert: its output, and the gradients of rows, and of its parameters by name."""
    parameters = expert(weights, index)
    z = up(rows, parameters, rounding)
    h = activation(z, weights.config, rounding)
    output = down(h, parameters, rounding)
    d_down = linear_vjp("down", "dh", h, parameters.down, d_outputs, rounding, rows_of)
    dz = activation_vjp(z, weights.config, d_down.rows, rounding)
    d_up = linear_vjp("gate_up", "dx_slot", rows, parameters.up, dz, rounding, rows_of)
    found = {}
    for name, gradients in (("gate_up", d_up), ("down", d_down)):
        found[f"{name}_proj"], found[f"{name}_proj_bias"] = gradients.matrix, gradients.bias
        found[f"{name}_lora_a"], found[f"{name}_lora_b"] = gradients.lora_a, gradients.lora_b
    return output, d_up.rows, found


class LinearGradients(NamedTuple):
    """Gradients of a projection's input and parameters."""

    rows: Array
    matrix: Array
    bias: Array
    lora_a: Array | None
    lora_b: Array | None


def linear_vjp(
    product_site: str,
    site: str,
    rows: Float[Array, "*#samples n k"],
    parameters: Linear,
    d_out: Float[Array, "*#samples n m"],
    rounding: Rounding = EXACT,
    rows_of: RowsOf | None = None,
) -> LinearGradients:
    """Gradients of rows matrix^T + scaling (rows A^T) B^T + bias."""
    xp = array_namespace(rows, d_out)

    def wanted(name: str, upstream: Array) -> Array:
        """The upstream gradient transposed: each of its rows gives one row of a matrix's gradient."""
        chosen = None if rows_of is None else rows_of.get(f"{product_site}_{name}")
        return xp.matrix_transpose(upstream if chosen is None else xp.take(upstream, chosen, axis=-1))

    d_rows = rounding.store(site, matmul_transposed(rounding, site, d_out, xp.matrix_transpose(parameters.matrix)))
    d_matrix = matmul_transposed(rounding, "d_weight", wanted("proj", d_out), xp.matrix_transpose(rows))
    d_lora_a = d_lora_b = None
    if parameters.lora_a is not None:
        name = f"{site}_lora"
        d_inner = matmul_transposed(rounding, name, d_out, xp.matrix_transpose(parameters.lora_b))
        d_inner = rounding.store(f"{name}_scaled", parameters.scaling * rounding.store(name, d_inner))
        added = matmul_transposed(rounding, f"{name}_rows", d_inner, xp.matrix_transpose(parameters.lora_a))
        added = rounding.store(f"{name}_rows", added)
        total = d_rows + added
        d_rows = rounding.store(f"{site}_sum", rounding.accumulate(f"{site}_sum", total, lambda: xp.abs(total)))
        inner = lora_inner(product_site, rows, parameters, rounding)
        d_lora_b = matmul_transposed(rounding, "d_lora_b", wanted("lora_b", d_out), xp.matrix_transpose(inner))
        d_lora_a = matmul_transposed(rounding, "d_lora_a", wanted("lora_a", d_inner), xp.matrix_transpose(rows))
    length = d_out.shape[-2]
    bias = xp.sum(d_out, axis=-2)
    d_bias = rounding.accumulate("d_bias", bias, lambda: sum_sd(bias, xp.sum(d_out * d_out, axis=-2), length))
    return LinearGradients(d_rows, d_matrix, d_bias, d_lora_a, d_lora_b)

"""Activations in fp32 (clause E1)."""

import triton
import triton.language as tl

from executors.triton.kernels.routing import sigmoid

SQRT_HALF = tl.constexpr(0.7071067811865476)
TWICE_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)


@triton.jit
def act(gate, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr):
    """The activation of each element, without the up half."""
    if ACTIVATION == "relu2":
        positive = tl.where(gate > 0, gate, tl.where(gate == gate, 0.0, gate))  # a NaN stays one
        value = positive * positive
    elif ACTIVATION == "gelu" or ACTIVATION == "geglu":
        value = 0.5 * gate * (1.0 + tl.erf(gate * SQRT_HALF))
    elif ACTIVATION == "gelu_tanh" or ACTIVATION == "geglu_tanh":  # (1 + tanh(v)) / 2 = sigmoid(2v)
        value = gate * sigmoid((gate + 0.044715 * gate * gate * gate) * TWICE_SQRT_2_OVER_PI)
    else:
        value = gate * sigmoid(gate if ALPHA == 1.0 else ALPHA * gate)
    return value


@triton.jit
def gated(gate, up, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, UP_OFFSET: tl.constexpr):
    """h from gate and up: (clamp(u, -L, L) + up_offset) act(min(g, L)); no clamp where LIMIT is None."""
    if LIMIT is not None:
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    return (up if UP_OFFSET == 0.0 else up + UP_OFFSET) * act(gate, ACTIVATION, ALPHA)

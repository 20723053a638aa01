"""Activations in fp32 (clause E1)."""

import triton
import triton.language as tl

from executors._triton.kernels.routing import sigmoid

SQRT_HALF = tl.constexpr(0.7071067811865476)
TWICE_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
ONE_OVER_SQRT_2_PI = tl.constexpr(0.3989422804014327)
STEEP = tl.constexpr(20.0)  # beyond it the slope of the tanh form is 0 or 1 in fp32, and the cube may overflow


@triton.jit
def act(gate, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr):
    """The activation of each element, without the up half; "" for none."""
    if ACTIVATION == "":
        value = gate
    elif ACTIVATION == "relu2":
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


@triton.jit
def slope(gate, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr):
    """The derivative of `act`."""
    if ACTIVATION == "relu2":
        value = 2.0 * tl.where(gate > 0, gate, tl.where(gate == gate, 0.0, gate))
    elif ACTIVATION == "gelu" or ACTIVATION == "geglu":
        density = ONE_OVER_SQRT_2_PI * tl.exp(-0.5 * gate * gate)
        value = 0.5 * (1.0 + tl.erf(gate * SQRT_HALF)) + gate * density
    elif ACTIVATION == "gelu_tanh" or ACTIVATION == "geglu_tanh":
        near = tl.where(gate > STEEP, STEEP, tl.where(gate < -STEEP, -STEEP, gate))
        s = sigmoid((near + 0.044715 * near * near * near) * TWICE_SQRT_2_OVER_PI)
        value = s + near * s * (1.0 - s) * TWICE_SQRT_2_OVER_PI * (1.0 + 0.134145 * near * near)
    else:
        s = sigmoid(gate if ALPHA == 1.0 else ALPHA * gate)
        value = s * (1.0 + (gate if ALPHA == 1.0 else ALPHA * gate) * (1.0 - s))
    return value


@triton.jit
def gated_slopes(gate, up, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, UP_OFFSET: tl.constexpr):
    """The derivatives of `gated` with respect to gate and up. At the limit itself a clamp has the slope 1."""
    near = gate
    far = up
    if LIMIT is not None:
        near = tl.where(gate > LIMIT, LIMIT, gate)
        far = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    of_gate = (far if UP_OFFSET == 0.0 else far + UP_OFFSET) * slope(near, ACTIVATION, ALPHA)
    of_up = act(near, ACTIVATION, ALPHA)
    if LIMIT is not None:
        of_gate = tl.where(gate > LIMIT, 0.0, of_gate)
        of_up = tl.where(tl.abs(up) > LIMIT, 0.0, of_up)
    return of_gate, of_up

"""Activations in fp32 (clause E1)."""

import triton
import triton.language as tl

from executors._triton.kernels.routing import sigmoid

SQRT_HALF = tl.constexpr(0.7071067811865476)
TWICE_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
ONE_OVER_SQRT_2_PI = tl.constexpr(0.3989422804014327)
STEEP = tl.constexpr(20.0)  # beyond it the slope of the tanh form is 0 or 1 in fp32, and the cube may overflow


@triton.jit
def tanh(value):
    """The hyperbolic tangent; near 0 by a polynomial (Cephes' tanhf), where 1 - exp(-2v) would cancel."""
    size = tl.minimum(tl.abs(value), 1.0)
    square = size * size
    near = ((-5.70498872745e-3 * square + 2.06390887954e-2) * square - 5.37397155531e-2) * square
    near = value + value * square * ((near + 1.33314422036e-1) * square - 3.33332819422e-1)
    small = tl.exp(-2.0 * tl.abs(value))
    far = (1.0 - small) / (1.0 + small)
    return tl.where(tl.abs(value) < 0.625, near, tl.where(value < 0, -far, far))


@triton.jit
def softcap(value, CAP: tl.constexpr):
    """CAP tanh(v / CAP)."""
    return CAP * tanh(value / CAP)


@triton.jit
def softcap_slope(value, CAP: tl.constexpr):
    """The derivative of `softcap`."""
    bounded = tanh(value / CAP)
    return 1.0 - bounded * bounded


@triton.jit
def act(gate, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, GATE_SOFTCAP: tl.constexpr = None):
    """The activation of each element, without the up half; "" is for none. The sigmoid sees the uncapped gate."""
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
        s = sigmoid(gate if ALPHA == 1.0 else ALPHA * gate)
        value = (gate if GATE_SOFTCAP is None else softcap(gate, GATE_SOFTCAP)) * s
    return value


@triton.jit
def gated(
    gate,
    up,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    LATE: tl.constexpr,
    GATE_SOFTCAP: tl.constexpr,
    UP_SOFTCAP: tl.constexpr,
):
    """h from gate and up: (clamp(u, -L, L) + up_offset) act(min(g, L)), or min(act(g), L) where LATE.

    There is no clamp where LIMIT is None; the caps, if there are any, are `softcap`.
    """
    if LIMIT is not None:
        if not LATE:
            gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    if UP_SOFTCAP is not None:
        up = softcap(up, UP_SOFTCAP)
    value = act(gate, ACTIVATION, ALPHA, GATE_SOFTCAP)
    if LATE:
        value = tl.where(value > LIMIT, LIMIT, value)
    return (up if UP_OFFSET == 0.0 else up + UP_OFFSET) * value


@triton.jit
def slope(gate, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, GATE_SOFTCAP: tl.constexpr = None):
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
        if GATE_SOFTCAP is None:
            value = s * (1.0 + (gate if ALPHA == 1.0 else ALPHA * gate) * (1.0 - s))
        else:
            value = s * (softcap_slope(gate, GATE_SOFTCAP) + ALPHA * softcap(gate, GATE_SOFTCAP) * (1.0 - s))
    return value


@triton.jit
def gated_slopes(
    gate,
    up,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    LATE: tl.constexpr,
    GATE_SOFTCAP: tl.constexpr,
    UP_SOFTCAP: tl.constexpr,
):
    """The derivatives of `gated` with respect to gate and up; at the limit itself a clamp has the slope 1."""
    near = gate
    far = up
    if LIMIT is not None:
        if not LATE:
            near = tl.where(gate > LIMIT, LIMIT, gate)
        far = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    if UP_SOFTCAP is not None:
        far = softcap(up, UP_SOFTCAP)
    of_gate = (far if UP_OFFSET == 0.0 else far + UP_OFFSET) * slope(near, ACTIVATION, ALPHA, GATE_SOFTCAP)
    of_up = act(near, ACTIVATION, ALPHA, GATE_SOFTCAP)
    if LATE:
        of_gate = tl.where(of_up > LIMIT, 0.0, of_gate)
        of_up = tl.where(of_up > LIMIT, LIMIT, of_up)
    elif LIMIT is not None:
        of_gate = tl.where(gate > LIMIT, 0.0, of_gate)
    if LIMIT is not None:
        of_up = tl.where(tl.abs(up) > LIMIT, 0.0, of_up)
    if UP_SOFTCAP is not None:
        of_up *= softcap_slope(up, UP_SOFTCAP)
    return of_gate, of_up

"""What a gate computes is found by its values: every gate that MoEConfig expresses, and no other."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from executors._base.arguments import Activation
from executors.hf.gate import gate_of, plain_of

Gate = Callable[[Tensor], Tensor]
LAYOUTS = ("concatenated", "interleaved")


def gate(
    act: Callable[[Tensor], Tensor],
    layout: str = "concatenated",
    limit: float = torch.inf,
    up_offset: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> Gate:
    """A gate as modeling code writes it, evaluated in ``dtype``."""

    def apply(z: Tensor) -> Tensor:
        narrow = z.to(dtype)
        g, u = narrow.chunk(2, dim=-1) if layout == "concatenated" else (narrow[..., ::2], narrow[..., 1::2])
        return (act(g.clamp(max=limit)) * (u.clamp(-limit, limit) + up_offset)).to(z.dtype)

    return apply


def swish(alpha: float) -> Callable[[Tensor], Tensor]:
    return lambda g: g * torch.sigmoid(alpha * g)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_clamped_swiglu_is_found(layout: str, dtype: torch.dtype) -> None:
    for alpha, limit, offset in itertools.product((1.0, 1.702, 0.5), (torch.inf, 7.0, 10.0, 0.25, 1.2345), (0.0, 1.0)):
        found = gate_of(gate(swish(alpha), layout, limit, offset, dtype))
        cut = None if limit == torch.inf else limit
        assert found == Activation("swiglu", alpha, cut, offset, layout), (alpha, limit, offset)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_kinds_of_gelu_are_told_apart(layout: str) -> None:
    for name, approximate in (("geglu", "none"), ("geglu_tanh", "tanh")):
        found = gate_of(gate(lambda g, how=approximate: F.gelu(g, approximate=how), layout))
        assert found == Activation(name, 1.0, None, 0.0, layout)


def softcap(value: Tensor) -> Tensor:
    return 5.0 * torch.tanh(value / 5.0)


def capped(z: Tensor) -> Tensor:
    g, u = z.chunk(2, dim=-1)
    return softcap(g) * torch.sigmoid(g) * softcap(u)


def clamped_late(z: Tensor) -> Tensor:
    g, u = z.chunk(2, dim=-1)
    return F.silu(g).clamp(max=7.0) * u.clamp(-7.0, 7.0)


def swapped(z: Tensor) -> Tensor:
    u, g = z.chunk(2, dim=-1)
    return F.silu(g) * u


def clamped_gate_only(z: Tensor) -> Tensor:
    g, u = z.chunk(2, dim=-1)
    return F.silu(g.clamp(max=7.0)) * u


def clamped_from_below(z: Tensor) -> Tensor:
    g, u = z.chunk(2, dim=-1)
    return F.silu(g.clamp(-7.0, 7.0)) * u.clamp(-7.0, 7.0)


@pytest.mark.parametrize(
    "apply",
    [
        capped,
        clamped_late,
        swapped,
        clamped_gate_only,
        clamped_from_below,
        gate(F.relu),
        gate(F.mish),
        gate(torch.sigmoid),
        gate(F.gelu, limit=7.0),
        lambda z: z.chunk(2, dim=-1)[0] + z.chunk(2, dim=-1)[1],
        lambda z: z[..., ::2] * z.chunk(2, dim=-1)[1],
    ],
)
def test_what_no_configuration_says_is_not_found(apply: Gate) -> None:
    assert gate_of(apply) is None


def test_activations_without_a_gate() -> None:
    tanh = Activation("gelu_tanh", 1.0, None, 0.0, "")
    assert plain_of(F.silu) == tanh._replace(name="silu")
    assert plain_of(F.gelu) == tanh._replace(name="gelu")
    assert plain_of(lambda z: F.gelu(z, approximate="tanh")) == tanh
    assert plain_of(lambda z: F.relu(z).square()) == tanh._replace(name="relu2")
    for other in (F.relu, F.mish, swish(1.702), torch.sigmoid):
        assert plain_of(other) is None

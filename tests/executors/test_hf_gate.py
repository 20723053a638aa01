"""What a gate computes is found by its values: every gate that MoEConfig expresses, and no other."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from executors._base.arguments import Activation
from executors.hf.gate import as_config, gate_of, plain_of
from moe_ref import MoEConfig

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
    return of_halves(lambda g, u: act(g.clamp(max=limit)) * (u.clamp(-limit, limit) + up_offset), layout, dtype)


def of_halves(h: Callable[[Tensor, Tensor], Tensor], layout: str, dtype: torch.dtype) -> Gate:
    """A gate from what it does with its halves."""

    def apply(z: Tensor) -> Tensor:
        narrow = z.to(dtype)
        g, u = narrow.chunk(2, dim=-1) if layout == "concatenated" else (narrow[..., ::2], narrow[..., 1::2])
        return h(g, u).to(z.dtype)

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


def clamped_late(
    alpha: float = 1.0,
    limit: float = 7.0,
    up_offset: float = 0.0,
    layout: str = "concatenated",
    dtype: torch.dtype = torch.float64,
) -> Gate:
    """Step-3.7-Flash's, and the same with gpt-oss' slope and offset."""
    act = swish(alpha)
    return of_halves(lambda g, u: act(g).clamp(max=limit) * (u.clamp(-limit, limit) + up_offset), layout, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_clamp_after_the_activation_is_found(layout: str, dtype: torch.dtype) -> None:
    for alpha, limit, offset in itertools.product((1.0, 1.702, 0.5), (7.0, 4.0, 0.25, 1.2345), (0.0, 1.0)):
        found = gate_of(clamped_late(alpha, limit, offset, layout, dtype))
        assert found == Activation("swiglu", alpha, limit, offset, layout, "after"), (alpha, limit, offset)


def test_a_clamp_so_far_out_that_its_place_does_not_show_is_found() -> None:
    for clamped in (gate(F.silu, limit=16.0, dtype=torch.float32), clamped_late(limit=16.0, dtype=torch.float32)):
        found = gate_of(clamped)
        assert found is not None
        assert found._replace(clamp="before") == Activation("swiglu", 1.0, 16.0, 0.0, "concatenated")


def softcap(value: Tensor, cap: float | None) -> Tensor:
    return value if cap is None else cap * torch.tanh(value / cap)


def capped(
    gate_softcap: float | None = 5.0,
    up_softcap: float | None = 5.0,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    layout: str = "concatenated",
    dtype: torch.dtype = torch.float64,
) -> Gate:
    """Inkling 2's, and others like it."""

    def h(g: Tensor, u: Tensor) -> Tensor:
        return softcap(g, gate_softcap) * torch.sigmoid(alpha * g) * (softcap(u, up_softcap) + up_offset)

    return of_halves(h, layout, dtype)


CAPS = ((4.0, 25.0), (5.0, 5.0), (7.0, None), (None, 30.0), (0.5, 0.125), (1.2345, 100.0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_softcaps_are_found(layout: str, dtype: torch.dtype) -> None:
    for caps, alpha, offset in itertools.product(CAPS, (1.0, 1.702, 0.5, -1.0), (0.0, 1.0)):
        found = gate_of(capped(*caps, alpha, offset, layout, dtype))
        assert found == Activation("swiglu", alpha, None, offset, layout, "before", *caps), (caps, alpha, offset)


def test_what_was_found_is_a_configuration() -> None:
    late, soft = gate_of(clamped_late()), gate_of(capped(4.0, 25.0, 1.702, 1.0, "interleaved"))
    assert late is not None
    assert soft is not None
    assert MoEConfig(None, **as_config(late)) == MoEConfig(None, limit=7.0, clamp="after")
    forms = {"alpha": 1.702, "up_offset": 1.0, "gate_softcap": 4.0, "up_softcap": 25.0}
    assert MoEConfig(None, **as_config(soft)) == MoEConfig(None, **forms, gate_up_layout="interleaved")


def sigmoid_of_capped_gate(z: Tensor) -> Tensor:
    g, u = z.chunk(2, dim=-1)
    return F.silu(softcap(g, 5.0)) * softcap(u, 5.0)


def clamped_late_on_both_sides(z: Tensor) -> Tensor:
    g, u = z.chunk(2, dim=-1)
    return F.silu(g).clamp(-0.125, 0.5) * u.clamp(-0.5, 0.5)


def clamped_late_gate_only(z: Tensor) -> Tensor:
    g, u = z.chunk(2, dim=-1)
    return F.silu(g).clamp(max=7.0) * u


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
        sigmoid_of_capped_gate,
        clamped_late_on_both_sides,
        clamped_late_gate_only,
        swapped,
        lambda z: F.silu(z.chunk(2, dim=-1)[0].clamp(max=61.0)) * z.chunk(2, dim=-1)[1],
        lambda z: F.silu(z.chunk(2, dim=-1)[0].clamp(max=5000.0)) * z.chunk(2, dim=-1)[1],
        lambda z: F.silu(z.chunk(2, dim=-1)[0].clamp(min=-61.0)) * z.chunk(2, dim=-1)[1].clamp(min=-400.0),
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
    for clamped in (100.0, 5000.0):
        assert plain_of(lambda z, limit=clamped: F.relu(z.clamp(max=limit)).square()) is None
        assert plain_of(lambda z, limit=clamped: F.silu(z.clamp(max=limit))) is None
    for other in (F.relu, F.mish, swish(1.702), torch.sigmoid):
        assert plain_of(other) is None

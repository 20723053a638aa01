"""What a gate computes is found by its values, and only if there is a configuration for it."""

import random

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="the extra moe-ref[hf]")

from executors._base.arguments import Activation
from executors._pipeline import activation
from executors.hf.gate import as_config, gate_of, plain_of
from moe_ref import MoEConfig


@pytest.mark.parametrize("seed", range(12))
def test_a_clamped_gate_is_found(seed: int) -> None:
    """Whatever its numbers, if they have few digits; in the dtype that it computes in."""
    made = random.Random(seed)
    expected = Activation(
        "swiglu",
        float(f"{made.choice([1, 1, made.uniform(0.3, 3)]):.4g}"),
        made.choice([None, 7.0, 10.0, float(f"{made.uniform(0.5, 40):.3g}")]),
        made.choice([0.0, 0.0, 1.0, -0.5, float(f"{made.uniform(0.1, 2):.3g}")]),
        made.choice(["concatenated", "interleaved"]),
    )
    assert gate_of(lambda z: activation.forward(z, expected)) == expected
    assert gate_of(lambda z: activation.forward(z.float(), expected)) == expected


@pytest.mark.parametrize("name", ["swiglu", "geglu", "geglu_tanh"])
@pytest.mark.parametrize("layout", ["concatenated", "interleaved"])
def test_a_gate_is_found(name: str, layout: str) -> None:
    expected = Activation(name, 1.0, None, 0.0, layout)
    assert gate_of(lambda z: activation.forward(z, expected)) == expected
    config = MoEConfig(None, **as_config(expected))
    assert (config.activation, config.gate_up_layout) == (name, layout)


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (nn.SiLU(), "silu"),
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (lambda z: z.relu().square(), "relu2"),
        (nn.ReLU(), None),
        (nn.Mish(), None),
        (nn.Identity(), None),
        (lambda z: 1.0001 * nn.functional.silu(z), None),
    ],
)
def test_an_activation_is_found(act: nn.Module, name: str | None) -> None:
    found = plain_of(act)
    assert (found and found.name) == name


def test_a_gate_of_another_kind_is_not_found() -> None:
    """Near to one that is known, but not it."""

    def halves(z: Tensor) -> tuple[Tensor, Tensor]:
        return z.chunk(2, dim=-1)

    silu, gelu = nn.functional.silu, nn.functional.gelu
    strange = {
        "softcapped": lambda g, u: torch.tanh(g / 7) * 7 * torch.sigmoid(g) * u,
        "clamped after": lambda g, u: silu(g).clamp(max=7) * u,
        "clamped on one side": lambda g, u: silu(g) * u.clamp(max=7),
        "clamped from below": lambda g, u: silu(g.clamp(-7, 7)) * u.clamp(-7, 7),
        "two limits": lambda g, u: silu(g.clamp(max=5)) * u.clamp(-7, 7),
        "gelu with a limit": lambda g, u: gelu(g.clamp(max=7)) * u.clamp(-7, 7),
        "relu": lambda g, u: g.relu() * u,
        "quick gelu is swiglu": lambda g, u: g * torch.sigmoid(1.702 * g) * u,
        "scaled": lambda g, u: 1.001 * silu(g) * u,
        "swapped": lambda g, u: silu(u) * g,
        "sum": lambda g, u: silu(g) + u,
    }
    found = {name: gate_of(lambda z, act=act: act(*halves(z))) for name, act in strange.items()}
    known = {name for name, activation in found.items() if activation is not None}
    assert known == {"quick gelu is swiglu"}
    assert found["quick gelu is swiglu"].alpha == 1.702

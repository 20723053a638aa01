"""Gate and up with an adapter each as one of gate_up_proj, and the way back: exact in both layouts."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="the extra moe-ref[hf]")

import executors
import families
import moe_ref
from executors.hf import join_gate_and_up
from executors.hf.adapters import split_gate_and_up
from executors.hf.checkpoint_names import names_of_experts
from executors.hf.parameters import up_name

pytestmark = pytest.mark.usefixtures("one_thread")
E, H, R, Q = 3, 8, 2, 4
I = 6  # noqa: E741
each_layout = pytest.mark.parametrize("layout", ["concatenated", "interleaved"])


def drawn(*shape: int, seed: int) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=made, dtype=torch.float64).requires_grad_()


def factors() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return drawn(E, R, H, seed=1), drawn(E, I, R, seed=2), drawn(E, Q, H, seed=3), drawn(E, I, Q, seed=4)


@each_layout
@pytest.mark.parametrize("scalings", [(1.0, 1.0), (0.5, 0.5), (0.5, 3.0)])
def test_gate_and_up_are_joined(layout: Any, scalings: tuple[float, float]) -> None:
    """The layer's results, and gradients of all four factors, are those of the merged matrices."""
    config = moe_ref.MoEConfig(2, gate_up_layout=layout, alpha=1.5)
    weights = moe_ref.MoEWeights(drawn(E, 2 * I, H, seed=5), drawn(E, H, I, seed=6), config=config)
    gate_a, gate_b, up_a, up_b = own = factors()
    lora = join_gate_and_up(*own, layout=layout, gate_scaling=scalings[0], up_scaling=scalings[1])
    assert lora.gate_up_lora_a.shape == (E, R + Q, H)
    assert lora.gate_up_lora_b.shape == (E, 2 * I, R + Q)
    rows = torch.arange(2 * I).reshape(2, I) if layout == "concatenated" else torch.arange(2 * I).reshape(I, 2).T
    delta = torch.zeros(E, 2 * I, H, dtype=torch.float64)
    delta = delta.index_copy(1, rows[0], scalings[0] * gate_b @ gate_a)
    delta = delta.index_copy(1, rows[1], scalings[1] * up_b @ up_a)
    x, logits = drawn(5, H, seed=7), drawn(5, E, seed=8)
    native = executors.get("native")
    y = native(x, logits, replace(weights, lora=lora))
    expected = native(x, logits, replace(weights, gate_up_proj=weights.gate_up_proj + delta))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for actual, wanted in zip(*(torch.autograd.grad(each.sum(), own) for each in (y, expected)), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-11, atol=1e-11)


@each_layout
def test_a_joined_adapter_is_split(layout: Any) -> None:
    _, gate_b, _, up_b = own = factors()
    lora = join_gate_and_up(*own, layout=layout)
    gate, up = split_gate_and_up(lora.gate_up_lora_b, layout)
    assert torch.equal(gate, torch.cat([gate_b, torch.zeros(E, I, Q)], 2))
    assert torch.equal(up, torch.cat([torch.zeros(E, I, R), up_b], 2))


def test_down_is_added() -> None:
    a, b = drawn(E, R, I, seed=9), drawn(E, H, R, seed=10)
    lora = replace(join_gate_and_up(*factors(), layout="concatenated"), down_lora_a=a, down_lora_b=b)
    weights = moe_ref.MoEWeights(
        drawn(E, 2 * I, H, seed=5), drawn(E, H, I, seed=6), lora=lora, config=moe_ref.MoEConfig(2)
    )
    assert executors.get("native")(drawn(5, H, seed=7), drawn(5, E, seed=8), weights).shape == (5, H)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gate_a": torch.ones(E, R)}, r"gate_a.shape=\(3, 2\), gate_b.shape=\(3, 6, 2\): must be \(E, r, H\) and"),
        ({"up_b": torch.ones(E, I, R)}, r"up_a.shape=\(3, 4, 8\), up_b.shape=\(3, 6, 2\): must be \(E, r, H\) and"),
        ({"up_a": torch.ones(E, Q, 5)}, r"up_a.shape=\(3, 4, 5\): must fit gate's \(3, 2, 8\) but for the rank"),
        ({"up_b": torch.ones(E, 5, Q)}, r"up_b.shape=\(3, 5, 4\): must fit gate's \(3, 6, 2\) but for the rank"),
        ({"gate_b": None}, "gate_b=None: must be an array"),
        ({"up_scaling": torch.ones(2)}, r"up_scaling=tensor\(\[1., 1.\]\): must be a float or int"),
        ({"layout": "stacked"}, "layout='stacked': must be 'concatenated' or 'interleaved'"),
    ],
)
def test_refusals(changes: dict[str, Any], said: str) -> None:
    given = dict(zip(("gate_a", "gate_b", "up_a", "up_b"), factors(), strict=True)) | {"layout": "concatenated"}
    with pytest.raises((TypeError, ValueError), match=f"^{said}"):
        join_gate_and_up(**given | changes)


@pytest.mark.nightly
@pytest.mark.parametrize("family", families.families(), ids=str)
def test_each_matrix_has_a_name_of_its_own(family: families.Family) -> None:
    model = families.build(family)
    for path, module in families.experts_of(model, family).items():
        up, down = (names_of_experts(model, path, module, name, 4) for name in (up_name(module), "down_proj"))
        assert {len(names) for names in up} == {2 if module.has_gate else 1}
        found = [name for names in (*up, *down) for name in names]
        assert len(set(found)) == len(found)
        assert all(f".{expert}." in name for own in (up, down) for expert in range(4) for name in own[expert])

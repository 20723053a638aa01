"""What makes adapters fast on a CPU changes no bit: parts of rows, halves of words, turned products."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import executors
from executors import nf4
from executors._pipeline import cpu_product, loop
from executors._pipeline.halves import join, split_wide
from moe_ref import ExpertLoRA, MoEConfig, MoEWeights

T, E, K, H, I, R = 40, 5, 2, 32, 24, 3  # noqa: E741
CONFIG = MoEConfig(K, alpha=1.7, limit=1.0, up_offset=1.0, gate_up_layout="interleaved")


def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def layer(kind: str) -> tuple[MoEWeights, list[Tensor]]:
    """Weights with biases and adapters in fp32, and what has a gradient."""
    wide = torch.float32
    shapes = (E, R, H), (E, 2 * I, R), (E, R, I), (E, H, R)
    factors = [drawn(*shape, dtype=wide).requires_grad_() for shape in shapes]
    weights = MoEWeights(
        drawn(E, 2 * I, H),
        drawn(E, H, I),
        drawn(E, 2 * I),
        drawn(E, H),
        lora=ExpertLoRA(*factors, gate_up_scaling=0.5, down_scaling=2.0),
        config=CONFIG,
    )
    return (weights if kind == "dense" else nf4.quantize(weights)), factors


def results(name: str, weights: MoEWeights, factors: list[Tensor], seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    x, logits, dy = drawn(T, H).requires_grad_(), drawn(T, E).requires_grad_(), drawn(T, H)
    y = executors.get(name)(x, logits, weights)
    return [y, *torch.autograd.grad(y, [x, logits, *factors], dy)]


@pytest.mark.parametrize(
    ("name", "kind"), [("native", "dense"), ("grouped_nf4", "nf4"), ("numba", "dense"), ("numba", "nf4")]
)
def test_parts_have_the_bits_of_the_whole(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name not in executors.available():
        pytest.skip(f"{name} is not available")
    torch.manual_seed(0)
    weights, factors = layer(kind)
    whole = results(name, weights, factors, 1)
    seen = []
    plain = loop.LoopProducts.parts

    def parts(self: Any, width: int) -> Any:
        found = list(plain(self, width))
        seen.append(len(found))
        return iter(found)

    monkeypatch.setattr(loop.LoopProducts, "parts", parts)
    monkeypatch.setattr(loop, "IN_CACHE", 0)
    monkeypatch.setattr(cpu_product, "TURNED", 10**9)  # or it would depend on the rows of a part
    in_parts = results(name, weights, factors, 1)
    assert min(seen) > 1
    if name == "numba":  # a few rows are multiplied by kernels, and all experts in one call
        torch.testing.assert_close(in_parts, whole, rtol=1e-2, atol=1e-2)
    else:
        assert all(torch.equal(*pair) for pair in zip(in_parts, whole, strict=True))


@pytest.mark.parametrize("layout", ["interleaved", "concatenated"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("odd", [False, True])
def test_halves_of_words(layout: str, dtype: torch.dtype, odd: bool) -> None:
    """Every bit pattern, apart and together, where a pair is a word and where it is none."""
    every = torch.arange(2**16).to(torch.int32).to(torch.int16).view(torch.bfloat16)
    finite = every.nan_to_num(1.0, 2.0, -3.0) if dtype != torch.bfloat16 else every
    room = torch.zeros(2**16 + 1, dtype=dtype)
    z = (room[1:] if odd else room[:-1]).copy_(finite).view(-1, 2**7)
    gate, up = split_wide(z, layout)
    own = (z[:, 0::2], z[:, 1::2]) if layout == "interleaved" else z.chunk(2, 1)
    for found, half in zip((gate, up), own, strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found.nan_to_num(7.0), half.float().nan_to_num(7.0))
        assert torch.equal(found.isnan(), half.isnan())
        assert torch.equal(found.signbit(), half.signbit())
    halfway = torch.rand_like(gate) * 1e-3
    again = torch.empty_like(room)[1:] if odd else torch.empty_like(room)[:-1]
    join(again.view(z.shape), layout, gate + halfway, up - halfway)
    expected = torch.empty_like(z)
    views = (expected[:, 0::2], expected[:, 1::2]) if layout == "interleaved" else expected.chunk(2, 1)
    for view, value in zip(views, (gate + halfway, up - halfway), strict=True):
        view.copy_(value)
    assert torch.equal(again.view(z.shape).nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [1, 8, 16, 17])
def test_turned_products(dtype: torch.dtype, columns: int) -> None:
    a, b = (torch.randint(-9, 9, shape).to(dtype) for shape in ((64, 40), (40, columns)))
    out = torch.empty(64, columns, dtype=dtype)
    cpu_product.multiply(a, b, out)
    assert torch.equal(out, a @ b)
    cpu_product.multiply_outer(a.t().contiguous(), b, out)
    assert torch.equal(out, a @ b)
    strided = torch.empty(columns, 64, dtype=dtype).t()
    cpu_product.multiply(a, b.t().contiguous().t(), strided)
    assert torch.equal(strided, a @ b)


def test_no_zeros_are_made_for_what_has_no_gradient() -> None:
    """Autograd makes them for an operator's other results, as large as z, unless it is told not to."""
    made = []

    class Zeros(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if "zero" in str(func) or "fill" in str(func):
                made.append(tuple(out.shape) if isinstance(out, Tensor) else ())
            return out

    weights, factors = layer("dense")
    x = drawn(T, H).requires_grad_()
    y = executors.get("native")(x, drawn(T, E), weights)
    with Zeros():
        torch.autograd.grad(y.sum(), [x, *factors])
    assert (T * K, 2 * I) not in made

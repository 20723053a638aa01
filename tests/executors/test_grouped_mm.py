"""What is particular to grouped_mm: its limits, the traps of torch's operator, and the GPU."""

from dataclasses import replace

import pytest
import torch

import executors
from dense_cases import EVERYTHING, PROBLEM, inputs_of
from executors import grouped_mm
from moe_ref.conformance.judgement.call import call


def test_grouped_mm_has_no_float64() -> None:
    inputs = inputs_of(replace(PROBLEM, dtype="float64"))
    message = r"^x.dtype=float64: must be one of bfloat16, float16, float32 for grouped_mm$"
    with pytest.raises(executors.Unsupported, match=message):
        call(executors.get("grouped_mm"), inputs)
    assert executors.get("auto").choose(inputs.x, inputs.weights)[0] == "native"


@pytest.mark.parametrize(
    ("capability", "dtype", "free"),
    [((9, 0), "bfloat16", True), ((9, 0), "float32", False), ((8, 0), "bfloat16", False)],
)
def test_grouped_mm_says_where_it_waits(
    capability: tuple[int, int], dtype: str, free: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """explain has a remark, and capture is refused, wherever torch reads the offsets on the host."""
    inputs = inputs_of(replace(PROBLEM, dtype=dtype))
    executor = executors.get("grouped_mm")
    assert "host" not in executor.note(inputs.x, inputs.weights)  # on a CPU nothing waits
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert ("host" not in executor.note(inputs.x, inputs.weights)) == free
    executor.check(inputs.x, inputs.weights)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    if free:
        executor.check(inputs.x, inputs.weights)
    else:
        with pytest.raises(executors.Unsupported, match=f"^x.dtype={dtype} during CUDA-graph capture: .* on the host"):
            executor.check(inputs.x, inputs.weights)


def test_rows_past_the_last_group_are_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's grouped_mm leaves them unwritten, in forward and backward (R7, G1)."""
    problem = replace(EVERYTHING, entry="experts", empty_slots=True, tokens=33)
    inputs, spoiled = inputs_of(problem), inputs_of(problem)
    assert ((inputs.topk_ids < 0) | (inputs.topk_ids >= 6)).any()
    expected = call(executors.get("grouped_mm"), inputs)
    expected.backward(inputs.dy)
    multiply, seen = torch.nn.functional.grouped_mm, []

    def leaving_nan(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        out = multiply(a, b, offs=offs)
        if b.ndim == 3:
            seen.append(len(out) - int(offs[-1]))
            out[int(offs[-1]) :] = torch.nan
        return out

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", leaving_nan)
    actual = call(executors.get("grouped_mm"), spoiled)
    actual.backward(spoiled.dy)
    assert min(seen) > 0
    assert torch.equal(expected, actual)
    for leaf, value in inputs.tensors().items():
        assert torch.equal(value.grad, spoiled.tensors()[leaf].grad), leaf


def test_more_rows_than_32_bits_count_are_refused() -> None:
    """E5: torch's grouped_mm takes int32 ends, which would wrap to negative ones."""
    products = grouped_mm.GroupedProducts(torch.empty(3, dtype=torch.int64, device="meta"))
    rows, matrices = (torch.empty(s, dtype=torch.bfloat16, device="meta") for s in ((2**31, 8), (2, 8, 8)))
    for product in (products.rows, products.rows_back):
        with pytest.raises(executors.Unsupported, match=r"^T\*K=2147483648 slots: must be at most 2147483647"):
            product(rows, matrices)
    with pytest.raises(executors.Unsupported, match="slots"):
        products.outer(rows, rows, matrices, torch.bfloat16)
    assert products.rows(rows[1:], matrices).shape == (2**31 - 1, 8)

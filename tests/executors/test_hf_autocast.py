"""A model of transformers under autocast: the bridge casts hidden states to the experts' dtype, and y back (T1)."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="the extra moe-ref[hf]")

import executors.hf
import families
from executors.hf import quantize_experts
from moe_ref.validation import dtype_name

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.arange(12).reshape(2, 6) % 5
CASES = [
    ("native", torch.float32, ""),
    ("native", torch.bfloat16, ""),
    ("auto", torch.bfloat16, "nf4"),
    *(
        pytest.param(*case, marks=pytest.mark.nightly)
        for case in [
            ("grouped_mm", torch.bfloat16, ""),
            ("numba", torch.bfloat16, ""),
            ("triton", torch.bfloat16, ""),
            ("triton", torch.bfloat16, "nf4"),
            ("grouped_nf4", torch.bfloat16, "nf4"),
        ]
    ),
]


@contextmanager
def dtypes_given(monkeypatch: pytest.MonkeyPatch, executor: str) -> Iterator[list[tuple[str, str]]]:
    """Of each call of the executor, the dtypes of x and of the weights."""
    seen: list[tuple[str, str]] = []
    own = type(executors.get(executor))
    plain = own.experts

    def experts(self, x, *, topk_ids, topk_weights, weights):  # type: ignore[no-untyped-def]
        seen.append((dtype_name(x), dtype_name(weights.gate_up_proj)))
        return plain(self, x, topk_ids=topk_ids, topk_weights=topk_weights, weights=weights)

    with monkeypatch.context() as patch:
        patch.setattr(own, "experts", experts)
        yield seen


def logits_and_gradients(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(IDS, use_cache=False).logits
    logits.float().square().mean().backward()
    return logits.detach().float(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("executor", "dtype", "quant_type"), CASES)
def test_the_bridge_casts_under_autocast(
    executor: str, dtype: torch.dtype, quant_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms under autocast give fp32 beside bf16 experts: the executor sees one dtype, and gradients have their own."""
    if executor not in executors.available():
        pytest.skip(f"{executor} is not available here")
    family = families.named("mixtral")
    model = families.build(family)
    eager = copy.deepcopy(model)
    for module in families.experts_of(model, family).values():
        module.to(dtype)
    if quant_type:
        quantize_experts(model, quant_type)
    executors.hf.use(model, executor)
    with dtypes_given(monkeypatch, executor) as seen:
        logits, gradients = logits_and_gradients(model)
    assert seen
    assert set(seen) == {(dtype_name(torch.empty(0, dtype=dtype)),) * 2}
    for name, parameter in model.named_parameters():
        assert name not in gradients or gradients[name].dtype == parameter.dtype, name
    expected, _ = logits_and_gradients(eager)
    if not quant_type:  # as the loop of transformers, which autocast does reach
        assert (logits - expected).norm() < 0.05 * expected.norm()

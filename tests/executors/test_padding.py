"""Padded tokens: ids of -1 leave them out, whatever they hold (R7), on every executor."""

import re

import pytest
import torch
from torch import Tensor

import executors
from every_executor import NAMES, T, cases, every, kind_of, layer, leaves_of, made, tokens
from moe_ref import MoEConfig

MASK = torch.tensor([True, True, False, True, False, True])
HOLDS = {
    "logits of -inf": lambda x, logits: (x, logits.index_fill(0, torch.tensor([2, 4]), -torch.inf)),
    "NaN": lambda x, logits: (x.masked_fill(~MASK[:, None], torch.nan), logits.masked_fill(~MASK[:, None], torch.nan)),
    "inf": lambda x, logits: (x.masked_fill(~MASK[:, None], torch.inf), logits.masked_fill(~MASK[:, None], torch.inf)),
}


def padded(name: str, kind: str, config: MoEConfig, holds: str = "", ids_dtype: torch.dtype = torch.int64):
    """y and all gradients, where the padding holds something."""
    executor, weights = made(name), leaves_of(layer(name, kind, config))
    x, logits = (value.requires_grad_() for value in HOLDS.get(holds, lambda *given: given)(*tokens()))
    routing = executor.route(logits, weights)
    ids = executors.mask_padding(routing.topk_ids.to(ids_dtype), MASK)
    y = executor.experts(x, topk_ids=ids, topk_weights=routing.topk_weights, weights=weights)
    (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
    leaves = weights.parameters() | {"x": x, "router_logits": logits}
    return y.detach(), {leaf: value.grad for leaf, value in leaves.items()}


@cases("dense", "nf4", nightly=("mxfp4", "mixed"))
@pytest.mark.parametrize(
    ("scoring", "scale_input"),
    [
        ("softmax", False),
        ("sigmoid", True),
        pytest.param("softmax", True, marks=pytest.mark.nightly),
        pytest.param("topk_softmax", True, marks=pytest.mark.nightly),
        pytest.param("sqrtsoftplus", False, marks=pytest.mark.nightly),
    ],
)
def test_r7_padding_adds_exactly_0(name: str, kind: str, scoring: str, scale_input: bool) -> None:
    """To y, dx, d router_logits, and the gradients of all that learns: the bits are those with ordinary padding."""
    config = MoEConfig(2, scoring=scoring, renormalize=True, scale_input=scale_input)
    y, gradients = padded(name, kind, config)
    once = {("softmax", False): ["logits of -inf"], ("sigmoid", True): ["NaN"]}.get((scoring, scale_input), HOLDS)
    for holds in HOLDS if name == "native" else once:
        other, others = padded(name, kind, config, holds)
        assert torch.equal(other, y)
        assert not other[~MASK].any()
        assert other[MASK].any(dim=1).all()
        for leaf, value in others.items():
            assert torch.equal(value, gradients[leaf]), (holds, leaf)
            assert value.isfinite().all(), (holds, leaf)
        for leaf in ("x", "router_logits"):
            assert not others[leaf][~MASK].any(), (holds, leaf)
            assert others[leaf][MASK].any(), leaf


@cases("dense", nightly=("nested", "fp4"))
def test_r7_padding_in_int32(name: str, kind: str) -> None:
    config = MoEConfig(2, scoring="topk_softmax")
    y, gradients = padded(name, kind, config, "NaN")
    other, others = padded(name, kind, config, ids_dtype=torch.int32)
    assert torch.equal(y, other)
    assert all(torch.equal(value, others[leaf]) for leaf, value in gradients.items())


@every
def test_r7_nothing_but_padding(name: str) -> None:
    weights, (x, logits) = leaves_of(layer(name, kind_of(name))), tokens()
    x = torch.full_like(x, torch.nan).requires_grad_()
    routing = made(name).route(logits, weights)
    ids = executors.mask_padding(routing.topk_ids, torch.zeros(T, dtype=torch.bool))
    y = made(name).experts(x, topk_ids=ids, topk_weights=routing.topk_weights, weights=weights)
    y.sum().backward()
    assert not y.any()
    assert not x.grad.any()
    learned = {n: v for n, v in weights.parameters().items() if n != "expert_scale"}
    assert not any(value.grad.any() for value in learned.values())


@pytest.mark.parametrize(
    "name", [name if name in ("native", "triton") else pytest.param(name, marks=pytest.mark.nightly) for name in NAMES]
)
def test_r7_padding_is_traced_with_the_rest(name: str) -> None:
    """In one graph, with the bits of an eager call."""
    executor, kind = made(name), kind_of(name)

    def step(x: Tensor, logits: Tensor, mask: Tensor, weights) -> Tensor:
        routing = executor.route(logits, weights)
        ids = executors.mask_padding(routing.topk_ids, mask)
        return executor.experts(x, topk_ids=ids, topk_weights=routing.topk_weights, weights=weights)

    torch._dynamo.reset()
    compiled, found = torch.compile(step, fullgraph=True, backend="eager"), []
    for function in (step, compiled):
        weights = leaves_of(layer(name, kind, MoEConfig(2)))
        x, logits = (value.requires_grad_() for value in HOLDS["NaN"](*tokens()))
        y = function(x, logits, MASK, weights)
        y.sum().backward()
        found.append([y, x.grad, logits.grad, *(value.grad for value in weights.parameters().values())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert all(value.isfinite().all() for value in found[0])


def test_mask_padding_makes_new_ids() -> None:
    ids = torch.arange(12, dtype=torch.int32).reshape(2, 3, 2)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    masked = executors.mask_padding(ids, mask)
    assert masked.dtype == torch.int32
    assert masked.tolist() == [[[0, 1], [-1, -1], [4, 5]], [[-1, -1], [8, 9], [10, 11]]]
    assert ids.min() == 0


@pytest.mark.parametrize(
    ("ids", "mask", "line"),
    [
        ([[0]], MASK, "topk_ids=[[0]]: must be an array"),
        (torch.zeros(6, 2), MASK, "topk_ids.dtype=float32: must be one of int32, int64"),
        (torch.zeros(6, 2).int(), MASK.long(), "mask.dtype=int64: must be one of bool"),
        (torch.zeros(6, 2).int(), MASK[:, None], "mask.shape=(6, 1): must be (6,), the leading dimensions of topk_ids"),
        (torch.zeros(6, 2).int(), MASK.to("meta"), "mask.device=meta: must be cpu, topk_ids's"),
    ],
)
def test_mask_padding_refuses_in_one_line(ids, mask, line: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(line)}$"):
        executors.mask_padding(ids, mask)

"""A rank of expert parallelism: its own experts beside the whole model's configuration, selection bias and scales."""

from dataclasses import replace

import pytest
import torch

import executors
from every_executor import E, H, I, cases, every, in_kind, kind_of, layer, leaves_of, made, tokens
from executors.nn import Experts
from moe_ref import MoEConfig, MoEWeights, routed_experts, routed_experts_vjp
from moe_ref.types import PARAMETERS

# Neither one expert nor three are enough to choose two from, in two groups of at least two.
CONFIG = MoEConfig(2, scoring="sigmoid", num_groups=2, topk_groups=1, group_score="top2_sum")
RANKS = (0, 1), (1, E)


def local(weights: MoEWeights, first: int, last: int) -> MoEWeights:
    """The parameters of some experts; the scales and the selection bias of all."""
    own = {name: value[first:last] for name, value in weights.parameters().items() if name in PARAMETERS}
    return weights.with_parameters({name: value.detach().clone() for name, value in own.items()})


@cases("dense", "nf4", nightly=("mxfp4", "mixed"))
def test_r8_ranks_add_up_to_the_layer(name: str, kind: str) -> None:
    """Each is the specification's too, forward and backward; E local experts, ids shifted, foreign slots empty (R7)."""
    dense, executor = layer(name, "dense", CONFIG), made(name)
    whole = leaves_of(in_kind(dense, kind))
    x, logits = tokens()
    routing = executors.get("native").route(logits, dense)
    ids, slot_weights = routing.topk_ids, routing.topk_weights.detach()
    y = executor.experts(x, topk_ids=ids, topk_weights=slot_weights, weights=whole)
    y.sum().backward()
    total = torch.zeros(x.shape, dtype=torch.float64)
    for first, last in RANKS:
        own = leaves_of(in_kind(local(dense, first, last), kind))
        part = executor.experts(x, topk_ids=ids - first, topk_weights=slot_weights, weights=own)
        part.sum().backward()
        exact = routed_experts(x, ids - first, slot_weights, own)
        torch.testing.assert_close(part.double(), exact, rtol=1e-5, atol=1e-4)
        total += part.detach().double()
        for parameter, value in own.parameters().items():
            gradient = whole.parameters()[parameter].grad
            if parameter in PARAMETERS:
                torch.testing.assert_close(value.grad, gradient[first:last], rtol=1e-5, atol=1e-4)
            elif parameter == "expert_scale":
                assert value.grad is gradient is None  # R9
    torch.testing.assert_close(total, y.detach().double(), rtol=1e-5, atol=1e-4)


@every
def test_r8_a_rank_of_one_expert_as_it_was_reported(name: str) -> None:
    weights = MoEWeights(torch.randn(1, 2 * I, H), torch.randn(1, H, I), config=MoEConfig(2))
    weights = in_kind(weights, kind_of(name))
    x, ids, slot_weights = torch.randn(5, H), torch.tensor([[0, 1]] * 5), torch.rand(5, 2)
    y = made(name).experts(x, topk_ids=ids, topk_weights=slot_weights, weights=weights)
    alone = made(name).experts(x, topk_ids=ids[:, :1], topk_weights=slot_weights[:, :1], weights=weights)
    torch.testing.assert_close(y, alone)
    assert y.any(dim=1).all()


@cases("dense", "nested", nightly=("mxfp4",))
def test_r8_whatever_handles_a_layer_takes_a_rank_s(name: str, kind: str) -> None:
    """`check`, `explain`, moves, casts, and the module."""
    weights = in_kind(local(layer(name, "dense", CONFIG), 0, 1), kind)
    x, _ = tokens()
    given = {"topk_ids": torch.tensor([[0, 3]] * len(x)), "topk_weights": torch.rand(len(x), 2)}
    y = made(name).experts(x, **given, weights=weights)
    made(name).check(x, weights)
    if name in executors.names():
        assert {row.name: row.reason for row in executors.explain(x, weights)}[name] == ""
        module = Experts(weights, name)
        assert torch.equal(module.experts(x, **given), y)
        loaded = Experts(weights, name)
        loaded.load_state_dict(module.state_dict())
        assert torch.equal(loaded.to("cpu").experts(x, **given), y)
    for other in (weights.to("cpu"), weights.map(torch.clone), weights.to(dtype=torch.bfloat16)):
        z = other.to(dtype=x.dtype)
        assert made(name).experts(x, **given, weights=z).shape == x.shape
    assert weights.selection_bias.shape == (E,)


@every
@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"top_k": -1}, "top_k=-1: must be at least 1"),
        ({"top_k": 1.5}, "top_k=1.5: must be an integer"),
        ({"num_groups": 0}, "num_groups=0: must be at least 1"),
        ({"num_groups": 2, "topk_groups": 3}, "topk_groups=3: must be at least 1 and at most 2 (num_groups)"),
        ({"scoring": "best"}, "scoring='best': must be one of 'softmax', 'topk_softmax', 'sigmoid', 'sqrtsoftplus'"),
    ],
)
def test_r8_what_is_wrong_by_itself_is_refused(name: str, changes: dict, line: str) -> None:
    weights = layer(name, kind_of(name))
    weights = replace(weights, config=replace(weights.config, **changes))
    x = tokens()[0]
    with pytest.raises((ValueError, TypeError)) as error:
        made(name).experts(
            x, topk_ids=torch.zeros(len(x), 1).long(), topk_weights=torch.ones(len(x), 1), weights=weights
        )
    assert str(error.value) == line


@every
def test_r8_a_layer_that_chooses_is_held_to_its_own_experts(name: str) -> None:
    weights = in_kind(local(layer(name, "dense", CONFIG), 1, E), kind_of(name))
    x, logits = tokens()
    for call in (lambda w: made(name)(x, logits[:, 1:], w), lambda w: made(name).route(logits[:, 1:], w)):
        with pytest.raises(ValueError, match=r"^num_groups=2: must be a divisor of 3 \(E\)$"):
            call(weights)
        plain = replace(weights, config=MoEConfig(2))
        with pytest.raises(ValueError, match=r"^selection_bias.shape=\(4,\): must be \(3,\), \(E,\)$"):
            call(plain)
        with pytest.raises(ValueError, match=r"^expert_scale.shape=\(4,\): must be \(3,\), \(E,\)$"):
            call(replace(plain, selection_bias=None))


def test_r8_the_specification_s_backward_pass_takes_a_rank_s() -> None:
    weights = local(layer("native", "dense", CONFIG), 0, 1)
    x = tokens()[0]
    ids, slot_weights = torch.tensor([[0, 3]] * len(x)), torch.rand(len(x), 2)
    _, gradients = routed_experts_vjp(x, ids, slot_weights, weights, torch.ones_like(x))
    assert gradients.gate_up_proj.any()
    assert gradients.expert_scale is None
    assert not gradients.topk_weights[:, 1].any()


@pytest.mark.parametrize("kind", ["nf4", "mxfp4"])
def test_r8_a_rank_s_experts_are_quantised_as_the_whole(kind: str) -> None:
    dense = layer("native", "dense", CONFIG)
    whole, part = in_kind(dense, kind), in_kind(local(dense, 1, E), kind)
    assert torch.equal(part.down_proj.codes.flatten(), whole.down_proj.codes.flatten()[-part.down_proj.size // 2 :])

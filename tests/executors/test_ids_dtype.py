"""The dtype of ids: `route` returns int64 on every executor, `.experts` takes int32 too (T1)."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from every_executor import E, K, T, every, kind_of, layer, made, tokens
from moe_ref import MoEConfig

PLAIN = MoEConfig(K)


@every
@pytest.mark.parametrize("config", [PLAIN, MoEConfig(K, scoring="sigmoid", num_groups=2, topk_groups=1)])
@pytest.mark.parametrize("shape", [(T,), (2, 3), (0,), ()])
def test_t1_route_returns_ids_that_index(name: str, config: MoEConfig, shape: tuple[int, ...]) -> None:
    logits = torch.randn(*shape, E)
    routing = made(name).route(logits, layer(name, kind_of(name), config))
    assert routing.topk_ids.dtype == torch.int64
    assert routing.topk_ids.shape == (*shape, K)
    assert torch.nn.functional.one_hot(routing.topk_ids, E).sum().item() == routing.topk_ids.numel()


@every
def test_t1_tracers_see_the_same_dtype(name: str) -> None:
    weights, (_, logits) = layer(name, kind_of(name)), tokens()
    with FakeTensorMode() as mode:
        fake = weights.map(mode.from_tensor)
        fake = fake.with_parameters({n: t.map(mode.from_tensor) for n, t in fake.packed().items()})
        routing = made(name).route(mode.from_tensor(logits), fake)
    assert routing.topk_ids.dtype == torch.int64
    assert routing.topk_ids.shape == (T, K)


@every
def test_t1_both_dtypes_of_ids_give_the_same_bits(name: str) -> None:
    weights, (x, logits) = layer(name, kind_of(name)), tokens()
    routing = made(name).route(logits, weights)
    given = {"topk_weights": routing.topk_weights, "weights": weights}
    y, narrow = (made(name).experts(x, topk_ids=routing.topk_ids.to(d), **given) for d in (torch.int64, torch.int32))
    assert torch.equal(y, narrow)

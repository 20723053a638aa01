"""How many graphs torch.compile makes of an executor as T changes: as many as of torch's own sin(), and no more.

torch specialises 0 and 1, and by default the first T it meets. Its setting ``backed_size_oblivious`` ends the former,
``dynamic=True`` the latter; with both there is one graph for every T.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from dense_cases import inputs_of, with_parameters
from forward_cases import CASES, DENSE, leaves_of

TOKENS = (5, 7, 33, 1, 0)
GRAPHS = {  # (dynamic, oblivious) to the graphs after each of TOKENS
    (None, False): [1, 2, 2, 3, 4],
    (True, False): [1, 1, 1, 2, 3],
    (None, True): [1, 2, 2, 2, 2],
    (True, True): [1, 1, 1, 1, 1],
}
modes = pytest.mark.parametrize(("dynamic", "oblivious"), GRAPHS)
OFTEN = [("native", "layer", None, False), ("native", "route", True, True)]  # the others are for the night
OFTEN += [("grouped_nf4", "layer", True, True)]


@pytest.fixture(autouse=True)
def _new_caches() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graphs_of(
    function: Callable[..., Any], dynamic: bool | None, oblivious: bool, tokens: list[tuple[Tensor, ...]]
) -> list[int]:
    """The number of graphs after each call; each call's result is that of the function itself."""
    from torch.fx.experimental import _config

    made: list[object] = []

    def backend(graph: torch.fx.GraphModule, _example: object) -> Callable[..., Any]:
        made.append(graph)
        return graph.forward

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)
    counts = []
    with _config.patch(backed_size_oblivious=True) if oblivious else nullcontext():
        for own in tokens:
            torch.testing.assert_close(compiled(*own), function(*own), rtol=1e-6, atol=1e-6)
            counts.append(len(made))
    return counts


@modes
def test_torch_s_own(dynamic: bool | None, oblivious: bool) -> None:
    tokens = [(torch.randn(t, 4),) for t in TOKENS]
    assert graphs_of(torch.sin, dynamic, oblivious, tokens) == GRAPHS[dynamic, oblivious]


EVERY = [
    pytest.param(name, entry, *mode, marks=[] if (name, entry, *mode) in OFTEN else pytest.mark.nightly)
    for name, entry, mode in product(CASES, ("layer", "route"), GRAPHS)
]


@pytest.mark.parametrize(("name", "entry", "dynamic", "oblivious"), EVERY)
def test_graphs_of_an_executor(name: str, entry: str, dynamic: bool | None, oblivious: bool) -> None:
    inputs = inputs_of(replace(CASES[name].problem, tokens=max(TOKENS)))
    leaves, executor, weights = leaves_of(inputs), CASES[name].executor(), inputs.weights
    tokens = [(leaves["x"][:t], leaves["router_logits"][:t]) for t in TOKENS]

    def layer(x: Tensor, logits: Tensor) -> Tensor:
        return executor(x, logits, weights)

    def route(_x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        routing = executor.route(logits, weights)  # type: ignore[attr-defined]
        return routing.topk_ids, routing.topk_weights

    function = layer if entry == "layer" else route
    assert graphs_of(function, dynamic, oblivious, tokens) == GRAPHS[dynamic, oblivious]


@pytest.mark.nightly
def test_one_graph_of_forward_and_backward_for_every_number_of_tokens() -> None:
    """Nor does autograd's tracing specialise."""
    from torch.fx.experimental import _config

    made: list[object] = []

    def counting(graph: torch.fx.GraphModule, _example: object) -> Callable[..., Any]:
        made.append(graph)
        return make_boxed_func(graph.forward)  # type: ignore[no-any-return]

    executor, inputs = CASES["native"].executor(), with_parameters(DENSE)
    compiled = torch.compile(executor, fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=counting))
    with _config.patch(backed_size_oblivious=True):
        for tokens in TOKENS:
            x, logits = (torch.randn(tokens, n, requires_grad=True) for n in (DENSE.hidden, DENSE.experts))
            compiled(x, logits, inputs.weights).sum().backward()
            assert x.grad is not None
    assert len(made) == 2

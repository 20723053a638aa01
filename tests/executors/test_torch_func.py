"""torch.func on every executor: grad, vjp, jacrev, jacfwd and vmap work; second derivatives are refused in one line."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import executors
from dense_cases import PROBLEM, inputs_of
from executors._base import transforms
from forward_cases import CASES, directions, each_of, layer_of, leaves_of
from moe_ref import MoEConfig, MoEWeights
from moe_ref.conformance.judgement.call import run

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, at the first jvp
OFTEN = ("native", "grouped_nf4")
every = each_of(*OFTEN)
BATCH = 3


def near(found: Tensor, expected: Tensor) -> None:
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def of_x(name: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A layer as a function of x, and x."""
    inputs = inputs_of(CASES[name].problem)
    leaves = leaves_of(inputs)
    layer = layer_of(CASES[name].executor(), inputs)
    return lambda x: layer(leaves | {"x": x}), leaves["x"]


def batch_of(value: Tensor, dim: int = 0) -> Tensor:
    return torch.stack([value * scale for scale in (1.0, -0.5, 0.25)], dim)


@each_of(*OFTEN, "grouped_mm", "numba", "triton")
def test_gradients_are_those_of_autograd(name: str) -> None:
    """To the last bit (D4), of everything that is differentiable."""
    inputs = inputs_of(CASES[name].problem)
    expected = run(CASES[name].executor(), inputs)
    layer = layer_of(CASES[name].executor(), inputs)
    found = grad(lambda leaves: (layer(leaves) * inputs.dy).sum())(leaves_of(inputs))
    for own, gradient in found.items():
        if own == "router_logits" and "triton" in name:  # whose kernel weighs otherwise; torch's operators do here
            near(gradient, expected.tensors[own])
        elif "triton" not in name:
            assert torch.equal(gradient, expected.tensors[own]), own
        else:
            near(gradient, expected.tensors[own])


@each_of(*OFTEN, "grouped_mm", "numba", "triton")
def test_tokens_of_all_batches_are_one_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vmap over x and over logits, whatever dimension; no token depends on others."""
    inputs = inputs_of(CASES[name].problem)
    leaves, layer = leaves_of(inputs), layer_of(CASES[name].executor(), inputs)
    own = {"x": batch_of(leaves["x"], 1), "router_logits": batch_of(leaves["router_logits"])}
    found = vmap(lambda x, z: layer(leaves | {"x": x, "router_logits": z}), in_dims=(1, 0), out_dims=1)(*own.values())
    for place in range(BATCH):
        at = {"x": own["x"].select(1, place), "router_logits": own["router_logits"][place]}
        near(found.select(1, place), layer(leaves | at))
    calls, plain = [], transforms._apply
    monkeypatch.setattr(transforms, "_apply", lambda *given: calls.append(given[0].__name__) or plain(*given))
    alone = vmap(lambda z: layer(leaves | {"router_logits": z}))(own["router_logits"])
    assert calls == ["_Layer", "_Layer"]  # under vmap, and below it
    near(alone[1], layer(leaves | {"router_logits": own["router_logits"][1]}))


@every
def test_a_batch_of_parameters_is_a_call_for_each(name: str) -> None:
    """As of an ensemble: here of biases and of selection biases."""
    inputs = inputs_of(CASES[name].problem)
    leaves, executor = leaves_of(inputs), CASES[name].executor()
    biases = batch_of(leaves["down_proj_bias"])
    near(
        vmap(lambda bias: layer_of(executor, inputs)(leaves | {"down_proj_bias": bias}))(biases)[1],
        layer_of(executor, inputs)(leaves | {"down_proj_bias": biases[1]}),
    )
    own = inputs.weights.selection_bias.detach()  # type: ignore[union-attr]
    moved = torch.stack([own, own.flip(0) * 100])

    def chosen(bias: Tensor) -> Tensor:
        return executor.route(leaves["router_logits"], replace(inputs.weights, selection_bias=bias)).topk_ids  # type: ignore[attr-defined]

    assert torch.equal(vmap(chosen)(moved), torch.stack([chosen(bias) for bias in moved]))
    assert not torch.equal(*vmap(chosen)(moved))


@every
def test_gradients_of_each_batch(name: str) -> None:
    """vmap over grad: of x in one call, of a parameter with a call for each."""
    inputs = inputs_of(CASES[name].problem)
    leaves, layer = leaves_of(inputs), layer_of(CASES[name].executor(), inputs)

    def loss(x: Tensor, bias: Tensor) -> Tensor:
        return layer(leaves | {"x": x, "down_proj_bias": bias}).square().sum()

    xs, bias = batch_of(leaves["x"]), leaves["down_proj_bias"]
    of_rows = vmap(grad(loss), in_dims=(0, None))(xs, bias)
    of_bias = vmap(grad(loss, argnums=1), in_dims=(0, None))(xs, bias)
    near(of_rows[1], grad(loss)(xs[1], bias))
    near(of_bias[1], grad(loss, argnums=1)(xs[1], bias))


@every
def test_jacobians(name: str) -> None:
    """jacrev is a vmap of vjp, jacfwd one of jvp."""
    layer, x = of_x(name)
    first = x.reshape(-1, x.shape[-1])[0, :2]  # two numbers of one token

    def of_two(two: Tensor) -> Tensor:
        return layer(torch.cat([two, x.flatten()[2:]]).view_as(x)).reshape(-1, x.shape[-1])[:1]

    by_rows, by_columns = jacrev(of_two)(first), jacfwd(of_two)(first)
    assert by_rows.shape == (1, x.shape[-1], 2)
    near(by_rows, by_columns)
    unit = torch.tensor([0.0, 1.0])
    near(by_columns[..., 1], jvp(of_two, (first,), (unit,))[1])


SECOND = {
    "hessian": (lambda loss: hessian(loss), "forward mode over reverse mode"),
    "grad of grad": (lambda loss: grad(lambda x: grad(loss)(x).sum()), "double backward"),
    "grad of jvp": (lambda loss: grad(lambda x: jvp(loss, (x,), (x,))[1]), "reverse mode over forward mode"),
    "jvp of jvp": (
        lambda loss: lambda x: jvp(lambda a: jvp(loss, (a,), (a,))[1], (x,), (x,)),
        "forward mode over forw",
    ),
}


@every
@pytest.mark.parametrize("kind", SECOND)
def test_second_derivatives_are_refused(name: str, kind: str) -> None:
    take, message = SECOND[kind]
    layer, x = of_x(name)
    refusal = rf"^\w+: {message}.* is not supported; moe_ref\.moe, in torch and float64, has second derivatives$"
    with pytest.raises(RuntimeError, match=refusal):
        take(lambda a: layer(a).square().sum())(x)


def test_a_module_in_functional_call() -> None:
    inputs = inputs_of(PROBLEM)
    experts = executors.nn.Experts(inputs.weights, "native")
    parameters = {own: value.detach() for own, value in experts.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return (functional_call(experts, parameters, (inputs.x.detach(), inputs.router_logits)) * inputs.dy).sum()

    (experts(inputs.x.detach(), inputs.router_logits) * inputs.dy).sum().backward()
    for own, gradient in grad(loss)(parameters).items():
        assert torch.equal(gradient, experts.get_parameter(own).grad), own


def test_a_function_of_the_past_is_kept() -> None:
    """vjp's function, called after its transform has ended."""
    layer, x = of_x("native")
    y, back = vjp(layer, x)
    near(back(y)[0], back(y.clone())[0])


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'>:DeprecationWarning")  # dynamo's own
@pytest.mark.parametrize("name", [name for name in ("native", "grouped_nf4", "triton") if name in CASES])
def test_transforms_inside_a_compiled_function(name: str) -> None:
    """They run in eager mode, and are right; a whole graph is refused."""
    layer, x = of_x(name)
    along = directions({"x": x})["x"]
    functions = (
        lambda a: jvp(layer, (a,), (along,))[1],
        grad(lambda a: layer(a).sum()),
        lambda a: vmap(layer)(a[None])[0],
    )
    for function in functions:
        torch._dynamo.reset()
        near(torch.compile(function, backend="aot_eager")(x), function(x))
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="run in eager mode: use fullgraph=False"):
            torch.compile(function, backend="aot_eager", fullgraph=True)(x)


def test_forward_mode_around_a_compiled_function() -> None:
    layer, x = of_x("native")
    along = directions({"x": x})["x"]
    torch._dynamo.reset()
    compiled = torch.compile(lambda a: layer(a) * 2, backend="aot_eager")
    compiled(x)
    expected = 2 * jvp(layer, (x,), (along,))[1]
    near(jvp(compiled, (x,), (along,))[1], expected)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(compiled(forward_ad.make_dual(x, along))).tangent
    near(found, expected)


@pytest.mark.parametrize("inner", [None, 0])
def test_nested_batches_of_biases_choose_as_a_loop_does(inner: int | None) -> None:
    """The bias belongs to the outer batch alone, or to both: never to the one beside it that has the same size."""
    logits, bias = torch.randn(3, 3, 4, 8), 5 * torch.randn(3, *([3] if inner == 0 else []), 8)
    stacks = torch.randn(8, 8, 4), torch.randn(8, 4, 4)

    def chosen(row: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        weights = MoEWeights(*stacks, selection_bias=own, config=MoEConfig(2, scoring="sigmoid"))
        return executors.get("native").route(row, weights).topk_ids

    found = torch.func.vmap(torch.func.vmap(chosen, in_dims=(0, inner)))(logits, bias)
    expected = [[chosen(logits[i, j], bias[i, j] if inner == 0 else bias[i]) for j in range(3)] for i in range(3)]
    assert torch.equal(found, torch.stack([torch.stack(row) for row in expected]))

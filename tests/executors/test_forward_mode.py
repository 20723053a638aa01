"""Forward-mode derivatives of every executor, held to those of the specification in float64 and to reverse mode."""

from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad

import executors
from dense_cases import EVERYTHING, PROBLEM, arguments, inputs_of
from executors import native
from executors._base.arguments import NAMES
from forward_cases import CASES, DENSE, EMPTY, UNSCALED, directions, each_of, layer_of, leaves_of, specification_of
from moe_ref import MoEConfig, MoEWeights
from moe_ref.conformance.problems.problem import Problem
from packed_cases import SLICED

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, at the first jvp
every = pytest.mark.parametrize("name", CASES)
not_interpreted = each_of(*(name for name in CASES if "triton" not in name))
every_dense = pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.problem.quant_type])
dense = pytest.mark.parametrize("name", [name for name in ("native", "grouped_mm", "numba") if name in CASES])
EXACT = Problem(5, 3, 4, 4, MoEConfig(2, activation="relu2"), entry="experts", gate_up_rank=1, down_rank=2)


def tangents(name: str, problem: Problem, only: str = "", size: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """An executor's tangent and the specification's, of everything or of one leaf."""
    inputs = inputs_of(problem)
    leaves = leaves_of(inputs)
    along = {own: t * size if only in ("", own) else torch.zeros_like(t) for own, t in directions(leaves).items()}
    found = torch.func.jvp(layer_of(CASES[name].executor(), inputs), (leaves,), (along,))[1]
    return found, torch.func.jvp(specification_of(inputs), (leaves,), (along,))[1]


def demand_near(found: torch.Tensor, right: torch.Tensor, of_largest: float) -> None:
    assert right.abs().max() > 0
    assert (found.double() - right).abs().max() <= of_largest * right.abs().max()


def test_the_case_that_was_silently_zero() -> None:
    """sigmoid(0) = 1/2, and h = silu(x) x."""
    ones = MoEWeights(torch.ones(1, 2, 1), torch.ones(1, 1, 1), config=MoEConfig(1, scoring="sigmoid"))
    x = torch.ones(1, 1)
    for name in [name for name in ("native", "grouped_mm", "numba", "triton", "auto") if name in (*CASES, "auto")]:
        executor = executors.get(name)
        _, found = torch.func.jvp(lambda a, e=executor: e(a, torch.zeros(1, 1), ones), (x,), (x,))
        torch.testing.assert_close(found, torch.tensor([[0.829368]]))


@every
def test_tangent_is_the_specification_s(name: str) -> None:
    demand_near(*tangents(name, CASES[name].problem), 2e-6)


@not_interpreted
def test_tangent_of_each_input_alone(name: str) -> None:
    """<u, J v> = <J^T u, v>, for each input's own v."""
    inputs = inputs_of(CASES[name].problem)
    leaves, layer = leaves_of(inputs), layer_of(CASES[name].executor(), inputs)
    gradients = torch.func.vjp(layer, leaves)[1](inputs.dy)[0]
    for own in leaves:
        along = directions(leaves)[own]
        found = torch.func.jvp(lambda leaf, own=own: layer(leaves | {own: leaf}), (leaves[own],), (along,))[1]
        terms = inputs.dy.double() * found.double()
        assert abs(terms.sum() - (gradients[own].double() * along.double()).sum()) <= 1e-6 * terms.abs().sum(), own


@dense
@pytest.mark.parametrize(
    "problem",
    [
        EMPTY,
        replace(EMPTY, config=UNSCALED),
        replace(DENSE, tokens=0),
        replace(DENSE, batch=True, weights_layout="transposed", x_layout="sliced"),
        replace(DENSE, config=MoEConfig(2, gate_softcap=2.0, up_softcap=1.0)),
        replace(DENSE, config=MoEConfig(2, limit=0.5, clamp="after", scoring="sqrtsoftplus", renormalize=True)),
        replace(DENSE, config=MoEConfig(2, activation="gelu", num_groups=2, topk_groups=1, group_score="top2_sum")),
    ],
    ids=["empty slots", "empty slots, weights after", "no tokens", "strides", "softcap", "clamp after", "no gate"],
)
def test_forms_of_the_layer(name: str, problem: Problem) -> None:
    if problem.tokens:
        demand_near(*tangents(name, problem), 2e-6)
    else:
        assert tangents(name, problem)[0].shape == (0, DENSE.hidden)


@every_dense
def test_e7_what_passes_the_range_of_fp16_between_products(name: str) -> None:
    """Z and h reach 1e5, and so do their tangents; y does not."""
    form = MoEConfig(2, activation="silu", scoring="sigmoid")
    problem = replace(CASES[name].problem, config=form, dtype="float16", gate_up_rank=0, down_rank=0, seed=1)
    problem = replace(problem, powers=(("x", 9), ("gate_up_proj", 8), ("down_proj", -11)), post_expert_norm=False)
    found, right = tangents(name, problem, only="x", size=2.0**9)
    assert found.dtype == torch.float16
    demand_near(found, right, 5e-3)


@every_dense
def test_exact_where_all_numbers_are_whole(name: str) -> None:
    """Forward and reverse mode agree to the last bit, and so does the specification."""
    inputs = inputs_of(replace(EXACT, ids_dtype="int64"))
    drawn = torch.Generator().manual_seed(0)
    leaves = {own: torch.randint(-2, 3, t.shape, generator=drawn).float() for own, t in leaves_of(inputs).items()}
    along = {own: torch.randint(-2, 3, t.shape, generator=drawn).float() for own, t in leaves.items()}
    u, layer = torch.randint(-2, 3, inputs.x.shape, generator=drawn).float(), layer_of(CASES[name].executor(), inputs)
    found = torch.func.jvp(layer, (leaves,), (along,))[1]
    gradients = torch.func.vjp(layer, leaves)[1](u)[0]
    assert torch.equal(found.double(), torch.func.jvp(specification_of(inputs), (leaves,), (along,))[1])
    assert found.abs().max() > 100
    assert (u * found).sum() == sum((gradients[own] * along[own]).sum() for own in leaves)


@not_interpreted
def test_dual_numbers_and_parameters_that_learn(name: str) -> None:
    """y has its tangent and, after the level, its backward pass; second derivatives are refused."""
    inputs = inputs_of(CASES[name].problem)
    layer, leaves = layer_of(CASES[name].executor(), inputs), inputs.tensors()
    along = directions(leaves_of(inputs))["x"]
    x = inputs.x.detach()
    with forward_ad.dual_level():
        y, tangent = forward_ad.unpack_dual(layer(leaves | {"x": forward_ad.make_dual(x, along)}))
        assert tangent is not None
        with pytest.raises(RuntimeError, match="forward mode over reverse mode is not supported; "):
            y.backward(inputs.dy, retain_graph=True)
    with pytest.raises(RuntimeError, match="reverse mode over forward mode is not supported; "):
        tangent.sum().backward()
    y.backward(inputs.dy)
    gradients = {own: leaf.grad for own, leaf in leaves.items() if own != "x"}
    expected = torch.func.vjp(layer, leaves_of(inputs))[1](inputs.dy)[0]
    for own, gradient in gradients.items():
        assert torch.equal(gradient, expected[own]), own
    torch.testing.assert_close(tangent.detach(), torch.func.jvp(lambda a: layer(leaves | {"x": a}), (x,), (along,))[1])


def test_a_level_without_tangents_changes_nothing() -> None:
    inputs = inputs_of(PROBLEM)
    layer = layer_of(executors.get("native"), inputs)
    with forward_ad.dual_level():
        y, tangent = forward_ad.unpack_dual(layer(inputs.tensors()))
    assert tangent is None
    assert torch.equal(y, layer(inputs.tensors()))


def test_ordinary_calls_go_by_the_operator_alone() -> None:
    y = layer_of(executors.get("native"), inputs := inputs_of(PROBLEM))(inputs.tensors())
    assert "GeneratedBackwardFor_moe_ref_native" in type(y.grad_fn).__name__


@pytest.mark.parametrize("operator", [native.OPERATOR, SLICED])
@pytest.mark.parametrize("tokens", [0, 6])
def test_the_tangent_s_operator_is_registered_right(operator: object, tokens: int) -> None:
    given = arguments(inputs := inputs_of(replace(EVERYTHING, tokens=tokens, entry="experts")))
    given = given.with_tensors([None if t is None else t.detach() for t in given.tensors()])
    along = directions(leaves_of(inputs))
    torch.library.opcheck(operator.tangent, (*(along.get(own) for own in NAMES), *given))  # type: ignore[attr-defined]

"""Problems for forward mode and torch.func, on every executor; and what is right, from the specification in float64."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

import executors
import moe_ref
from dense_cases import EVERYTHING
from executors import Executor
from moe_ref.conformance.judgement.call import Inputs, call
from moe_ref.conformance.problems.problem import Problem
from moe_ref.packed import decode
from packed_cases import MXFP4, PACKED_EVERYTHING, Sliced

DENSE = replace(EVERYTHING, tokens=6, post_expert_norm=True, expert_scale=True)
UNSCALED = replace(EVERYTHING.config, scale_input=False)
EMPTY = replace(DENSE, entry="experts", empty_slots=True, ids_dtype="int32")  # NaN and inf among their weights
PACKED = replace(PACKED_EVERYTHING, tokens=6, post_expert_norm=True, expert_scale=True, config=UNSCALED)
SMALL = replace(EVERYTHING, tokens=3, experts=4, hidden=8, intermediate=4, expert_scale=True)  # what is interpreted


@dataclass(frozen=True)
class Case:
    """An executor with a problem that it can take: dense, and in 4 bits, where it has them."""

    executor: Callable[[], Executor]
    problem: Problem


def _case(name: str, problem: Problem, **options: object) -> Case:
    return Case(lambda: executors.get(name, **options), problem)


CASES = {
    "native": _case("native", DENSE),
    "grouped_mm": _case("grouped_mm", DENSE),
    "auto": _case("auto", DENSE),
    "auto, 4 bits": _case("auto", PACKED),
    "grouped_nf4": _case("grouped_nf4", PACKED),
    "grouped_nf4, mxfp4": _case("grouped_nf4", replace(MXFP4, tokens=6)),
    "slices": Case(Sliced, PACKED),
}
if find_spec("numba"):
    CASES |= {"numba": _case("numba", DENSE), "numba, 4 bits": _case("numba", PACKED)}
if find_spec("triton") and not torch.cuda.is_available():
    in_bits = replace(SMALL, quant_type="nf4", blocksize=32, config=UNSCALED)
    CASES |= {"triton": _case("triton", SMALL), "triton, 4 bits": _case("triton", in_bits)}


def each_of(*often: str) -> pytest.MarkDecorator:
    """Every case by its ``name``: often these, and all others at night."""
    names = [pytest.param(name, marks=[] if name in often else [pytest.mark.nightly]) for name in CASES]
    return pytest.mark.parametrize("name", names)


def leaves_of(inputs: Inputs) -> dict[str, Tensor]:
    """Everything differentiable, by name, without gradients."""
    return {name: tensor.detach() for name, tensor in inputs.tensors().items()}


def layer_of(executor: Executor, inputs: Inputs) -> Callable[[dict[str, Tensor]], Tensor]:
    """The executor's call as a function of all that is differentiable."""

    def layer(leaves: dict[str, Tensor]) -> Tensor:
        return call(executor, with_leaves(inputs, leaves))

    return layer


def with_leaves(inputs: Inputs, leaves: dict[str, Tensor]) -> Inputs:
    """The problem with other tensors."""
    own = {name: leaves[name] for name in inputs.weights.parameters()}
    inputs = replace(inputs, x=leaves["x"], weights=inputs.weights.with_parameters(own))
    return replace(inputs, router_logits=leaves.get("router_logits"), topk_weights=leaves.get("topk_weights"))


def specification_of(inputs: Inputs) -> Callable[[dict[str, Tensor]], Tensor]:
    """The specification's call, in float64, as such a function."""
    dense = {name: decode(packed).double() for name, packed in inputs.weights.packed().items()}

    def layer(leaves: dict[str, Tensor]) -> Tensor:
        given = with_leaves(inputs, {name: leaf.double() for name, leaf in leaves.items()})
        weights, x = given.weights.with_parameters(dense), given.x.reshape(-1, given.x.shape[-1])
        if given.router_logits is not None:
            y = moe_ref.moe(x, given.router_logits.reshape(-1, weights.num_experts), weights)
        else:
            assert given.topk_weights is not None
            top_k = given.topk_ids.shape[-1]
            y = moe_ref.routed_experts(
                x, given.topk_ids.reshape(-1, top_k), given.topk_weights.reshape(-1, top_k), weights
            )
        return y.reshape(given.x.shape)

    return layer


def directions(leaves: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """A tangent for each leaf."""
    drawn = torch.Generator().manual_seed(seed)
    return {name: torch.randn(leaf.shape, generator=drawn).to(leaf.dtype) for name, leaf in leaves.items()}

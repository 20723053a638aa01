"""Bugs of public systems, in the experts: each test fails for a system that has the bug.

Every test takes an executor. The decorator lists planted bugs, in which the test must fail; that is tested too.
Bugs of training and memory are in test_known_bugs_training.py, those of routing in test_known_bugs_routing.py.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import executors
from executors import Executor
from moe_ref import MoEConfig, MoEWeights, routed_experts_vjp
from moe_ref.conformance.judgement.call import run, to_torch
from moe_ref.conformance.judgement.checks import check_problem, check_repeatable, result_arrays
from moe_ref.conformance.judgement.exact import CASES
from moe_ref.conformance.judgement.reference import reference
from moe_ref.conformance.problems.build import Arrays, build
from moe_ref.conformance.problems.poison import poisoned
from moe_ref.conformance.problems.problem import Problem
from moe_ref.conformance.wrapped import experts
from moe_ref.error_bars import named
from moe_ref.types import DENSE, PARAMETERS
from planted import (
    ADAPTED,
    BASE,
    NAMES,
    Bug,
    Catches,
    Check,
    bug,
    demand_caught,
    demand_error_bars,
    inputs_of,
    with_gradient,
    with_gradients,
)

# Bugs whose tests are elsewhere.
COVERED_ELSEWHERE = {
    "shapes that depend on data, bincount among them, break capture (pytorch 192343)": (
        "test_dense_tracing.py::test_host_reads",
        "test_dense_tracing.py::test_grouped_mm_never_looks_at_a_value",
        "test_dense_tracing.py::test_compiles_whole_with_dynamic_tokens",
    ),
    "rows past the last group, as torch's own operator leaves them (pytorch 193633)": (
        "test_grouped_mm.py::test_rows_past_the_last_group_are_never_used",
    ),
    "offsets of 32 bits (Liger 1246)": ("test_dense.py::test_offsets_are_64_bit",),
    "a copy of the whole stack of weights, decoded or as it is (axolotl 3439)": (
        "test_dense.py::test_transposed_weights_are_not_copied",
        "test_grouped_nf4.py::test_peak_memory_stays_below_a_quarter_of_the_decoded_stack",
    ),
    "experts in 4 bits do not reload (unsloth-zoo 850, 856)": (
        "test_nf4_file.py::test_a_new_process_reads_what_was_saved",
        "test_nf4_file.py::test_a_new_process_computes_the_same_bits",
    ),
    "a cache keeps decoded weights alive under checkpoints (bitsandbytes' parametrization)": (
        "test_grouped_nf4.py::test_checkpoints_keep_nothing_decoded",
    ),
    "z is kept for backward though it is to be computed anew": (
        "test_dense.py::test_recompute_keeps_no_z_and_gives_the_same_bits",
        "test_dense.py::test_memory_kept_for_backward",
    ),
    "the logits drift under a replay (unsloth-zoo 1008)": (
        "test_dense_checkpoint.py::test_checkpointing_never_chooses_again",
        "test_dense_checkpoint.py::test_a_replay_that_would_choose_otherwise",
    ),
    "weights remembered by their address": ("test_conformance.py::test_remembered_weights_are_seen",),
}

catches = Catches()


@pytest.fixture(params=NAMES)
def executor(request: pytest.FixtureRequest) -> Executor:
    return executors.get(request.param)


def is_empty(ids: Tensor, weights: MoEWeights) -> Tensor:
    return (ids < 0) | (ids >= weights.num_experts)


@catches("zeros", "token_dropped", "last_row_of_group_dropped", "one_percent_more")
def test_c1_small_outputs_are_not_taken_for_zeros(executor: Executor) -> None:
    """A kernel returned zeros, and a test with a tolerance of 1e-2 let it pass (sonic-moe 63)."""
    for dtype in ("float32", "bfloat16"):
        problem = replace(BASE, entry="layer", config=MoEConfig(2, routed_scaling_factor=2.0**-12), dtype=dtype)
        exact = torch.from_numpy(reference(problem).bars["y"].exact)
        torch.testing.assert_close(torch.zeros_like(exact), exact, rtol=1e-2, atol=1e-2)  # it would let it pass here
        check_problem(executor, problem)


@bug
def unwritten_rows_times_zero(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    y = experts(inner, x, ids, w, weights)
    return torch.where(is_empty(ids, weights).any(1, keepdim=True), y + 0 * torch.empty_like(x), y)


@bug
def unwritten_rows_of_dx(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    empty = is_empty(ids, weights).any(1, keepdim=True)
    spoiled = with_gradient(x, lambda g: torch.where(empty, g + 0 * torch.empty_like(g), g))
    return experts(inner, spoiled, ids, w, weights)


@bug
def unwritten_rows_in_dw(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    times_zero = with_gradients(weights, lambda g: g + 0 * torch.empty_like(g), ("gate_up_proj",))
    return experts(inner, x, ids, w, times_zero if is_empty(ids, weights).any() else weights)


@catches("row_left_unwritten", "empty_slot_counts", unwritten_rows_times_zero, unwritten_rows_of_dx)
@catches(unwritten_rows_in_dw)
def test_r7_rows_of_no_group_reach_nothing(executor: Executor) -> None:
    """Rows past the last offset were never written, and NaN times zero is NaN (pytorch 193633, 154557)."""
    for problem in (replace(ADAPTED, empty_slots=True), replace(BASE, empty_slots=True, dtype="bfloat16")):
        check_problem(executor, problem)
        inputs = inputs_of(problem)
        with poisoned():
            nothing = run(executor, replace(inputs, topk_ids=torch.full_like(inputs.topk_ids, -1)))
        for name, value in nothing.tensors.items():
            assert not value.any(), name  # NaN counts as true


def unwritten_gradient(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights, name: str) -> Tensor:
    used = torch.zeros(weights.num_experts, dtype=torch.bool)
    used[ids.unique()] = True

    def change(gradient: Tensor) -> Tensor:
        return torch.where(used.view(-1, *(1,) * (gradient.ndim - 1)), gradient, torch.empty_like(gradient))

    return experts(inner, x, ids, w, with_gradients(weights, change, (name,)))


@catches("empty_experts_gradient_stale", *(bug(partial(unwritten_gradient, name=name)) for name in PARAMETERS))
def test_d2_empty_expert_has_zero_gradient(executor: Executor) -> None:
    """The gradient of an expert without tokens was whatever torch.empty held (grouped_gemm 36, pytorch 172439)."""
    for dtype in ("float32", "bfloat16"):
        inputs = inputs_of(replace(ADAPTED, dtype=dtype))
        ids = torch.tensor([1, 3]).expand_as(inputs.topk_ids)  # the first, one amid others, and the last are empty
        with poisoned():
            result = run(executor, replace(inputs, topk_ids=ids))
        for name in inputs.weights.parameters():
            gradient = result.tensors[name]
            assert not gradient[[0, 2, 4]].any(), name
            assert gradient[[1, 3]].isfinite().all(), name
            assert gradient[[1, 3]].any(), name


@bug
def strides_ignored(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    up = weights.gate_up_proj
    rows, width = up.shape[1:]
    read = up.as_strided(up.shape, (rows * width, width, 1))
    return experts(inner, x, ids, w, replace(weights, gate_up_proj=read))


@bug
def address_rounded_down(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    down = weights.down_proj
    step = 16 // down.element_size()
    read = down.as_strided(down.shape, down.stride(), down.storage_offset() // step * step)
    return experts(inner, x, ids, w, replace(weights, down_proj=read))


def shifted(value: Tensor) -> Tensor:
    """The same numbers, offset by one element from the start of their memory."""
    memory = torch.full((value.numel() + 1,), torch.nan, dtype=value.dtype)
    memory[1:] = value.detach().reshape(-1)
    return memory[1:].view(value.shape).requires_grad_(value.requires_grad)


@catches("hidden_tail_dropped", "intermediate_tail_dropped", strides_ignored, address_rounded_down)
def test_e4_unaligned_strides_and_odd_sizes(executor: Executor) -> None:
    """Strides that are not multiples of 16 bytes were accepted and read wrong (transformers 48644)."""
    even = replace(BASE, tokens=9)
    for problem in (
        replace(even, hidden=7, intermediate=5),
        replace(even, hidden=17, intermediate=33, dtype="bfloat16", weights_layout="transposed"),
        replace(even, hidden=1, intermediate=3, dtype="bfloat16", weights_layout="sliced", x_layout="sliced"),
        replace(even, hidden=9, intermediate=4, x_layout="transposed", dy_layout="sliced", gate_up_rank=3),
    ):
        check_problem(executor, problem)
    for problem in (even, replace(even, dtype="bfloat16")):
        inputs = inputs_of(problem)
        moved = replace(inputs, x=shifted(inputs.x), dy=shifted(inputs.dy), weights=inputs.weights.map(shifted))
        demand_error_bars(executor, problem, moved)


@bug
def slots_in_random_order(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    order = torch.randperm(ids.shape[1])
    return experts(inner, x, ids[:, order], w[:, order], weights)


@bug
def tokens_in_random_order(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    order = torch.randperm(len(x))
    return experts(inner, x[order], ids[order], w[order], weights)[order.argsort()]


@catches("not_repeatable", slots_in_random_order, tokens_in_random_order)
def test_c1_many_tokens_and_duplicates_add_up_the_same_way(executor: Executor) -> None:
    """Sums by index_add differed from run to run, and so did sampled text at temperature 0 (transformers 43360)."""
    problem = Problem(1024, 6, 16, 8, MoEConfig(4), entry="experts", cut_points=True, gate_up_bias=True, down_bias=True)
    ordered = np.sort(build(problem).topk_ids, axis=1)
    assert (ordered[:, 1:] == ordered[:, :-1]).any(axis=1).mean() > 0.5
    check_repeatable(executor, problem)
    check_repeatable(executor, replace(problem, tokens=64, dtype="bfloat16", gate_up_rank=2, down_rank=2))


def read_transposed(
    inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights, name: str, strided: bool
) -> Tensor:
    """Reads square matrices, all or only views, as stored the other way."""
    matrix = weights.parameters()[name]
    turned = matrix.transpose(1, 2) if not (strided and matrix.is_contiguous()) else matrix
    return experts(inner, x, ids, w, weights.with_parameters({name: turned}))


def trained_transposed(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights, name: str) -> Tensor:
    return experts(inner, x, ids, w, with_gradients(weights, lambda g: g.transpose(1, 2), (name,)))


@catches(*(bug(partial(read_transposed, name=name, strided=strided)) for name in DENSE[:2] for strided in (0, 1)))
@catches(*(bug(partial(trained_transposed, name=name)) for name in DENSE[:2]))
def test_e4_square_matrices_keep_their_orientation(executor: Executor) -> None:
    """Square matrices, whose shape does not tell, were trained transposed (unsloth-zoo 849)."""
    problem, arrays, _ = CASES["small_integers"]("float32")
    weights = arrays.weights
    assert weights.gate_up_proj.shape == weights.down_proj.shape == (3, 32, 32)
    turned = weights.with_parameters({n: v.transpose(0, 2, 1) for n, v in weights.parameters().items()})
    results = []
    for layout in ("contiguous", "transposed"):
        for layer in (weights, turned):
            results.append(demand_equality(executor, replace(problem, weights_layout=layout), arrays, layer))
    assert (results[0] != results[1]).any()
    check_problem(executor, replace(BASE, hidden=16, intermediate=8))  # 2I = H


def demand_equality(executor: Executor, problem: Problem, arrays: Arrays, weights: MoEWeights) -> np.ndarray:
    """Y and all gradients equal the specification's; returns y."""
    given = replace(arrays, weights=weights)
    exact = named(*routed_experts_vjp(given.x, given.topk_ids, given.topk_weights, weights, given.dy))
    actual = result_arrays(run(executor, to_torch(problem, given)))
    for name, value in actual.items():
        assert (value == exact[name]).all(), name
    return actual["y"]


@catches("ids_read_as_int32", "empty_slot_counts")
def test_e5_ids_beyond_32_bits_name_no_expert(executor: Executor) -> None:
    """Numbers beyond 32 bits wrapped round to valid ones (Liger 1246, vllm 34279, sglang 4727, flashinfer 2642)."""
    huge = torch.tensor([2**31, 2**32, 2**32 + 1, 2**40, -(2**31), -(2**32), 2**63 - 1, -(2**63)])
    results = []
    for first in (huge, torch.full_like(huge, -1)):
        inputs = inputs_of(replace(BASE, tokens=8))
        ids = torch.stack([first, inputs.topk_ids[:, 1]], dim=1)
        ids[1, 1] = -1
        inputs.x.data[1] = torch.nan  # of a token that has no expert: nobody reads it
        results.append(run(executor, replace(inputs, topk_ids=ids)).tensors)
    for name, value in results[0].items():
        assert value.isfinite().all(), name
        assert torch.equal(value, results[1][name]), name


@bug
def one_expert_needs_no_weight(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    return experts(inner, x, ids, w if weights.num_experts > 1 else w * 0 + 1, weights)


@bug
def few_experts_take_all_in_turn(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    turns = torch.arange(ids.numel()).view_as(ids) % weights.num_experts
    return experts(inner, x, ids if weights.num_experts > 4 else turns, w, weights)


@catches(one_expert_needs_no_weight, few_experts_take_all_in_turn)
def test_e3_few_experts(executor: Executor) -> None:
    """A separate path for few experts, where the grouped one is slower (TransformerEngine 2939), must be right too."""
    for num_experts, top_k in ((1, 1), (4, 2), (4, 4)):
        problem = replace(BASE, experts=num_experts, config=MoEConfig(top_k, scoring="sigmoid"))
        check_problem(executor, replace(problem, entry="layer"))
        check_problem(executor, replace(problem, dtype="bfloat16"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("check", "planted"), catches.pairs())
def test_planted_bug_is_caught(check: Check, planted: Bug, name: str) -> None:
    demand_caught(check, planted, name)


def test_every_test_of_an_executor_has_a_planted_bug() -> None:
    catches.demand_that_all_have_bugs(globals())


@pytest.mark.parametrize("place", [place for places in COVERED_ELSEWHERE.values() for place in places])
def test_covered_elsewhere_exists(place: str) -> None:
    file, test = place.split("::")
    (path,) = Path(__file__).parents[1].rglob(file)
    assert f"\ndef {test}(" in path.read_text()

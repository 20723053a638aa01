"""Cases in which every step is representable, so that results must be equal.

The gate's slope is so steep (alpha = 1000) that its sigmoid is exactly 1, and all other numbers are powers of two or
small integers: fp64, fp32, bf16 and fp16 must all give the specification's numbers to the last bit. A sum of 512 ones
must be 512; an accumulator in bf16 stops at 256.
"""

from __future__ import annotations

from dataclasses import replace
from math import lcm
from typing import TYPE_CHECKING

import numpy as np

from moe_ref.conformance.judgement.call import run, to_torch
from moe_ref.conformance.judgement.checks import ConformanceError, result_arrays
from moe_ref.conformance.problems.aligned import aligned
from moe_ref.conformance.problems.build import Arrays
from moe_ref.conformance.problems.declared import undeclared
from moe_ref.conformance.problems.packed import decoded, in_whole_blocks, quantized
from moe_ref.conformance.problems.poison import modes
from moe_ref.conformance.problems.problem import Problem
from moe_ref.error_bars import named
from moe_ref.layer import layer_vjp
from moe_ref.numerics import FORMATS, round_to_nearest
from moe_ref.types import ExpertLoRA, MoEConfig, MoEWeights

if TYPE_CHECKING:
    from executors import Capabilities, Executor


def check_exact(executor: Executor, case: str, dtype: str, device: str = "cpu") -> str:
    """Checks one of `CASES` in one dtype: y and all gradients equal the specification's.

    An executor without dense weights gets them in 4 bits, in a format that holds them exactly.

    Returns:
        The reason why the case does not apply to the executor, or "".

    Raises:
        ConformanceError: if a number differs.
    """
    problem, arrays, clause = CASES[case](dtype)
    able = executor.capabilities
    kinds = ["dense"] if "dense" in able.weights else sorted(able.weights)
    lacking = ""
    for kind in kinds:
        for form, numbers in forms_of(problem, arrays, kind, able):
            if lacks := undeclared(form, able):
                lacking = lacking or f"{executor.name} does not declare {lacks}"
                continue
            weights = held(numbers.weights, form)
            if weights is not None:
                check_equal(executor, form, replace(numbers, weights=weights), f"{clause} ({case})", device)
                return ""
    return lacking or f"{', '.join(kinds)}: none holds these weights exactly"


def forms_of(problem: Problem, arrays: Arrays, kind: str, able: Capabilities) -> list[tuple[Problem, Arrays]]:
    """The problem with projections of a kind, in declared sizes and dtypes; in 4 bits with small blocks.

    Of these some have widths such that each block is within a row.

    Where the kind is not declared, one form is left, which says so.
    """
    form = replace(problem, quant_type="" if kind == "dense" else kind)
    if kind not in ("nf4", "fp4"):
        return [aligned(form, arrays, able)]
    found = []
    for size in sorted(able.blocksizes)[:2]:
        alone = replace(
            able, align_hidden=lcm(able.align_hidden, size), align_intermediate=lcm(able.align_intermediate, size)
        )
        found += [aligned(replace(form, blocksize=size), arrays, units) for units in (able, alone)]
    return found


def held(weights: MoEWeights, problem: Problem) -> MoEWeights | None:
    """The weights in the problem's form, or None if it does not hold them exactly."""
    if in_whole_blocks(problem) != problem:
        return None
    packed = quantized(weights, problem)
    dense = decoded(packed).parameters()
    return packed if all((dense[name] == getattr(weights, name)).all() for name in packed.packed()) else None


def check_equal(executor: Executor, problem: Problem, arrays: Arrays, clause: str, device: str) -> None:
    """Demands that y and all gradients equal the specification's, to the last bit.

    Raises:
        ConformanceError: if a number differs, or a gradient is missing.
    """
    y, gradients = layer_vjp(arrays.x, None, arrays.topk_ids, arrays.topk_weights, arrays.weights, arrays.dy)
    exact = {n: round_to_nearest(v, problem.dtype_of(n)) if n == "y" else v for n, v in named(y, gradients).items()}
    for mode in modes(executor):
        with mode():
            result = run(executor, to_torch(problem, arrays, device), executor.capabilities.backward)
        for name, actual in result_arrays(result).items():
            wrong = actual != exact[name]
            if wrong.any():
                where = tuple(int(i) for i in np.argwhere(wrong)[0])
                message = f"{name}{where}={actual[where]}, but must be exactly {exact[name][where]}"
                raise ConformanceError(executor, problem, clause, message, name, arrays)
        if executor.capabilities.backward and result.missing:
            message = f"no gradient of {', '.join(result.missing)}"
            raise ConformanceError(executor, problem, clause, message, result.missing[0], arrays)


def long_sums(dtype: str) -> tuple[Problem, Arrays, str]:
    """512 ones sum to 512 in both products, in dx and in d topk_weights (E2)."""
    return _case(
        dtype,
        "E2",
        x=np.ones((2, 512)),
        dy=np.full((2, 512), 2.0**-8),
        gate=np.ones((1, 1, 512)),
        up=np.zeros((1, 1, 512)),
        down=np.ones((1, 512, 1)),
    )


def many_rows(dtype: str) -> tuple[Problem, Arrays, str]:
    """512 tokens each add one to the gradients of weights and biases, after one that adds many (E2, D1)."""
    dy = np.ones((513, 1))
    dy[0] = _more_than_it_counts(dtype)
    return _case(
        dtype,
        "E2, D1",
        x=np.ones(dy.shape),
        dy=dy,
        gate=np.ones((1, 1, 1)),
        up=np.zeros((1, 1, 1)),
        down=np.ones((1, 1, 1)),
        biases=True,
    )


def many_rows_of_adapters(dtype: str) -> tuple[Problem, Arrays, str]:
    """The same for the factors of adapters: the gate is 1 + 1, so that each token adds twice as much to some."""
    problem, arrays, clause = many_rows(dtype)
    gate_alone, one = np.array([[[1.0], [0.0]]]), np.ones((1, 1, 1))
    lora = ExpertLoRA(one, gate_alone, one, one)
    weights = replace(arrays.weights, gate_up_proj_bias=None, down_proj_bias=None, lora=lora)
    ranks = replace(problem, gate_up_bias=False, down_bias=False, gate_up_rank=1, down_rank=1, lora_dtype=dtype)
    return ranks, replace(arrays, weights=weights), clause


def clamp_at_equality(dtype: str) -> tuple[Problem, Arrays, str]:
    """Pre-activations exactly at the limit, where the clamp's derivative is 1 (E1), and beyond it, where it is 0."""
    x = np.array([[1.0], [2.0], [0.5]])  # gate and up at, beyond, and below the limit of 1
    return _case(
        dtype,
        "E1",
        x=x,
        dy=np.ones((3, 1)),
        gate=np.ones((1, 2, 1)),
        up=np.array([[[1.0], [-1.0]]]),
        down=np.ones((1, 1, 2)),
        limit=1.0,
    )


def late_clamp_at_equality(dtype: str) -> tuple[Problem, Arrays, str]:
    """The same where the clamp comes after the activation, which is exact here."""
    problem, arrays, clause = clamp_at_equality(dtype)
    weights = replace(arrays.weights, config=replace(problem.config, clamp="after"))
    return replace(problem, config=weights.config), replace(arrays, weights=weights), clause


def wide_combine(dtype: str) -> tuple[Problem, Arrays, str]:
    """A large slot and two small ones add up in at least fp32, in y and in dx (C1, E2)."""
    large = _more_than_it_counts(dtype)
    return _case(
        dtype,
        "C1",
        x=np.ones((2, 1)),
        dy=np.ones((2, 1)),
        gate=np.ones((3, 1, 1)),
        up=np.zeros((3, 1, 1)),
        down=np.array([[[large]], [[1.0]], [[1.0]]]),
    )


def plain_combine(dtype: str) -> tuple[Problem, Arrays, str]:
    """The same with plain SwiGLU: the sigmoid of 64 is 1 in fp64 too, and ups of 1/64 make h = 1."""
    problem, arrays, clause = wide_combine(dtype)
    config = MoEConfig(top_k=problem.experts)
    stack = np.tile([[64.0], [1 / 64]], (problem.experts, 1, 1))
    weights = replace(arrays.weights, gate_up_proj=stack, config=config)
    arrays = replace(arrays, dy=arrays.dy / 64, weights=weights)  # ups' gradients are 64 times that
    return replace(problem, config=config), arrays, clause


def plain_sums(dtype: str) -> tuple[Problem, Arrays, str]:
    """512 ones sum to 512 with plain SwiGLU: so do the gates, whose sigmoid is 1, and the ups are 1/512 each (E2)."""
    problem, arrays, clause = long_sums(dtype)
    config = MoEConfig(top_k=1)
    stack = np.concatenate([np.ones((1, 1, 512)), np.full((1, 1, 512), 1 / 512)], axis=1)
    weights = replace(arrays.weights, gate_up_proj=stack, config=config)
    return replace(problem, config=config), replace(arrays, weights=weights), clause


def plain_rows(dtype: str) -> tuple[Problem, Arrays, str]:
    """A thousand rows of one expert: each adds one to a large number, in every gradient (E2, D1).

    It is so large that sums of 32 of them get lost in 16 bits too, and stands in the middle, whatever the order is. The
    gate is 64, and the up half 1/64.
    """
    config = MoEConfig(top_k=1)
    dy = np.full((1025, 1), 2.0**-7)
    dy[512] *= 2.0**15 if dtype == "bfloat16" else 2.0**16
    problem = Problem(len(dy), 1, 1, 1, config, dtype, entry="experts")
    weights = MoEWeights(np.array([[[64.0], [1 / 64]]]), np.ones((1, 1, 1)), config=config)
    arrays = Arrays(np.ones(dy.shape), dy, np.zeros(dy.shape, int), None, np.ones(dy.shape), weights)
    return problem, arrays, "E2, D1"


def plain_rows_of_biases(dtype: str) -> tuple[Problem, Arrays, str]:
    """The same with biases, which are 0."""
    problem, arrays, clause = plain_rows(dtype)
    weights = replace(arrays.weights, gate_up_proj_bias=np.zeros((1, 2)), down_proj_bias=np.zeros((1, 1)))
    problem = replace(problem, gate_up_bias=True, down_bias=True, bias_dtype=dtype)
    return problem, replace(arrays, weights=weights), clause


def plain_rows_of_adapters(dtype: str) -> tuple[Problem, Arrays, str]:
    """The same with adapters, which make half of the gate and of the output."""
    problem, arrays, clause = plain_rows(dtype)
    one = np.ones((1, 1, 1))
    lora = ExpertLoRA(one, np.array([[[32.0], [0.0]]]), one / 2, one)
    stack = np.array([[[32.0], [1 / 64]]])
    weights = replace(arrays.weights, gate_up_proj=stack, down_proj=one / 2, lora=lora)
    problem = replace(problem, gate_up_rank=1, down_rank=1, lora_dtype=dtype)
    return problem, replace(arrays, weights=weights), clause


def small_integers(dtype: str) -> tuple[Problem, Arrays, str]:
    """Whole numbers through squared ReLU, without a gate: every step and gradient is a small whole number (E1).

    Each row and each column of both projections has four nonzero elements, all of them +1 or -1.
    """
    rng = np.random.default_rng(0)
    tokens, experts, top_k, size = 6, 3, 2, 32

    def sparse() -> np.ndarray:
        places = sum(np.roll(np.eye(size), 5 * shift, axis=1) for shift in range(4))
        return places * rng.choice([-1.0, 1.0], (experts, size, size))

    config = MoEConfig(top_k=top_k, activation="relu2")
    problem = Problem(tokens, experts, size, size, config, dtype=dtype, entry="experts")
    weights = MoEWeights(sparse(), sparse(), config=config)
    ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k]
    x, dy = rng.choice([0.0, 1.0], (tokens, size)), rng.choice([-1.0, 0.0, 1.0], (tokens, size))
    topk_weights = np.tile([1.0, 2.0], (tokens, 1))
    return problem, Arrays(x, dy, ids, None, topk_weights, weights), "E1"


def _case(
    dtype: str,
    clause: str,
    x: np.ndarray,
    dy: np.ndarray,
    gate: np.ndarray,
    up: np.ndarray,
    down: np.ndarray,
    limit: float | None = None,
    biases: bool = False,
) -> tuple[Problem, Arrays, str]:
    (tokens, hidden), experts = x.shape, gate.shape[0]
    config = MoEConfig(top_k=experts, alpha=1000.0, limit=limit, up_offset=1.0)
    problem = Problem(tokens, gate.shape[0], hidden, gate.shape[1], config, dtype=dtype, entry="experts")
    weights = MoEWeights(np.concatenate([gate, up], axis=1), down, config=config)
    if biases:
        problem = replace(problem, gate_up_bias=True, down_bias=True, bias_dtype=dtype)
        zeros = [np.zeros(stack.shape[:2]) for stack in (weights.gate_up_proj, down)]
        weights = replace(weights, gate_up_proj_bias=zeros[0], down_proj_bias=zeros[1])
    ids = np.tile(np.arange(experts), (tokens, 1))  # every token goes to every expert, with weight 1
    return problem, Arrays(x, dy, ids, None, np.ones(ids.shape), weights), clause


def _more_than_it_counts(dtype: str) -> float:
    """A power of two to which an accumulator in 16 bits adds one in vain: 256 in bf16, else 2048."""
    return float(2.0 ** min(FORMATS[dtype].precision, 11))


_ALL = (
    long_sums,
    many_rows,
    many_rows_of_adapters,
    clamp_at_equality,
    late_clamp_at_equality,
    wide_combine,
    plain_combine,
    plain_sums,
    plain_rows,
    plain_rows_of_biases,
    plain_rows_of_adapters,
    small_integers,
)
CASES = {case.__name__: case for case in _ALL}

"""Shows every number of a projection in 4 bits by one-hot tokens, and demands that it is decoded to the last bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from math import lcm
from typing import TYPE_CHECKING

import numpy as np

from moe_ref.conformance.judgement.exact import check_equal
from moe_ref.conformance.problems.build import Arrays
from moe_ref.conformance.problems.declared import fitted, undeclared
from moe_ref.conformance.problems.packed import quantized
from moe_ref.conformance.problems.problem import Problem
from moe_ref.mxfp4 import BLOCKSIZE
from moe_ref.types import MoEConfig, MoEWeights, MXFP4Tensor, PackedTensor

if TYPE_CHECKING:
    from executors import Capabilities, Executor

SIZE = 64  # H and I are this, or the next multiple that the executor declares
EXPERTS = 2
GATE = 64.0
LAYOUTS = ("contiguous", "transposed")
BLOCKSIZES = (32, 64, 4096)  # as far as declared
# Of MXFP4: the tokens' number, and the exponents whose codes times that number have squares in range. Together all in
# fp32 and bf16, but for two whose products with the largest codes are infinite, and for 255, which is NaN.
WINDOWS = ((2.0**100, range(88)), (1.0, range(66, 188)), (2.0**-100, range(166, 253)))
WINDOWS_OF_FP16 = ((1.0, range(121, 133)),)


def check_every_code(executor: Executor, quant_type: str, nested: str, dtype: str, device: str = "cpu") -> str:
    """Demands that every number of a projection in 4 bits is decoded to the last bit (Q1, Q2, Q3, M1).

    Token j is 1 or -1 at position j (or another power of two), squared ReLU hides the sign, and the down projection is
    the identity: y holds the squares of column j. An executor without squared ReLU gets SwiGLU, with gates of 64 or so,
    whose sigmoid is 1 even in fp64: y holds 64 times column j, with its sign. NF4 and FP4 come in two sizes: in one of
    them rows end within a block.

    Returns:
        The reason why the case does not apply to the executor, or "".

    Raises:
        ConformanceError: if a number differs.
    """
    able = executor.capabilities
    clause = "M1 (every code)" if quant_type == "mxfp4" else "Q1, Q2, Q3 (every code)"
    unit = lcm(able.align_hidden, able.align_intermediate)
    sizes = [lcm(SIZE, unit), 3 * lcm(SIZE // 2, unit)]  # in the second rows end within a block
    for size in sizes[:1] if quant_type == "mxfp4" else sizes:
        problem = _problem(able, size, quant_type, nested, dtype)
        lacking = undeclared(problem, able)
        if lacking:
            return f"{executor.name} does not declare {lacking}"
        for form, scale, gate_up in _forms(problem, able, size == sizes[1]):
            identity = quantized(_weights(np.eye(size), form), replace(form, nested="")).down_proj
            weights = MoEWeights(gate_up, identity, config=problem.config)
            x = scale * np.concatenate([np.eye(size), -np.eye(size)])[: problem.tokens]
            for expert in range(EXPERTS):  # all tokens go to it
                ids = np.full((problem.tokens, 1), expert)
                arrays = Arrays(x, np.zeros_like(x), ids, None, np.ones(ids.shape), weights)
                check_equal(executor, form, arrays, clause, device)
    return ""


def _problem(able: Capabilities, size: int, quant_type: str, nested: str, dtype: str) -> Problem:
    """A problem of H = I = size, with a token for each column, and under squared ReLU one for its opposite."""
    squared = "relu2" in able.activations
    config = MoEConfig(top_k=1, activation="relu2" if squared else "swiglu")
    tokens = (1 + squared) * size
    problem = Problem(tokens, EXPERTS, size, size, config, dtype, "experts", quant_type=quant_type, nested=nested)
    return replace(fitted(problem, able), nested=nested)


def _forms(problem: Problem, able: Capabilities, across: bool) -> Iterator[tuple[Problem, float, PackedTensor]]:
    """Forms of the problem, the tokens' number, and a projection, in blocks that lie across rows if that is asked."""
    layouts = LAYOUTS if "weights" in able.strided else LAYOUTS[:1]
    interleaved = problem.config.gate_up_layout == "interleaved"
    if interleaved:  # where a block of a row is of gates alone, or of ups
        layouts = LAYOUTS[:1]
    if problem.kinds[0] == "mxfp4":
        return _of_mxfp4(problem, layouts)
    size, declared = problem.hidden, sorted(able.blocksizes)
    if interleaved:
        blocksizes = [] if across else [blocksize for blocksize in declared if size % blocksize == 0]
    elif across:
        blocksizes = [blocksize for blocksize in declared if size % blocksize][:1]
    else:
        blocksizes = [blocksize for blocksize in BLOCKSIZES if blocksize in declared] or declared[:1]
    return _of_nf4(problem, layouts, blocksizes)


def _of_nf4(
    problem: Problem, layouts: Sequence[str], blocksizes: Sequence[int]
) -> Iterator[tuple[Problem, float, PackedTensor]]:
    """Forms of the problem, the tokens' number, and normal numbers with a different scale in each row."""
    size = problem.hidden
    for seed, (layout, blocksize) in enumerate(product(layouts, blocksizes)):
        form = replace(problem, blocksize=blocksize, weights_layout=layout)
        rng = np.random.default_rng(seed)
        rows = rng.standard_normal((EXPERTS, size, size)) * np.exp(rng.standard_normal((EXPERTS, size, 1)))
        yield form, 1.0, quantized(_weights(rows, form), form).gate_up_proj


def _of_mxfp4(problem: Problem, layouts: Sequence[str]) -> Iterator[tuple[Problem, float, PackedTensor]]:
    """Forms of the problem, the tokens' number, and all codes under all exponents of a window.

    No number is subnormal, because products of processors may flush those to zero. So exponents 0 and 1 have codes from
    2 on.
    """
    size = problem.hidden
    windows = WINDOWS_OF_FP16 if problem.dtype == "float16" else WINDOWS
    for seed, (layout, (scale, window)) in enumerate(product(layouts, windows)):
        form = replace(problem, weights_layout=layout)
        rng = np.random.default_rng(seed)
        blocks = rng.integers(0, 256, (EXPERTS, size, size // BLOCKSIZE, BLOCKSIZE // 2), dtype=np.uint8)
        exponents = np.resize(np.array(window, dtype=np.uint8), (EXPERTS, blocks[0, ..., 0].size))
        scales = rng.permuted(exponents, axis=1).reshape(blocks.shape[:-1])
        blocks = np.where(scales[..., None] < 2, blocks | 0x44, blocks)
        if problem.config.gated:
            gates = _gates(blocks, scales, scale)
            axis = 2 if layout == "transposed" else 1
            blocks, scales = (_rows(*pair, problem, axis) for pair in zip(gates, (blocks, scales), strict=True))
        tensor = MXFP4Tensor(blocks, scales, dtype=problem.dtype)
        yield form, scale, tensor.transpose(1, 2) if layout == "transposed" else tensor


def _weights(matrix: np.ndarray, problem: Problem) -> MoEWeights:
    """One matrix, or one for each expert, as both projections; gates are `GATE` everywhere."""
    stack = np.broadcast_to(matrix, (EXPERTS, *matrix.shape[-2:]))
    both = _rows(np.full_like(stack, GATE), stack, problem) if problem.config.gated else stack
    return MoEWeights(both, stack, config=problem.config)


def _gates(blocks: np.ndarray, scales: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Gates beside these ups: codes of 4.0, under the exponent that makes their product with x `GATE`."""
    exponent = 127 + int(np.log2(GATE / 4 / scale))
    return np.full_like(blocks, 0x66), np.full_like(scales, exponent)


def _rows(gate: np.ndarray, up: np.ndarray, problem: Problem, axis: int = 1) -> np.ndarray:
    """Rows of gates and of ups, as the configuration lays them."""
    if problem.config.gate_up_layout == "concatenated":
        return np.concatenate([gate, up], axis=axis)
    return np.stack([gate, up], axis=axis + 1).reshape(*gate.shape[:axis], -1, *gate.shape[axis + 1 :])

"""Problems with weights in 4 bits: quantises the weights, and reorders experts exactly."""

from __future__ import annotations

from dataclasses import replace
from math import lcm
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_ref import mxfp4
from moe_ref.conformance.problems.problem import Problem
from moe_ref.nf4 import absmax_of, quantize
from moe_ref.packed import decode
from moe_ref.types import MoEWeights, MXFP4Tensor, NF4Tensor, PackedTensor

if TYPE_CHECKING:
    from executors import Capabilities


def quantized(weights: MoEWeights, problem: Problem) -> MoEWeights:
    """Quantises the projections to the problem's 4-bit formats; what is dense in the problem stays as it is."""
    forms = {name: kind for name, kind in problem.quant_types.items() if kind}
    return weights.with_parameters({n: _quantized(getattr(weights, n), problem, kind) for n, kind in forms.items()})


def in_whole_blocks(problem: Problem) -> Problem:
    """The problem in sizes that its format allows: for MXFP4, widths that are multiples of 32 (M1)."""
    if "mxfp4" not in problem.kinds:
        return problem
    return replace(problem, hidden=_whole(problem.hidden), intermediate=_whole(problem.intermediate))


def _whole(width: int, blocksize: int = mxfp4.BLOCKSIZE) -> int:
    return -(-width // blocksize) * blocksize


def _quantized(projection: np.ndarray, problem: Problem, quant_type: str) -> PackedTensor:
    """Quantises a projection in storage order."""
    transposed = problem.weights_layout == "transposed"
    stored = np.ascontiguousarray(projection.swapaxes(1, 2) if transposed else projection).astype(np.float32)
    is_mxfp4 = quant_type == "mxfp4"
    tensor = mxfp4.quantize(stored, dtype=problem.dtype) if is_mxfp4 else _in_nf4(stored, problem, quant_type)
    return tensor.transpose(1, 2) if transposed else tensor


def straddles(problem: Problem) -> bool:
    """Whether a block of a projection in NF4 or FP4 straddles experts."""
    sizes = {"gate_up_proj": problem.gate_up_rows, "down_proj": problem.intermediate}
    return any(
        problem.quant_types[name] in ("nf4", "fp4") and rows * problem.hidden % problem.blocksize
        for name, rows in sizes.items()
    )


def _in_nf4(stored: np.ndarray, problem: Problem, quant_type: str) -> NF4Tensor:
    """Quantises; each expert has its own nested statistics only if no block straddles experts (Q5)."""
    form: dict[str, Any] = {"dtype": problem.dtype, "quant_type": quant_type, "blocksize": problem.blocksize}
    if problem.nested == "per expert" and stored[0].size % problem.blocksize == 0:
        return _joined([quantize(expert, **form, nested=True) for expert in stored], stored.shape)
    return quantize(stored, **form, nested=bool(problem.nested))


def _joined(parts: list[NF4Tensor], shape: tuple[int, ...]) -> NF4Tensor:
    def join(name: str) -> np.ndarray:
        return np.concatenate([np.atleast_1d(getattr(part, name)) for part in parts])

    return replace(
        parts[0],
        packed=join("packed"),
        absmax=join("absmax"),
        nested_absmax=join("nested_absmax"),
        nested_offset=join("nested_offset"),
        shape=shape,
    )


def decoded(weights: MoEWeights) -> MoEWeights:
    """Decodes what is in 4 bits: packed NumPy to float64 NumPy."""
    return weights.with_parameters({n: decode(t).astype(np.float64) for n, t in weights.packed().items()})


def with_own_blocks(problem: Problem, able: Capabilities) -> Problem:
    """The problem in sizes such that no block straddles experts, so that experts can be reordered.

    Blocks are the smallest of those that are declared, and H and I multiples of what is.
    """
    if not {"nf4", "fp4"} & set(problem.kinds):  # no block of MXFP4 straddles rows, let alone experts
        return problem
    smallest = min(able.blocksizes)
    width = min(smallest, 64)  # of H; larger blocks go over several columns of it
    unit = lcm(smallest // width, able.align_intermediate, mxfp4.BLOCKSIZE if "mxfp4" in problem.kinds else 1)
    return replace(
        problem,
        hidden=_whole(problem.hidden, lcm(width, able.align_hidden)),
        intermediate=_whole(problem.intermediate, unit),
        blocksize=smallest,
    )


def of_experts(weights: MoEWeights, experts: np.ndarray) -> MoEWeights:
    """The layer with its experts in another order; -1 stands for an expert of NaN.

    No block may straddle experts. Nested statistics are decoded first, which is exact (Q5).
    """
    nobody = experts == -1

    def pick(value: np.ndarray) -> np.ndarray:
        return np.where(nobody.reshape(-1, *(1,) * (value.ndim - 1)), np.nan, value[experts])

    picked = replace(weights, post_expert_norm=None).map(pick)
    picked = replace(picked, post_expert_norm=weights.post_expert_norm)  # one for all experts
    return picked.with_parameters(
        {name: _of_experts(tensor, experts, nobody) for name, tensor in weights.packed().items()}
    )


def _of_experts(tensor: PackedTensor, experts: np.ndarray, nobody: np.ndarray) -> PackedTensor:
    if isinstance(tensor, MXFP4Tensor):
        scales = np.where(nobody[:, None, None], np.uint8(mxfp4.NAN), tensor.scales[experts])
        return replace(tensor, blocks=tensor.blocks[experts], scales=scales)
    assert isinstance(tensor, NF4Tensor)
    number = tensor.shape[0]
    codes = tensor.packed.reshape(number, -1)[experts]
    absmax = absmax_of(tensor).reshape(number, -1)[experts]
    absmax = np.where(nobody[:, None], np.float32(np.nan), absmax)
    return replace(
        tensor,
        packed=codes.reshape(-1),
        absmax=absmax.reshape(-1),
        nested_absmax=None,
        nested_code=None,
        nested_offset=None,
        shape=(len(experts), *tensor.shape[1:]),
    )

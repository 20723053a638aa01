"""Problems for grouped_nf4, and its way for GPUs made to run on a CPU."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from dense_cases import CONFIG, EVERYTHING, PROBLEM, WATCHED, Watched, inputs_of
from executors import grouped_nf4, nf4
from executors._base import operator as _operator
from executors._base.operator import Operator
from executors._pipeline.operator import PipelineOperator
from executors._pipeline.sliced import SlicedProducts
from moe_ref.conformance.judgement.call import Inputs
from moe_ref.conformance.problems.problem import Problem

PACKED = replace(PROBLEM, quant_type="nf4", blocksize=32)
PACKED_EVERYTHING = replace(
    EVERYTHING, quant_type="nf4", blocksize=32, nested="per expert", weights_layout="transposed"
)
STRADDLING = replace(EVERYTHING, quant_type="fp4", nested="one", hidden=7, intermediate=5)
MXFP4 = replace(PACKED_EVERYTHING, quant_type="mxfp4", nested="", hidden=64, intermediate=32)
LARGE = Problem(64, 32, 32, 32, replace(CONFIG, top_k=4), "bfloat16")  # all experts are used; the widths are others


def large_inputs() -> Inputs:
    """A layer of 32 experts with 1.8 M numbers each: 113 MB decoded."""
    inputs = inputs_of(LARGE)
    width, drawn = 768, torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=drawn, dtype=torch.bfloat16)

    dense = {"gate_up_proj": normal(32, 2 * width, width), "down_proj": normal(32, width, width)}
    weights = nf4.quantize(inputs.weights.with_parameters(dense), nested=True)
    return replace(inputs, x=normal(64, width).requires_grad_(), dy=normal(64, width), weights=weights)


SLICED = _operator.define(PipelineOperator("sliced_probe", SlicedProducts, on_host=False))
WATCHED["sliced_probe"] = SLICED


@dataclass(frozen=True)
class Sliced(grouped_nf4.GroupedNF4):
    """grouped_nf4 as it is on a GPU, on whatever device."""

    name: ClassVar[str] = "sliced"
    operator: ClassVar[Operator] = SLICED


WAYS = {"loop": grouped_nf4.GroupedNF4, "slices": Sliced}


class LivePeak(Watched):
    """The most bytes that were alive at once, of all that operators made; views of what was given do not count."""

    def __init__(self, given: Inputs) -> None:
        super().__init__()
        arrays = (*given.tensors().values(), *given.codes().values(), given.topk_ids, given.dy)
        self.given = {array.untyped_storage().data_ptr() for array in arrays}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def saw(self, name: str, out: object) -> None:
        for value in out if isinstance(out, tuple | list) else [out]:
            if hasattr(value, "untyped_storage") and value.untyped_storage().data_ptr() not in self.given:
                storage = value.untyped_storage()
                self.alive[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {place: kept for place, kept in self.alive.items() if not kept[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))

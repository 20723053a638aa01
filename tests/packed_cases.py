"""Problems for grouped_nf4, and its way for GPUs made to run on a CPU."""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch.multiprocessing.reductions import StorageWeakRef

from dense_cases import CONFIG, EVERYTHING, PROBLEM, Watched
from executors import _operator, grouped_nf4
from executors._operator import Operator
from executors._sliced import SlicedProducts
from moe_ref.conformance.problem import Problem

PACKED = replace(PROBLEM, quant_type="nf4", blocksize=32)
PACKED_EVERYTHING = replace(
    EVERYTHING, quant_type="nf4", blocksize=32, nested="per expert", weights_layout="transposed"
)
STRADDLING = replace(EVERYTHING, quant_type="fp4", nested="one", hidden=7, intermediate=5)
LARGE = Problem(16, 32, 128, 128, replace(CONFIG, top_k=4), quant_type="nf4", nested="one")  # most experts are used

SLICED = _operator.define(_operator.Multiplication("sliced_probe", SlicedProducts, on_host=False))


@dataclass(frozen=True)
class Sliced(grouped_nf4.GroupedNF4):
    """grouped_nf4 as it is on a GPU, on whatever device."""

    name: ClassVar[str] = "sliced"
    operator: ClassVar[Operator] = SLICED


WAYS = {"loop": grouped_nf4.GroupedNF4, "slices": Sliced}


class LivePeak(Watched):
    """The most bytes that were alive at once, of all that operators made."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def saw(self, name: str, out: object) -> None:
        for value in out if isinstance(out, tuple | list) else [out]:
            if hasattr(value, "untyped_storage"):
                storage = value.untyped_storage()
                self.alive[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {place: kept for place, kept in self.alive.items() if not kept[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))

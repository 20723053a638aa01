"""``numba``: products that Numba compiles for the processor at hand; those of many rows as in ``native``. CPUs only.

An expert's matrix is read once, in its own 16 bits, and widened in registers, or decoded there from 4 bits; all experts
with few rows are one call. So it is for generating text, for processors without matrix instructions of 16 bits, and for
4 bits. Kernels are compiled at their first call on a machine, which takes seconds, and kept on disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from executors._base.executor import kind_of
from executors._base.operator import Operator, define
from executors._numba.products import NumbaProducts, few_rows_of
from executors._pipeline.cpu_product import note
from executors._pipeline.executor import PipelineExecutor
from executors._pipeline.operator import PipelineOperator
from executors._protocol import Capabilities
from moe_ref.types import PROJECTIONS

if TYPE_CHECKING:
    from torch import Tensor

    from moe_ref.types import MoEWeights

OPERATOR = define(PipelineOperator("numba", NumbaProducts, on_host=True))


@dataclass(frozen=True)
class Numba(PipelineExecutor):
    """The executor ``numba``. Its option is ``recompute``: keep no z for backward.

    Example:
        >>> y = executors.get("numba")(x, router_logits, weights)
    """

    name: ClassVar[str] = "numba"
    operator: ClassVar[Operator] = OPERATOR
    capabilities: ClassVar[Capabilities] = Capabilities(
        devices=frozenset({"cpu"}),
        dtypes=frozenset({"float32", "bfloat16", "float16"}),
        post_expert_norm=True,
        weights=frozenset({"dense", "nf4", "fp4", "mxfp4"}),
        mixed=True,
    )

    def note(self, x: Tensor, weights: MoEWeights) -> str:
        """Up to how many rows of an expert its products are compiled here, and what others take."""
        if x.device.type != "cpu":
            return ""
        up, down = (few_rows_of(x.dtype, kind_of(getattr(weights, name))) for name in PROJECTIONS)
        rows = f"{up} rows of an expert" if up == down else f"{up} (gate_up_proj) and {down} rows (down_proj)"
        return "; ".join(filter(None, [f"products of up to {rows} are compiled", note(x)]))

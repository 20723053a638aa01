"""``numba``: products of a few rows, compiled by Numba for the processor at hand; others as in ``native``. CPUs only.

An expert's matrix is read once, in its own 16 bits, and widened in registers; all experts with few rows are one call.
So it is for generating text, and for processors without matrix instructions of 16 bits. In 4 bits an expert is decoded
when its turn comes. Kernels are compiled at their first call on a machine, which takes seconds, and kept on disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from executors._executor import OperatorExecutor
from executors._multiplication import Multiplication
from executors._numba.products import NumbaProducts
from executors._operator import Operator, define
from executors._protocol import Capabilities

OPERATOR = define(Multiplication("numba", NumbaProducts, on_host=True))


@dataclass(frozen=True)
class Numba(OperatorExecutor):
    """The executor ``numba``. Its option is ``recompute``: keep no z for backward.

    Example:
        >>> y = executors.get("numba")(x, router_logits, weights)
    """

    name: ClassVar[str] = "numba"
    operator: ClassVar[Operator] = OPERATOR
    capabilities: ClassVar[Capabilities] = Capabilities(
        devices=frozenset({"cpu"}),
        dtypes=frozenset({"float32", "bfloat16", "float16"}),
        weights=frozenset({"dense", "nf4", "fp4", "mxfp4"}),
    )

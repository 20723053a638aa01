"""``grouped_mm``: one call of ``torch.nn.functional.grouped_mm`` for all experts. CPU and CUDA; bf16, fp16, fp32.

torch's operator wants strides of whole 16 bytes, leaves rows past the last group unwritten, may write something for
empty groups, and has no bias: all of that is mended here. It needs the host for everything but bf16 on compute
capability 9.0 and 10.0, where this executor never waits for the GPU and can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from executors._base.operator import Operator, define
from executors._pipeline.executor import PipelineExecutor
from executors._pipeline.grouped import GroupedProducts, check_capture, host_note
from executors._pipeline.operator import PipelineOperator
from executors._protocol import Capabilities

if TYPE_CHECKING:
    from torch import Tensor

    from moe_ref.types import MoEWeights

OPERATOR = define(PipelineOperator("grouped_mm", GroupedProducts, on_host=False))


@dataclass(frozen=True)
class GroupedMM(PipelineExecutor):
    """The executor ``grouped_mm``. Its option is ``recompute``: keep no z for backward.

    Example:
        >>> y = executors.get("grouped_mm")(x, router_logits, weights)
    """

    name: ClassVar[str] = "grouped_mm"
    operator: ClassVar[Operator] = OPERATOR
    capabilities: ClassVar[Capabilities] = Capabilities(
        devices=frozenset({"cpu", "cuda"}),
        dtypes=frozenset({"float32", "bfloat16", "float16"}),
        post_expert_norm=True,
    )

    def check(self, x: Tensor, weights: MoEWeights) -> None:
        """Raises Unsupported for other devices and dtypes than it has, and where it would break a capture."""
        super().check(x, weights)
        check_capture(x, weights)

    def note(self, x: Tensor, weights: MoEWeights) -> str:
        """What a user should know of a call that works: which products it takes, and what waits for the GPU."""
        return host_note(x, weights) or super().note(x, weights)

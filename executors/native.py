"""``native``: plain torch, one product per expert that has tokens. Any device, any dtype of T1.

One stable sort, one host synchronisation per forward (the group offsets), none in backward; no atomics, so bitwise
repeatable. For backward it keeps z, [S, J], and nothing else that grows with S*H; with ``recompute`` not even that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from executors._base.operator import Operator, define
from executors._pipeline.executor import PipelineExecutor
from executors._pipeline.loop import LoopProducts
from executors._pipeline.operator import PipelineOperator

OPERATOR = define(PipelineOperator("native", LoopProducts, on_host=True))


@dataclass(frozen=True)
class Native(PipelineExecutor):
    """The executor ``native``. Its option is ``recompute``: keep no z for backward.

    Example:
        >>> y = executors.get("native")(x, router_logits, weights)
    """

    name: ClassVar[str] = "native"
    operator: ClassVar[Operator] = OPERATOR

"""``triton``: routing, grouping, both products and the sum over slots in Triton kernels. bf16, fp16, fp32.

Nothing waits for the GPU and no shape depends on data, so forward and backward can be captured in a CUDA graph. Sums
are in fp32, in a fixed order, without atomics: results repeat bit for bit. The up projection gathers rows as it reads
them; biases, activation and weights are applied before results are written. Backward keeps z, [S, J], beside inputs and
parameters; with ``recompute`` it keeps nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, ClassVar

import torch

from executors._base import transforms
from executors._base.executor import LayerExecutor
from executors._base.operator import Operator, apply
from executors._base.routing import scaled_by_expert, weigh
from executors._decode.paths import mean_rows
from executors._protocol import Capabilities, Unavailable
from executors._triton import operator
from executors._triton.decode_rule import FUSED
from executors._triton.device import INTERPRETED, takes_cpu
from executors._triton.launch.grouping import check_slots
from executors._triton.launch.routing import route
from executors._triton.tuned import table as tuned_entries

if TYPE_CHECKING:
    from torch import Tensor

    from moe_ref.types import MoEWeights, Routing


@dataclass(frozen=True)
class Triton(LayerExecutor):
    """The executor ``triton``.

    Attributes:
        recompute: keep no z; the backward pass computes it again. Slower, with the same gradients bit for bit (D4).
        batch_invariant: one configuration of the kernels serves any number of rows. So a token's output never depends
            on other tokens, bit for bit (C2). Slower for few rows per expert.
        tuned: take tiles that ``python -m executors tune`` chose on this machine, where there are some for such a
            layer and load. The last bits differ. The file is read once per process.

    Raises:
        TypeError: an option is neither True nor False.
        ValueError: both batch_invariant and tuned, which follows the number of rows.
        Unavailable: there is no GPU, and Triton's interpreter is off. A call raises it on compute capability 9.0 with
            Triton before 3.7.1, whose compiler leaves out a fence there.

    Example:
        >>> y = executors.get("triton")(x, router_logits, weights)
    """

    recompute: bool = False
    batch_invariant: bool = False
    tuned: bool = False

    name: ClassVar[str] = "triton"

    def __post_init__(self) -> None:
        for option in ("recompute", "batch_invariant", "tuned"):
            value = getattr(self, option)
            if not isinstance(value, bool):
                raise TypeError(f"{option}={value!r}: must be True or False")
        if self.tuned and self.batch_invariant:
            raise ValueError("tuned=True: must be False with batch_invariant=True, which takes one configuration only")
        if not takes_cpu() and not torch.cuda.is_available():
            raise Unavailable(
                "executor 'triton' needs a GPU; TRITON_INTERPRET=1 checks its numbers without one, slowly"
            )
        if self.tuned:
            tuned_entries()  # warns here if something is wrong with the file

    @property
    def capabilities(self) -> Capabilities:
        """What the executor can take; a CPU only under the interpreter."""
        return DECLARED[takes_cpu(), self.batch_invariant]

    def check(self, x: Tensor, weights: MoEWeights) -> None:
        """Raises Unsupported for what this executor cannot take."""
        super().check(x, weights)
        check_slots(x.numel() // x.shape[-1] * (weights.config.top_k or 1), self.name)

    def note(self, x: Tensor, weights: MoEWeights) -> str:
        """What a user should know of a call that works: that it is interpreted, and where 4 bits are decoded."""
        if weights.packed():
            return operator.path_note(x, mean_rows(x, weights), FUSED if self.batch_invariant else "")
        return "interpreted on the CPU (TRITON_INTERPRET=1): slow, for numbers only" if INTERPRETED else ""

    def _route(self, router_logits: Tensor, weights: MoEWeights) -> Routing:
        if transforms.are_active():  # which differentiate no kernel: it chooses, and torch weighs
            ids = route(router_logits.detach(), weights).topk_ids
            return weigh(router_logits, ids.long(), weights)
        return scaled_by_expert(route(router_logits, weights), weights.expert_scale)

    def _apply(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, weights: MoEWeights) -> Tensor:
        check_slots(topk_ids.numel(), self.name)
        return apply(self._own_operator, x, topk_ids, topk_weights, weights, keep_z=not self.recompute)

    @property
    def _own_operator(self) -> Operator:
        if self.tuned:
            return operator.TUNED
        return operator.BATCH_INVARIANT if self.batch_invariant else operator.OPERATOR


def _declared(interpreted: bool, batch_invariant: bool) -> Capabilities:
    return Capabilities(
        devices=frozenset({"cpu", "cuda"} if interpreted else {"cuda"}),
        dtypes=frozenset({"float32", "bfloat16", "float16"}),
        weights=frozenset({"dense", "nf4", "fp4", "mxfp4"}),
        mixed=True,
        batch_invariant=batch_invariant,
        interpreted=interpreted,
    )


# Made once, because every call asks; a table, because torch.compile traces no cache.
DECLARED = {own: _declared(*own) for own in product((False, True), repeat=2)}

"""liger-kernel's fused MoE in Triton: on a GPU, or interpreted on a CPU with TRITON_INTERPRET=1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import triton
from liger_kernel.ops import LigerFusedMoEFunction

from executors import Capabilities, Unavailable
from moe_ref_peers._peer import Peer, plain_swiglu

if TYPE_CHECKING:
    from torch import Tensor

    from moe_ref.types import MoEWeights

INTERPRETED = bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Liger(Peer):
    """``liger``: gate and up rows one after the other, SwiGLU, no biases.

    Raises:
        Unavailable: there is no GPU, and Triton's interpreter is off.
    """

    name: ClassVar[str] = "liger"

    def __post_init__(self) -> None:
        if not INTERPRETED and not torch.cuda.is_available():
            raise Unavailable("executor 'liger' needs a GPU; TRITON_INTERPRET=1 checks its numbers without one")

    @property
    def capabilities(self) -> Capabilities:
        """Triton's interpreter has no atomic addition in bf16, which the backward pass needs."""
        return plain_swiglu(
            devices=frozenset({"cpu"} if INTERPRETED else {"cuda"}),
            dtypes=frozenset({"float32", "float16"} | (set() if INTERPRETED else {"bfloat16"})),
            empty_slots=False,
            strided=frozenset({"x", "routing", "weights"}),  # it copies what is not contiguous
            interpreted=INTERPRETED,
        )

    def compute(self, x: Tensor, ids: Tensor, weights: Tensor, layer: MoEWeights) -> Tensor:
        """y [T, H]."""
        y: Tensor = LigerFusedMoEFunction.apply(x, layer.gate_up_proj, layer.down_proj, ids.int(), weights)
        return y

"""A 4-bit stack by bitsandbytes.nn.parametrize, under transformers' eager experts of Qwen3: how users have it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn.parametrize import replace_parameter_4bit_prequantized

from executors import Capabilities
from executors.nf4.codes import code_table
from moe_ref_peers._peer import Peer, foreign_last, plain_swiglu
from moe_ref_peers.transformers_experts import DTYPES, GATED, built

if TYPE_CHECKING:
    from torch import Tensor

    from moe_ref.types import MoEWeights


@dataclass(frozen=True)
class Parametrized(Peer):
    """``bitsandbytes``: every access decodes the whole stack."""

    name: ClassVar[str] = "bitsandbytes"

    @property
    def capabilities(self) -> Capabilities:
        """nf4 and fp4, of which both projections are."""
        return plain_swiglu(
            dtypes=DTYPES,
            activations=frozenset(GATED),
            weights=frozenset({"nf4", "fp4"}),
            nested=frozenset({"one"}),
            empty_batch=False,  # of transformers' eager experts
        )

    def compute(self, x: Tensor, ids: Tensor, weights: Tensor, layer: MoEWeights) -> Tensor:
        """y [T, H]."""
        module = built("qwen3", layer, "eager")
        for name, packed in layer.packed().items():
            stored = packed.codes.reshape(-1, 1)
            setattr(module, name, torch.nn.Parameter(stored, requires_grad=False))
            replace_parameter_4bit_prequantized(module, name, _state(packed).as_dict(packed=True), x.device)
        y: Tensor = module(x, *foreign_last(ids, weights, layer.num_experts))
        return y


def _state(packed: Any) -> Any:
    """What bitsandbytes keeps beside an NF4Tensor's bytes."""
    state: Any = QuantState
    nested = None
    if packed.nested_absmax is not None:
        nested = state(
            packed.nested_absmax, code=packed.nested_code, blocksize=packed.nested_blocksize, dtype=torch.float32
        )
    return state(
        packed.absmax,
        shape=torch.Size(packed.stored_shape),
        code=code_table(packed.quant_type, packed.packed.device),
        blocksize=packed.blocksize,
        quant_type=packed.quant_type,
        dtype=getattr(torch, packed.dtype),
        offset=packed.nested_offset,
        state2=nested,
    )

"""A 4-bit stack by bitsandbytes.nn.parametrize, under transformers' eager experts of Qwen3: how users have it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn.parametrize import replace_parameter_4bit_prequantized
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from executors import Capabilities
from executors.nf4.codes import code_table
from moe_ref_peers._peer import Peer, foreign_last, plain_swiglu
from moe_ref_peers.transformers_experts import DTYPES, GATED

if TYPE_CHECKING:
    from torch import Tensor

    from moe_ref.types import MoEWeights, NF4Tensor


@dataclass(frozen=True)
class Parametrized(Peer):
    """``bitsandbytes``: every access decodes the whole stack."""

    name: ClassVar[str] = "bitsandbytes"

    @property
    def capabilities(self) -> Capabilities:
        """nf4 and fp4, of which both projections are."""
        kinds = frozenset({"nf4", "fp4"})
        return plain_swiglu(dtypes=DTYPES, activations=frozenset(GATED), weights=kinds, nested=frozenset({"one"}))

    def compute(self, x: Tensor, ids: Tensor, weights: Tensor, layer: MoEWeights) -> Tensor:
        """y [T, H]."""
        sizes = {"hidden_size": layer.down_proj.shape[1], "moe_intermediate_size": layer.down_proj.shape[2]}
        config = Qwen3MoeConfig(
            num_experts=layer.num_experts, hidden_act=GATED[layer.config.activation], num_experts_per_tok=1, **sizes
        )
        config._experts_implementation = "eager"
        with torch.device("meta"):
            module = Qwen3MoeExperts(config)
        for name, packed in layer.packed().items():
            stored: Any = packed.packed.view(torch.uint8).reshape(-1, 1)
            setattr(module, name, torch.nn.Parameter(stored, requires_grad=False))
            replace_parameter_4bit_prequantized(module, name, _state(packed).as_dict(packed=True), x.device)
        return module(x, *foreign_last(ids, weights, layer.num_experts))


def _state(packed: NF4Tensor) -> QuantState:
    """What bitsandbytes keeps beside the bytes."""
    nested = None
    if packed.nested_absmax is not None:
        nested = QuantState(
            packed.nested_absmax, code=packed.nested_code, blocksize=packed.nested_blocksize, dtype=torch.float32
        )
    return QuantState(
        packed.absmax,
        shape=torch.Size(packed.stored_shape),
        code=code_table(packed.quant_type, packed.packed.device),
        blocksize=packed.blocksize,
        quant_type=packed.quant_type,
        dtype=getattr(torch, packed.dtype),
        offset=packed.nested_offset,
        state2=nested,
    )

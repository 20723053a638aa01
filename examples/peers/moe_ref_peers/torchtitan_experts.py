"""torchtitan's routed experts: dispatch, grouped products and combine of its MoE, in its common and gpt-oss forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torchtitan.models.common.moe import GroupedExperts, RoutedExperts
from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher
from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts

from executors import Capabilities
from moe_ref_peers._peer import ROWS_OF_16_BYTES, Peer, biases_of, gpt_oss, plain_swiglu

if TYPE_CHECKING:
    from torch import Tensor

    from moe_ref.types import MoEWeights


@dataclass(frozen=True)
class Titan(Peer):
    """``torchtitan``: its products are in bf16 whatever the model's dtype, so bf16 is all that is judged."""

    name: ClassVar[str] = "torchtitan"

    @property
    def capabilities(self) -> Capabilities:
        """One dtype, and SwiGLU."""
        return plain_swiglu(dtypes=frozenset({"bfloat16"}), empty_slots=False, **ROWS_OF_16_BYTES)

    def compute(self, x: Tensor, ids: Tensor, weights: Tensor, layer: MoEWeights) -> Tensor:
        """y [T, H]."""
        experts, hidden, inner = layer.down_proj.shape
        dispatcher = LocalTokenDispatcher.Config(num_experts=experts, top_k=ids.shape[1])
        form = self._form(layer)(dim=hidden, hidden_dim=inner, num_experts=experts)
        with torch.device("meta"):
            module = RoutedExperts(RoutedExperts.Config(inner_experts=form, token_dispatcher=dispatcher))
        for name, tensor in self._parameters(layer).items():
            delattr(module.inner_experts, name)
            setattr(module.inner_experts, name, tensor)
        counts = torch.bincount(ids.reshape(-1), minlength=experts)
        return module(x[None], weights[None], ids[None], counts)[0]

    def _form(self, layer: MoEWeights) -> type[GroupedExperts.Config]:
        return GroupedExperts.Config

    def _parameters(self, layer: MoEWeights) -> dict[str, Tensor]:
        gate, up = layer.gate_up_proj.chunk(2, dim=1)
        return {"w1_EFD": gate, "w2_EDF": layer.down_proj, "w3_EFD": up}


@dataclass(frozen=True)
class GptOssTitan(Titan):
    """``torchtitan_gpt_oss``: with biases, a limit, and rows of gate and up by turns."""

    name: ClassVar[str] = "torchtitan_gpt_oss"

    @property
    def capabilities(self) -> Capabilities:
        """One dtype, and gpt-oss' form."""
        return gpt_oss(dtypes=frozenset({"bfloat16"}), empty_slots=False, **ROWS_OF_16_BYTES)

    def _form(self, layer: MoEWeights) -> type[GroupedExperts.Config]:
        return GptOssGroupedExperts.Config

    def _parameters(self, layer: MoEWeights) -> dict[str, Tensor]:
        biases = biases_of(layer)
        return {
            "mlp1_weight_EGD": layer.gate_up_proj,
            "mlp1_bias_EG": biases["gate_up_proj_bias"],
            "mlp2_weight_EDF": layer.down_proj,
            "mlp2_bias_ED": biases["down_proj_bias"],
        }

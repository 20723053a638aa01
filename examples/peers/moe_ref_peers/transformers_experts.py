"""The experts of three families of transformers, each in its three implementations that run on a CPU.

A module of the family is built for each call, on no device, and gets the layer's tensors as its parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import GptOssConfig, NemotronHConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from executors import Capabilities
from moe_ref_peers._peer import ROWS_OF_16_BYTES, Peer, biases_of, foreign_last, gpt_oss, plain_swiglu

if TYPE_CHECKING:
    from torch import Tensor

    from moe_ref.types import MoEWeights

Family = Literal["qwen3", "gpt_oss", "nemotron_h"]
Implementation = Literal["eager", "grouped_mm", "batched_mm"]
GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_pytorch_tanh"}
PLAIN = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu2": "relu2"}
ACTIVATIONS: dict[Family, dict[str, str]] = {"qwen3": GATED, "gpt_oss": {"swiglu": "silu"}, "nemotron_h": PLAIN}
CLASSES: dict[Family, tuple[Any, Any]] = {
    "qwen3": (Qwen3MoeExperts, Qwen3MoeConfig),
    "gpt_oss": (GptOssExperts, GptOssConfig),
    "nemotron_h": (NemotronHExperts, NemotronHConfig),
}
DTYPES = frozenset({"float32", "bfloat16", "float16"})


@dataclass(frozen=True)
class TransformersExperts(Peer):
    """Experts of a family, in an implementation of transformers' experts interface."""

    family: Family
    implementation: Implementation

    @property
    def name(self) -> str:  # type: ignore[override]
        """The name under which it is registered."""
        return f"transformers_{self.family}_{self.implementation}"

    @property
    def capabilities(self) -> Capabilities:
        """The interface's promises. No tokens break the graph under eager: that would hide all else that fails."""
        changes: dict[str, Any] = {"dtypes": DTYPES, "empty_batch": self.implementation != "eager"}
        if self.implementation == "grouped_mm":
            changes |= ROWS_OF_16_BYTES
        if self.family == "gpt_oss":  # whose parameters are stored [E, H, 2I] and [E, I, H]
            return gpt_oss(strided=frozenset({"weights"}), **changes)
        return plain_swiglu(activations=frozenset(ACTIVATIONS[self.family]), **changes)

    def compute(self, x: Tensor, ids: Tensor, weights: Tensor, layer: MoEWeights) -> Tensor:
        """y [T, H]."""
        module = built(self.family, layer, self.implementation)
        module._is_expert_parallel = True  # whoever runs on one rank loses nothing by it
        for name, tensor in parameters(self.family, layer).items():
            delattr(module, name)
            setattr(module, name, tensor)
        y: Tensor = module(x, *foreign_last(ids, weights, layer.num_experts))
        return y


def parameters(family: Family, layer: MoEWeights) -> dict[str, Tensor]:
    """The layer's tensors under the family's names, in its shapes; no copies of what lies as the family stores it."""
    if family == "nemotron_h":
        return {"up_proj": layer.gate_up_proj, "down_proj": layer.down_proj}
    if family == "qwen3":
        return {"gate_up_proj": layer.gate_up_proj, "down_proj": layer.down_proj}
    turned = {name: getattr(layer, name).transpose(1, 2).contiguous() for name in ("gate_up_proj", "down_proj")}
    return turned | {name: bias.contiguous() for name, bias in biases_of(layer).items()}


def built(family: Family, layer: MoEWeights, implementation: Implementation) -> Any:
    """The family's experts for a layer, on no device."""
    experts, hidden, inner = layer.down_proj.shape
    act = ACTIVATIONS[family][layer.config.activation]
    sizes: dict[Family, dict[str, Any]] = {
        "qwen3": {"num_experts": experts, "moe_intermediate_size": inner, "hidden_act": act},
        "nemotron_h": {"n_routed_experts": experts, "moe_intermediate_size": inner, "mlp_hidden_act": act},
        "gpt_oss": {
            **{"num_local_experts": experts, "intermediate_size": inner},
            **{"swiglu_alpha": layer.config.alpha, "swiglu_limit": layer.config.limit},
        },
    }
    kind, config_kind = CLASSES[family]
    config = config_kind(hidden_size=hidden, num_experts_per_tok=1, **sizes[family])
    config._experts_implementation = implementation
    with torch.device("meta"):
        return kind(config)


qwen3_eager = partial(TransformersExperts, "qwen3", "eager")
qwen3_grouped_mm = partial(TransformersExperts, "qwen3", "grouped_mm")
qwen3_batched_mm = partial(TransformersExperts, "qwen3", "batched_mm")
gpt_oss_eager = partial(TransformersExperts, "gpt_oss", "eager")
gpt_oss_grouped_mm = partial(TransformersExperts, "gpt_oss", "grouped_mm")
gpt_oss_batched_mm = partial(TransformersExperts, "gpt_oss", "batched_mm")
nemotron_h_eager = partial(TransformersExperts, "nemotron_h", "eager")
nemotron_h_grouped_mm = partial(TransformersExperts, "nemotron_h", "grouped_mm")
nemotron_h_batched_mm = partial(TransformersExperts, "nemotron_h", "batched_mm")

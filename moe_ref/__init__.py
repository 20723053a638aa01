"""moe-ref: the exact specification of a Mixture-of-Experts layer, as pure functions of arrays."""

from moe_ref.layer import moe, moe_vjp, routed_experts, routed_experts_vjp
from moe_ref.routing import route
from moe_ref.types import (
    ExpertLoRA,
    Grouping,
    MoEConfig,
    MoEGradients,
    MoEWeights,
    MXFP4Tensor,
    NF4Tensor,
    Routing,
)

__all__ = [
    "ExpertLoRA",
    "Grouping",
    "MXFP4Tensor",
    "MoEConfig",
    "MoEGradients",
    "MoEWeights",
    "NF4Tensor",
    "Routing",
    "moe",
    "moe_vjp",
    "route",
    "routed_experts",
    "routed_experts_vjp",
]

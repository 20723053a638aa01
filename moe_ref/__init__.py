"""moe-ref: the exact specification of a Mixture-of-Experts layer, as pure functions of arrays."""

from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    __version__: str
else:

    def __getattr__(name: str) -> str:
        """``__version__``, that of the installed distribution, or "unknown" where there is none."""
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("moe-ref")
        except PackageNotFoundError:
            return "unknown"

"""``auto``: the first executor in a fixed order that can take the call.

The choice is a pure function of device, dtypes, kind of weights and configuration, never of timing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from executors._protocol import Capabilities, Executor, Unavailable, Unsupported
from executors._registry import get

if TYPE_CHECKING:
    from torch import Tensor

    from moe_ref.types import MoEWeights, Routing

PREFERENCE = ("native",)


@dataclass(frozen=True)
class Auto:
    """Chooses among the built-in executors, in the order of `PREFERENCE`. It has no options."""

    name: ClassVar[str] = "auto"
    capabilities: ClassVar[Capabilities] = Capabilities()

    def choose(self, x: Tensor, weights: MoEWeights) -> tuple[str, str]:
        """The name of the executor that a call would use, and why.

        Args:
            x: [..., H] hidden states.
            weights: the layer's parameters.

        Raises:
            Unsupported: none can take this input; the message has each one's reason.
        """
        executor, why = self._choose(x, weights)
        return executor.name, why

    def __call__(self, x: Tensor, router_logits: Tensor, weights: MoEWeights) -> Tensor:
        """The layer, by the chosen executor; arguments and errors are that executor's."""
        return self._choose(x, weights)[0](x, router_logits, weights)

    def experts(self, x: Tensor, *, topk_ids: Tensor, topk_weights: Tensor, weights: MoEWeights) -> Tensor:
        """The layer with routing done elsewhere; arguments and errors are the chosen executor's."""
        chosen = self._choose(x, weights)[0]
        return chosen.experts(x, topk_ids=topk_ids, topk_weights=topk_weights, weights=weights)

    def route(self, router_logits: Tensor, weights: MoEWeights) -> Routing:
        """The choice of experts that ``__call__`` makes: that of the executor chosen for these weights."""
        from executors._routing import route_checked

        return route_checked(router_logits, weights)

    def check(self, x: Tensor, weights: MoEWeights) -> None:
        """Raises Unsupported if no executor can take this input."""
        self._choose(x, weights)

    def _choose(self, x: Tensor, weights: MoEWeights) -> tuple[Executor, str]:
        reasons: list[str] = []
        for name in PREFERENCE:
            try:
                executor = get(name)
                executor.check(x, weights)
            except (Unavailable, Unsupported) as error:
                reasons.append(str(error))
                continue
            passed_over = f" ({'; '.join(reasons)})" if reasons else ""
            return executor, f"first usable of {', '.join(PREFERENCE)}{passed_over}"
        raise Unsupported(f"no executor can take this input: {'; '.join(reasons)}")

"""``auto``: the first executor in a fixed order that can take the call.

The choice is a pure function of device, dtypes, kind of weights and configuration, never of timing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from executors._protocol import Capabilities, Executor, Unavailable, Unsupported
from executors._registry import get
from moe_ref.validation import check_experts_inputs, check_inputs

if TYPE_CHECKING:
    from torch import Tensor

    from moe_ref.types import MoEWeights, Routing

PREFERENCE = ("native", "grouped_mm", "grouped_nf4")


class Auto:
    """Chooses among the built-in executors, in the order of `PREFERENCE`. It has no options.

    What this machine lacks is settled when ``auto`` is made; what an input rules out, at each call.

    Raises:
        Unavailable: none of them can be had on this machine; the message has each one's reason.
    """

    name: ClassVar[str] = "auto"
    capabilities: ClassVar[Capabilities] = Capabilities(
        post_expert_norm=True, weights=frozenset({"dense", "nf4", "fp4", "mxfp4"}), mixed=True
    )

    def __init__(self) -> None:
        candidates: list[Executor] = []
        reasons: list[str] = []
        for name in PREFERENCE:
            try:
                candidates.append(get(name))
            except Unavailable as error:
                reasons.append(str(error))
        if not candidates:
            raise Unavailable(f"executor 'auto' has none to choose from: {'; '.join(reasons)}")
        self._candidates = tuple(candidates)
        self._unavailable = tuple(reasons)

    def choose(self, x: Tensor, weights: MoEWeights) -> tuple[str, str]:
        """The name of the executor that a call would use, and why.

        Args:
            x: [..., H] hidden states.
            weights: the layer's parameters.

        Raises:
            Unsupported: none can take this input; the message has each one's reason.
        """
        executor, passed_over = self._choose(x, weights)
        reasons = f" ({'; '.join(passed_over)})" if passed_over else ""
        return executor.name, f"first usable of {', '.join(PREFERENCE)}{reasons}"

    def __call__(self, x: Tensor, router_logits: Tensor, weights: MoEWeights) -> Tensor:
        """The layer, by the chosen executor; arguments, result and errors are that executor's."""
        try:
            chosen = self._choose(x, weights)[0]
        except Unsupported:
            check_inputs(x, router_logits, weights)  # what is wrong for everyone is told as everyone tells it
            raise
        return chosen(x, router_logits, weights)

    def experts(self, x: Tensor, *, topk_ids: Tensor, topk_weights: Tensor, weights: MoEWeights) -> Tensor:
        """The layer with routing done elsewhere; arguments, result and errors are the chosen executor's."""
        try:
            chosen = self._choose(x, weights)[0]
        except Unsupported:
            check_experts_inputs(x, topk_ids, topk_weights, weights)
            raise
        return chosen.experts(x, topk_ids=topk_ids, topk_weights=topk_weights, weights=weights)

    def route(self, router_logits: Tensor, weights: MoEWeights) -> Routing:
        """The choice that ``__call__`` makes; the built-in executors share one.

        Returns:
            Routing with topk_ids [..., K] int64 (T1) and topk_weights [..., K].
        """
        from executors._base.routing import route_checked

        return route_checked(router_logits, weights)

    def check(self, x: Tensor, weights: MoEWeights) -> None:
        """Raises Unsupported if no executor can take this input, with each one's reason."""
        self._choose(x, weights)

    def _choose(self, x: Tensor, weights: MoEWeights) -> tuple[Executor, tuple[str, ...]]:
        reasons = self._unavailable
        for executor in self._candidates:
            try:
                executor.check(x, weights)
            except Unsupported as error:
                reasons = (*reasons, f"{executor.name}: {error}")
                continue
            return executor, reasons
        raise Unsupported(f"no executor can take this input: {'; '.join(reasons)}")

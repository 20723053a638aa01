"""``grouped_nf4``: frozen experts in 4 bits (NF4, FP4, MXFP4), never decoded as a whole.

On a GPU by the Triton kernels, where Triton is installed: with few rows per expert numbers are decoded in the products,
in registers; with many an eighth of the experts at a time, before them. Without Triton in slices of experts by
``grouped_mm``. On a CPU one expert at a time, by bitsandbytes' kernel where that is right. What is in 4 bits is frozen;
x, the routing, biases and adapters are differentiable. One projection may be dense beside the other in 4 bits, and has
its gradient; two dense ones are for ``native`` and ``grouped_mm``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from itertools import product
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import torch

from executors._base.executor import LayerExecutor
from executors._base.operator import Operator, apply, define
from executors._decode.bitsandbytes import slow_note
from executors._decode.paths import Path, mean_rows
from executors._pipeline import cpu_product
from executors._pipeline.grouped import check_capture, host_note
from executors._pipeline.loop import LoopProducts
from executors._pipeline.operator import PipelineOperator
from executors._pipeline.sliced import SlicedProducts
from executors._protocol import Capabilities, Unavailable

if TYPE_CHECKING:
    from torch import Tensor

    from executors._pipeline.products import Products
    from moe_ref.types import MoEWeights


def products(group_offsets: Tensor) -> Products:
    """A loop on a CPU, where the offsets are at hand; slices elsewhere."""
    return LoopProducts(group_offsets) if group_offsets.device.type == "cpu" else SlicedProducts(group_offsets)


OPERATOR = define(PipelineOperator("grouped_nf4", products, on_host=False))


@dataclass(frozen=True)
class GroupedNF4(LayerExecutor):
    """The executor ``grouped_nf4``.

    Attributes:
        path: "auto" takes the kernels on a GPU where Triton is installed, by a rule of rows per expert that ``explain``
            tells, and torch's operators elsewhere; "fused" and "decoded" take the kernels, and decode in the products
            or before them; "torch" takes torch's operators.
        recompute: decode again in backward, which is the default; False keeps what forward decoded, of experts that
            have tokens, on the path "torch". The kernels keep nothing. Gradients are the same to the last bit (D4).

    Raises:
        TypeError: ``recompute`` is neither True nor False.
        ValueError: ``path`` is none of these.
        Unavailable: the path takes kernels, and Triton is not installed, or there is no GPU and its interpreter is off.

    Example:
        >>> weights = executors.nf4.quantize(weights)
        >>> y = executors.get("grouped_nf4")(x, router_logits, weights)
    """

    path: Path = "auto"
    recompute: bool = True
    _kernels: ModuleType | None = field(init=False, repr=False, compare=False)  # where they may be used

    name: ClassVar[str] = "grouped_nf4"
    operator: ClassVar[Operator] = OPERATOR  # of the path "torch"

    def __post_init__(self) -> None:
        if not isinstance(self.recompute, bool):
            raise TypeError(f"recompute={self.recompute!r}: must be True or False")
        if self.path not in get_args(Path):
            raise ValueError(f"path={self.path!r}: must be one of {', '.join(map(repr, get_args(Path)))}")
        object.__setattr__(self, "_kernels", self._find_kernels())

    def __reduce__(self) -> tuple[Any, ...]:
        """Made anew from its options: modules are neither copied nor pickled."""
        return type(self), (self.path, self.recompute)

    @property
    def capabilities(self) -> Capabilities:
        """What it declares; of kernels a CPU only under the interpreter."""
        forced = self._kernels if self._forced else None
        interpreted = forced is not None and forced.takes_cpu()
        return DECLARED[bool(forced) and not interpreted, not self._forced, interpreted]

    def check(self, x: Tensor, weights: MoEWeights) -> None:
        """Raises Unsupported for two dense projections, other devices and dtypes, and in a capture it would break."""
        super().check(x, weights)
        kernels = self._kernels_for(x, weights)
        if kernels is None:
            check_capture(x, weights)
        else:
            kernels.check_slots(x.numel() // x.shape[-1] * (weights.config.top_k or 1), self.name)

    def note(self, x: Tensor, weights: MoEWeights) -> str:
        """What a user should know of a call that works: which way it decodes, or that it is slow or waits."""
        kernels = self._kernels_for(x, weights)
        if kernels is not None:
            return kernels.path_note(x, mean_rows(x, weights), self._forced)
        return host_note(x, weights) or "; ".join(filter(None, [slow_note(x, weights), cpu_product.note(x)]))

    def _apply(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, weights: MoEWeights) -> Tensor:
        kernels = self._kernels_for(x, weights)
        if kernels is not None:
            kernels.check_slots(topk_ids.numel(), self.name)
            own = kernels.operator_of(self._forced)
            return apply(own, x, topk_ids, topk_weights, weights, keep_z=True)
        return apply(self.operator, x, topk_ids, topk_weights, weights, keep_z=True, keep_decoded=not self.recompute)

    @property
    def _forced(self) -> str:
        """The way of the kernels that was asked for, or ""."""
        return self.path if self.path in ("fused", "decoded") else ""

    def _kernels_for(self, x: Tensor, weights: MoEWeights) -> ModuleType | None:
        """The kernels where a call goes by them: not in a layer with a norm after each expert, which they lack."""
        return self._kernels if self._forced or (x.is_cuda and weights.post_expert_norm is None) else None

    def _find_kernels(self) -> ModuleType | None:
        """The Triton kernels' operators, imported only where they may be used."""
        if self.path == "torch" or not (self._forced or torch.cuda.is_available()):
            return None
        what = f"executor {self.name!r} with path={self.path!r}"
        try:
            kernels = import_module("executors._triton.operator")
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "triton":
                raise
            if not self._forced:
                return None
            raise Unavailable(f'{what} needs triton: pip install "moe-ref[triton]"') from error
        if self._forced and not kernels.takes_cpu() and not torch.cuda.is_available():
            raise Unavailable(f"{what} needs a GPU; TRITON_INTERPRET=1 checks its numbers without one, slowly")
        return kernels


def _declared(cuda_alone: bool, post_expert_norm: bool, interpreted: bool) -> Capabilities:
    return Capabilities(
        devices=frozenset({"cuda"} if cuda_alone else {"cpu", "cuda"}),
        dtypes=frozenset({"float32", "bfloat16", "float16"}),
        post_expert_norm=post_expert_norm,
        weights=frozenset({"nf4", "fp4", "mxfp4"}),
        mixed=True,
        interpreted=interpreted,
    )


# Made once, because every call asks; a table, because torch.compile traces no cache.
DECLARED = {own: _declared(*own) for own in product((False, True), repeat=3)}

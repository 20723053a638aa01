"""Deliberately wrong executors, made by wrapping a right one. The suite must reject every one of them.

A mutant changes what its inner executor is given or returns, so that it applies to any executor. An undetected mutant
is a bug of the suite.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_ref.routing import chosen_scores, route
from moe_ref.types import MoEWeights

if TYPE_CHECKING:
    from executors import Capabilities, Executor

SlotChange = Callable[["Executor", Tensor, Tensor, Tensor, MoEWeights], Tensor]
LayerChange = Callable[["Executor", Tensor, Tensor, MoEWeights], Tensor]

SLOT_MUTANTS: dict[str, SlotChange] = {}
LAYER_MUTANTS: dict[str, LayerChange] = {}


@dataclass(frozen=True)
class Wrapped:
    """An executor made of another one. It routes by the specification and offers no ``route``."""

    name: str
    inner: Executor
    slots: SlotChange | None = None
    layer: LayerChange | None = None

    @property
    def capabilities(self) -> Capabilities:
        """Those of the inner executor."""
        return self.inner.capabilities

    def __call__(self, x: Tensor, router_logits: Tensor, weights: MoEWeights) -> Tensor:
        """The changed layer, on flat tokens."""
        rows, logits = x.reshape(-1, x.shape[-1]), router_logits.reshape(-1, weights.num_experts)
        if self.layer is not None:
            return self.layer(self.inner, rows, logits, weights).reshape(x.shape)
        routing = route(logits, weights.config)
        y = self.experts(
            rows, topk_ids=routing.topk_ids, topk_weights=_narrow(routing.topk_weights, x), weights=weights
        )
        return y.reshape(x.shape)

    def experts(self, x: Tensor, *, topk_ids: Tensor, topk_weights: Tensor, weights: MoEWeights) -> Tensor:
        """The changed layer, routing done elsewhere."""
        top_k = topk_ids.shape[-1]
        rows, ids, slot_weights = (
            x.reshape(-1, x.shape[-1]),
            topk_ids.reshape(-1, top_k),
            topk_weights.reshape(-1, top_k),
        )
        change = self.slots or experts
        return change(self.inner, rows, ids, slot_weights, weights).reshape(x.shape)

    def check(self, x: Tensor, weights: MoEWeights) -> None:
        """As the inner executor's."""
        self.inner.check(x, weights)


def mutants(inner: Executor) -> dict[str, Wrapped]:
    """Every mutant of an executor, by name."""
    slots = {name: Wrapped(name, inner, slots=change) for name, change in SLOT_MUTANTS.items()}
    return slots | {name: Wrapped(name, inner, layer=change) for name, change in LAYER_MUTANTS.items()}


def experts(inner: Executor, x: Tensor, ids: Tensor, topk_weights: Tensor, weights: MoEWeights) -> Tensor:
    """The inner executor, unchanged."""
    return inner.experts(x, topk_ids=ids, topk_weights=topk_weights, weights=weights)


def _narrow(topk_weights: Tensor, x: Tensor) -> Tensor:
    return topk_weights.to(torch.promote_types(x.dtype, torch.float32))


def _slot_mutant(change: SlotChange) -> SlotChange:
    SLOT_MUTANTS[change.__name__] = change
    return change


def _layer_mutant(change: LayerChange) -> LayerChange:
    LAYER_MUTANTS[change.__name__] = change
    return change


def _configured(weights: MoEWeights, **changes: Any) -> MoEWeights:
    return replace(weights, config=replace(weights.config, **changes))


def _column_mask(value: Tensor) -> Tensor:
    """Ones, and a zero in the last place."""
    mask = torch.ones_like(value)
    mask[..., -1:] = 0
    return mask


# Outputs ---------------------------------------------------------------------------------------------------------


@_slot_mutant
def zeros(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Returns zeros."""
    return experts(inner, x, ids, w, weights) * 0


@_slot_mutant
def one_percent_more(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Output times 1.01."""
    return experts(inner, x, ids, w * 1.01, weights)


@_slot_mutant
def token_dropped(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The last token gets zero."""
    mask = torch.ones_like(x[:, :1])
    mask[-1:] = 0
    return experts(inner, x, ids, w, weights) * mask


@_slot_mutant
def row_left_unwritten(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """A token whose slots are all empty keeps whatever the memory held."""
    y = experts(inner, x, ids, w, weights)
    used = ((ids >= 0) & (ids < weights.num_experts)).any(dim=1, keepdim=True)
    return torch.where(used, y, torch.empty_like(x))


@_slot_mutant
def nan_leaks_to_next_token(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """A NaN in one token shows in the next one too."""
    y = experts(inner, x, ids, w, weights)
    return y.masked_fill(y.isnan().any(dim=1, keepdim=True).roll(1, 0), torch.nan)


@_slot_mutant
def output_in_fp32(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The output has another dtype than x."""
    return experts(inner, x, ids, w, weights).to(torch.float32 if x.dtype != torch.float32 else torch.float64)


@_slot_mutant
def not_repeatable(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Differs from run to run in the last bit, as a sum by atomics does."""
    noise = 1 + 2.0**-25 * torch.randn(w.shape, dtype=torch.float64, device=w.device)
    return experts(inner, x, ids, (w * noise).to(w.dtype) if w.dtype != torch.float64 else w * noise, weights)


@_slot_mutant
def input_changed_in_place(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Doubles the first expert's second projection after use (E4)."""
    y = experts(inner, x, ids, w, weights)
    weights.down_proj.data[0].mul_(2)
    return y


@_slot_mutant
def inference_path_wrong(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Right while gradients are recorded, zeros without."""
    y = experts(inner, x, ids, w, weights)
    return y if torch.is_grad_enabled() else torch.zeros_like(y)


# Slots and groups ------------------------------------------------------------------------------------------------


@_slot_mutant
def last_row_of_group_dropped(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The last row of each expert is not computed."""
    flat = ids.reshape(-1).clone()
    for e in range(weights.num_experts):
        flat[(flat == e).nonzero()[-1:]] = -1
    return experts(inner, x, flat.view_as(ids), w, weights)


@_slot_mutant
def inclusive_ends_read_as_offsets(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Each expert works on its neighbour's rows, and the first group is lost."""
    valid = (ids >= 0) & (ids < weights.num_experts)
    return experts(inner, x, torch.where(valid, ids - 1, ids), w, weights)


@_slot_mutant
def wrong_expert_for_one_slot(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """One slot goes to the neighbouring expert."""
    wrong = ids.clone()
    wrong[:1, :1] = (wrong[:1, :1] + 1) % weights.num_experts
    return experts(inner, x, wrong, w, weights)


@_slot_mutant
def slot_weights_swapped(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Two weights of the first token change places."""
    order = torch.arange(w.numel(), device=w.device).view_as(w).clone()
    order[:1] = order[:1].flip(1)
    return experts(inner, x, ids, w.reshape(-1)[order], weights)


@_slot_mutant
def weights_in_bf16(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """topk_weights are rounded to bf16 (R6)."""
    return experts(inner, x, ids, w.to(torch.bfloat16).to(w.dtype), weights)


@_slot_mutant
def empty_slot_counts(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """An empty slot is sent to the nearest expert instead of nowhere (R7)."""
    return experts(inner, x, ids.clamp(0, weights.num_experts - 1), w.nan_to_num(1.0, 1.0), weights)


@_slot_mutant
def ids_read_as_int32(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The upper half of int64 ids is lost, so that 2**32 means expert 0."""
    clean = w.nan_to_num(1.0, 1.0) if ids.dtype == torch.int64 else w
    return experts(inner, x, ids.to(torch.int32), clean, weights)


# Experts ---------------------------------------------------------------------------------------------------------


@_slot_mutant
def hidden_tail_dropped(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The last column of x is masked away in the up projection."""
    return experts(inner, x * _column_mask(x), ids, w, weights)


@_slot_mutant
def intermediate_tail_dropped(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The last column of h is masked away in the down projection."""
    mask = _column_mask(weights.down_proj)
    return experts(inner, x, ids, w, replace(weights, down_proj=weights.down_proj * mask))


@_slot_mutant
def gate_and_up_swapped(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Gate is taken for up and up for gate."""
    both = weights.gate_up_proj.shape[1]
    rows = torch.arange(both).view(-1, 2).flip(1) if _interleaved(weights) else torch.arange(both).view(2, -1).flip(0)
    rows = rows.reshape(-1).to(x.device)
    bias = weights.gate_up_proj_bias
    swapped = replace(
        weights,
        gate_up_proj=weights.gate_up_proj[:, rows],
        gate_up_proj_bias=None if bias is None else bias[:, rows],
    )
    return experts(inner, x, ids, w, swapped)


@_slot_mutant
def layout_mistaken(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Concatenated is read as interleaved, or the other way round."""
    layout = "concatenated" if _interleaved(weights) else "interleaved"
    return experts(inner, x, ids, w, _configured(weights, gate_up_layout=layout))


@_slot_mutant
def gelu_for_silu(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """X sigmoid(1.702 x), which stands for gelu, instead of silu, or silu instead of it."""
    return experts(inner, x, ids, w, _configured(weights, alpha=1.0 if weights.config.alpha != 1.0 else 1.702))


@_slot_mutant
def clamp_forgotten(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """No limit."""
    return experts(inner, x, ids, w, _configured(weights, limit=None))


@_slot_mutant
def up_offset_forgotten(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """No offset on the up half."""
    return experts(inner, x, ids, w, _configured(weights, up_offset=0.0))


@_slot_mutant
def gate_up_bias_twice(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The first bias is added twice."""
    bias = weights.gate_up_proj_bias
    return experts(inner, x, ids, w, replace(weights, gate_up_proj_bias=None if bias is None else 2 * bias))


@_slot_mutant
def bias_of_neighbour(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Each expert adds its neighbour's second bias."""
    bias = weights.down_proj_bias
    return experts(inner, x, ids, w, replace(weights, down_proj_bias=None if bias is None else bias.roll(1, 0)))


@_slot_mutant
def bias_unweighted(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The second bias is added after the routing weight instead of before."""
    return _with_own_down_bias(inner, x, ids, w, weights, torch.ones_like(w))


@_slot_mutant
def bf16_accumulation(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The down projection's partial sums are kept in bf16 (E2)."""
    step = max(1, weights.intermediate_size // 16)
    y: Tensor | None = None
    for start in range(0, weights.intermediate_size, step):
        part = experts(inner, x, ids, w, _some_columns(weights, start, start + step)).to(torch.bfloat16)
        y = part if y is None else y + part
    assert y is not None
    return y.to(x.dtype)


def _some_columns(weights: MoEWeights, start: int, stop: int) -> MoEWeights:
    """The layer cut down to some intermediate columns; the second bias goes with the first cut."""
    inner, both = weights.intermediate_size, weights.gate_up_proj.shape[1]
    rows = torch.arange(both).view(-1, 2) if _interleaved(weights) else torch.arange(both).view(2, -1).t()
    cut = rows[start:stop] if _interleaved(weights) else rows[start:stop].t()
    cut = cut.reshape(-1).to(weights.gate_up_proj.device)
    bias = weights.gate_up_proj_bias
    return replace(
        weights,
        gate_up_proj=weights.gate_up_proj[:, cut],
        gate_up_proj_bias=None if bias is None else bias[:, cut],
        down_proj=weights.down_proj[:, :, start : min(stop, inner)],
        down_proj_bias=weights.down_proj_bias if start == 0 else None,
    )


def _interleaved(weights: MoEWeights) -> bool:
    return weights.config.gate_up_layout == "interleaved"


# Gradients -------------------------------------------------------------------------------------------------------


class _ChangeGradient(torch.autograd.Function):
    """Identity forward; backward sends the gradient through a function."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.change(gradient), None


def _change_gradient(value: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    return _ChangeGradient.apply(value, change)  # type: ignore[no-untyped-call]


@_slot_mutant
def empty_experts_gradient_stale(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The gradient of an expert without tokens is whatever the memory held (D2)."""
    used = torch.zeros(weights.num_experts, dtype=torch.bool, device=x.device)
    used[ids[(ids >= 0) & (ids < weights.num_experts)].long()] = True
    stale = _change_gradient(
        weights.gate_up_proj, lambda g: torch.where(used[:, None, None], g, torch.full_like(g, 1e-4))
    )
    return experts(inner, x, ids, w, replace(weights, gate_up_proj=stale))


@_slot_mutant
def weight_gradient_lacks_one_row(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """The last row of down_proj's gradient is never written."""
    damaged = _change_gradient(weights.down_proj, lambda g: torch.cat([g[:, :-1], torch.empty_like(g[:, -1:])], dim=1))
    return experts(inner, x, ids, w, replace(weights, down_proj=damaged))


@_slot_mutant
def x_gradient_of_first_slot_only(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """Dx leaves out the token's other slots: the last one is overwritten, not added."""
    first = torch.where(torch.arange(ids.shape[1], device=x.device) == 0, ids, torch.full_like(ids, -1))
    rest = torch.where(torch.arange(ids.shape[1], device=x.device) == 0, torch.full_like(ids, -1), ids)
    return experts(inner, x, first, w, weights) + experts(inner, x.detach(), rest, w, weights)


@_slot_mutant
def d3_bias_term_missing(inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights) -> Tensor:
    """D topk_weights forgets <dy, b_d> (D3)."""
    return _with_own_down_bias(inner, x, ids, w, weights, w.detach())


def _with_own_down_bias(
    inner: Executor, x: Tensor, ids: Tensor, w: Tensor, weights: MoEWeights, factor: Tensor
) -> Tensor:
    """The layer without its second bias, plus that bias times ``factor``, added outside."""
    bias = weights.down_proj_bias
    if bias is None:
        return experts(inner, x, ids, w, weights)
    wide = torch.promote_types(x.dtype, torch.float32)
    valid = (ids >= 0) & (ids < weights.num_experts)
    own = torch.where(valid, factor, torch.zeros_like(factor)).to(wide)
    added = torch.einsum("tk,tkh->th", own, bias.to(wide)[torch.where(valid, ids, 0).long()])
    return (experts(inner, x, ids, w, replace(weights, down_proj_bias=None)).to(wide) + added).to(x.dtype)


# Routing ---------------------------------------------------------------------------------------------------------


@_layer_mutant
def not_renormalised(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    """Renormalisation is forgotten."""
    return inner(x, logits, _configured(weights, renormalize=False))


@_layer_mutant
def renormalised_twice(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    """Renormalised once more after the scaling factor, which is lost by that."""
    routing = route(logits, weights.config)
    again = routing.topk_weights / routing.topk_weights.sum(dim=-1, keepdim=True)
    return experts(inner, x, routing.topk_ids, _narrow(again, x), weights)


@_layer_mutant
def renormalisation_without_gradient(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    """The gradient of the logits leaves out the sum that the weights are divided by."""
    config = weights.config
    routing = route(logits, config)
    scores = chosen_scores(logits.double(), routing.topk_ids, config)
    scale = (routing.topk_weights / scores).detach()
    return experts(inner, x, routing.topk_ids, _narrow(scores * scale, x), weights)


@_layer_mutant
def higher_id_wins_ties(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    """Among equal logits the higher id is chosen (R2)."""
    biases = (weights.gate_up_proj_bias, weights.down_proj_bias)
    flipped = MoEWeights(
        weights.gate_up_proj.flip(0),
        weights.down_proj.flip(0),
        *(None if b is None else b.flip(0) for b in biases),
        config=weights.config,
    )
    return inner(x, logits.flip(-1), flipped)


@_layer_mutant
def logits_in_bf16(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    """Logits are rounded to bf16 before the choice (R1)."""
    return inner(x, logits.to(torch.bfloat16).to(logits.dtype), weights)


@_layer_mutant
def choice_in_fp32(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    """Logits in fp64 are rounded to fp32 before the choice (R1)."""
    return inner(x, logits.to(torch.float32), weights)


@_layer_mutant
def softmax_without_maximum(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    """The softmax does not take the largest logit off first, so exp overflows in fp32."""
    config = weights.config
    if config.scoring == "sigmoid":
        return inner(x, logits, weights)
    routing = route(logits, config)
    chosen = logits.float() if config.scoring == "softmax" else logits.float().gather(-1, routing.topk_ids)
    exponentials = chosen.exp()
    scores = exponentials / exponentials.sum(dim=-1, keepdim=True)
    scores = scores.gather(-1, routing.topk_ids) if config.scoring == "softmax" else scores
    if config.renormalize:
        scores = scores / (scores.sum(dim=-1, keepdim=True) + config.renormalize_eps)
    return experts(inner, x, routing.topk_ids, _narrow(scores * config.routed_scaling_factor, x), weights)


@_layer_mutant
def scaling_factor_forgotten(inner: Executor, x: Tensor, logits: Tensor, weights: MoEWeights) -> Tensor:
    """routed_scaling_factor is left out."""
    return inner(x, logits, _configured(weights, routed_scaling_factor=1.0))

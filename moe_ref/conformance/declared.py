"""Refuses what an executor does not declare: for executors that want to say no in one place.

Call these after the checks of `moe_ref.validation`, and before anything is computed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor

from moe_ref.grouping import is_slot
from moe_ref.types import LORA_FACTORS, MoEWeights, NF4Tensor
from moe_ref.validation import dtype_name

if TYPE_CHECKING:
    from executors import Capabilities

BIASES = ("gate_up_proj_bias", "down_proj_bias")


def refuse_undeclared(name: str, able: Capabilities, x: Tensor, weights: MoEWeights) -> None:
    """Raises Unsupported for x and a layer's parameters, as far as they are not declared; reads no numbers.

    Args:
        name: of the executor, for the message.
        able: what it declares.
        x: [..., H].
        weights: the layer, which `moe_ref.validation.check_weights` has checked.

    Raises:
        executors.Unsupported: one line naming the argument, its value, and what is allowed.
    """
    if able.devices and x.device.type not in able.devices:
        _refuse(name, "x.device", x.device, sorted(able.devices))
    if dtype_name(x) not in able.dtypes:
        _refuse(name, "x.dtype", dtype_name(x), sorted(able.dtypes))
    if x.numel() == 0 and not able.empty_batch:
        _refuse(name, "x.shape", tuple(x.shape), ["of at least one token"])
    _refuse_strides(name, able, "x", {"x": x})
    for size, value, unit in (
        ("hidden_size", weights.hidden_size, able.align_hidden),
        ("intermediate_size", weights.intermediate_size, able.align_intermediate),
    ):
        if value % unit:
            _refuse(name, size, value, [f"a multiple of {unit}"])
    _refuse_kinds(name, able, weights)
    _refuse_config(name, able, weights)
    own = weights.parameters()
    for bias in BIASES:
        if bias in own and not able.biases:
            _refuse(name, f"{bias}.shape", tuple(own[bias].shape), [None])
    if weights.post_expert_norm is not None and not able.post_expert_norm:
        _refuse(name, "post_expert_norm.shape", tuple(weights.post_expert_norm.shape), [None])
    if not able.lora and any(factor in LORA_FACTORS for factor in own):
        _refuse(name, "lora", type(weights.lora).__name__, [None])
    of_x = dtype_name(x)
    for names, declared in (((*BIASES, "post_expert_norm"), able.bias_dtypes), (LORA_FACTORS, able.lora_dtypes)):
        _refuse_dtypes(name, of_x, {n: own[n] for n in names if n in own}, declared)
    own.pop("expert_scale", None)  # of routing; ignored where that was done elsewhere
    _refuse_strides(name, able, "weights", own)
    _refuse_strides(name, able, "weights", {}, [n for n, tensor in weights.packed().items() if tensor.transposed])


def refuse_undeclared_slots(
    name: str, able: Capabilities, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, weights: MoEWeights
) -> None:
    """Raises Unsupported for routing that was done elsewhere, as far as it is not declared.

    Where empty slots or duplicate ids are not declared, it reads the ids, and so waits for a GPU.

    Args:
        name: of the executor, for the message.
        able: what it declares.
        x: [..., H].
        topk_ids: [..., K].
        topk_weights: [..., K].
        weights: the layer.

    Raises:
        executors.Unsupported: one line naming the argument, its value, and what is allowed.
    """
    _refuse_dtypes(name, dtype_name(x), {"topk_ids": topk_ids}, able.topk_ids_dtypes)
    _refuse_dtypes(name, dtype_name(x), {"topk_weights": topk_weights}, able.topk_weights_dtypes)
    _refuse_strides(name, able, "routing", {"topk_ids": topk_ids, "topk_weights": topk_weights})
    if not able.empty_slots:
        empty = topk_ids[~is_slot(topk_ids, weights.num_experts)]
        if empty.numel():
            _refuse(name, "topk_ids", f"{int(empty[0])}", [f"in [0, {weights.num_experts})"])
    if not able.duplicate_ids:
        ordered = topk_ids.sort(dim=-1).values
        twice = ordered[..., 1:][
            (ordered[..., 1:] == ordered[..., :-1]) & is_slot(ordered[..., 1:], weights.num_experts)
        ]
        if twice.numel():
            _refuse(name, "topk_ids", f"{int(twice[0])} twice in a row", ["distinct in each row"])


def refuse_undeclared_routing(
    name: str, able: Capabilities, of_x: str, router_logits: Tensor, weights: MoEWeights
) -> None:
    """Raises Unsupported for logits, and for a form of routing, that are not declared.

    Args:
        name: of the executor, for the message.
        able: what it declares.
        of_x: the name of x's dtype.
        router_logits: [..., E].
        weights: the layer.

    Raises:
        executors.Unsupported: one line naming the argument, its value, and what is allowed.
    """
    import executors

    config = weights.config
    if not able.routing:
        raise executors.Unsupported(f"router_logits: must be routed elsewhere; {name} has only .experts()")
    for field, value, allowed in (
        ("scoring", config.scoring, able.scorings),
        ("renormalize_form", config.renormalize_form, able.renormalize_forms),
        ("selection_key", config.selection_key, able.selection_keys),
    ):
        if value not in allowed:
            _refuse(name, field, value, sorted(allowed))
    if config.num_groups > 1 and not able.selection:
        _refuse(name, "num_groups", config.num_groups, [1])
    own = {n: getattr(weights, n) for n in ("selection_bias", "expert_scale") if getattr(weights, n) is not None}
    for field, has in (("selection_bias", able.selection), ("expert_scale", able.expert_scale)):
        if field in own and not has:
            _refuse(name, f"{field}.shape", tuple(own[field].shape), [None])
    _refuse_dtypes(name, of_x, {"router_logits": router_logits}, able.router_logits_dtypes)
    _refuse_dtypes(name, of_x, own, able.bias_dtypes)
    _refuse_strides(name, able, "routing", {"router_logits": router_logits})
    _refuse_strides(name, able, "weights", own)


def _refuse_kinds(name: str, able: Capabilities, weights: MoEWeights) -> None:
    """Raises Unsupported for kinds of projections, and for blocks of 4 bits, that are not declared."""
    packed = weights.packed()
    kinds = [packed[n].quant_type if n in packed else "dense" for n in ("gate_up_proj", "down_proj")]
    if not able.takes(*kinds):
        which = next(
            (n for n in packed if packed[n].quant_type not in able.weights), min(packed, default="gate_up_proj")
        )
        both = " beside ".join(dict.fromkeys(kinds))
        _refuse(name, which, both, sorted(able.weights))
    for n, tensor in packed.items():
        if not isinstance(tensor, NF4Tensor):
            continue
        if tensor.blocksize not in able.blocksizes:
            _refuse(name, f"{n}.blocksize", tensor.blocksize, sorted(able.blocksizes))
        if tensor.nested_offset is not None:
            form = "per expert" if tensor.nested_offset.ndim else "one"
            if form not in able.nested:
                _refuse(
                    name, f"{n}.nested_offset.shape", tuple(tensor.nested_offset.shape), [*sorted(able.nested), None]
                )


def _refuse_config(name: str, able: Capabilities, weights: MoEWeights) -> None:
    """Raises Unsupported for a form of the experts that is not declared."""
    config = weights.config
    if config.activation not in able.activations:
        _refuse(name, "activation", config.activation, sorted(able.activations))
    if config.clamp == "after" and not able.late_clamp:
        _refuse(name, "clamp", config.clamp, ["before"])
    for cap in ("gate_softcap", "up_softcap"):
        if getattr(config, cap) is not None and not able.softcap:
            _refuse(name, cap, getattr(config, cap), [None])
    if config.scale_input and not able.scale_input:
        _refuse(name, "scale_input", True, [False])
    if config.gated and config.gate_up_layout not in able.gate_up_layouts:
        _refuse(name, "gate_up_layout", config.gate_up_layout, sorted(able.gate_up_layouts))
    for field in ("alpha", "limit", "up_offset") if config.activation == "swiglu" else ():
        value, declared = getattr(config, field), getattr(able, f"{field}s")
        if declared is not None and value not in declared:
            _refuse(name, field, value, sorted(declared, key=lambda own: (own is not None, own or 0.0)))


def _refuse_dtypes(name: str, of_x: str, tensors: Mapping[str, Tensor], declared: Collection[str]) -> None:
    for argument, tensor in tensors.items():
        dtype = dtype_name(tensor)
        if dtype not in declared and not (dtype == of_x and "x" in declared):
            _refuse(name, f"{argument}.dtype", dtype, ["x's" if own == "x" else own for own in sorted(declared)])


def _refuse_strides(
    name: str, able: Capabilities, what: str, tensors: Mapping[str, Tensor], others: Collection[str] = ()
) -> None:
    """Raises Unsupported for a tensor that is not contiguous, and for ``others``, where ``what`` must be."""
    if what in able.strided:
        return
    for argument, tensor in tensors.items():
        if not tensor.is_contiguous():
            _refuse(name, f"{argument}.stride()", tensor.stride(), ["contiguous"])
    for argument in others:
        _refuse(name, f"{argument}.transposed", True, [False])


def _refuse(name: str, argument: str, value: Any, allowed: Collection[Any]) -> NoReturn:
    import executors

    raise executors.Unsupported(f"{argument}={value}: must be {' or '.join(map(str, allowed))} for {name}")
